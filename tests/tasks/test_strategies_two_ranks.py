"""DDP's options and FSDP2 on two processes: equal numbers, counted reductions and gathers, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What strategies_two_ranks.py prints."""
    script = Path(__file__).with_name("strategies_two_ranks.py")
    root = tmp_path_factory.mktemp("strategies")
    out = subprocess.run([sys.executable, str(script), str(root)], capture_output=True, text=True, timeout=400)
    assert out.returncode == 0, out.stderr[-3000:]
    return dict(json.loads(out.stdout.rpartition("RESULT")[2]))


def test_bucket_views_and_a_static_graph_change_no_bit(found: dict[str, Any]) -> None:
    assert found["view"] == found["plain"] == found["static"]
    assert found["accumulated view"] == found["accumulated"] != found["plain"]


def test_a_static_graph_does_not_go_with_accumulation(found: dict[str, Any]) -> None:
    assert "trainer.strategy.static_graph = True" in found["static accumulated"]


def test_accumulated_gradients_are_reduced_once_per_step(found: dict[str, Any]) -> None:
    """One bucket, four steps, three batches each."""
    assert found["plain reductions"] == found["accumulated reductions"] == found["accumulated view reductions"] == 4


def test_gradients_can_be_reduced_in_bfloat16(found: dict[str, Any]) -> None:
    """Lightning registers such a hook on GPUs only; here it is given to torch."""
    assert found["bf16"] != found["plain"]
    assert found["bf16"] == pytest.approx(found["plain"], rel=1e-3)


def test_a_sample_gathers_a_sharded_flow_once(found: dict[str, Any]) -> None:
    """Three layers and what is around them, for any number of tokens; the shards are as before, so that training goes on."""
    for tokens in (4, 16):
        assert found[f"{tokens} tokens, gathers"] == found[f"{tokens} tokens, gathers again"] == 4
        assert found[f"{tokens} tokens, undisturbed"]
    assert found["16 tokens, gathers of the flow itself"] > found["4 tokens, gathers of the flow itself"] > 4


def test_a_trained_parameter_outside_of_the_shards_is_named(found: dict[str, Any]) -> None:
    assert "outside of what Extra.configure_model shards: scale." in found["outside"]


def test_ranks_that_split_no_layer_are_refused(found: dict[str, Any]) -> None:
    assert "trainer.strategy.tensor_parallel_size = 2" in found["split"]
