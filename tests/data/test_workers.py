from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from .made_shards import shards

RANK = """
import multiprocessing, os, signal, sys
from srcflow.datamodules.image_shards import ImageShards

if __name__ == "__main__":
    mode, method = sys.argv[2:]
    data = ImageShards(
        sys.argv[1] + "/s-*.tar", size=4, batch_size=2, mode=mode, num_workers=2, shuffle_buffer=2, start_method=method, max_bad_fraction=0
    )
    loader = data.train_dataloader()
    for step, _ in enumerate(loader):
        if step == 0:
            for worker in multiprocessing.active_children():
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    os.kill(worker.pid, number)
        elif step == 12:  # beyond what was read ahead
            assert len(multiprocessing.active_children()) == 2
            raise ValueError("a bug in training")
"""


@pytest.mark.parametrize(("mode", "method"), [("map", "fork"), pytest.param("stream", "spawn", marks=pytest.mark.slow)])
def test_workers_leave_signals_to_the_rank_and_end_with_it(mode: str, method: str, tmp_path: Path) -> None:
    shards(tmp_path, [8] * 6)
    (tmp_path / "rank.py").write_text(RANK)
    with subprocess.Popen(
        [sys.executable, "rank.py", str(tmp_path), mode, method], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as rank:
        assert rank.stderr is not None
        try:
            lines = []
            while "ValueError: a bug in training" not in (line := rank.stderr.readline()):
                lines.append(line)
                assert line, "".join(lines)
            start = time.monotonic()
            assert rank.wait(30) == 1
            assert time.monotonic() - start < 20
        finally:
            rank.kill()
