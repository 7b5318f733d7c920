"""What holds for every test: one thread, no network beyond loopback, no state left behind."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# before torch is imported; a process that a test starts inherits them
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
# LightningCLI calls what jsonargparse 5 will remove; pyproject.toml keeps 5 out
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

import hypothesis
import numpy as np
import torch

from srcflow import registry

# `make test` installs the plug-in distributions of tests/plugins here, beside the environment's own packages
PLUGINS = Path(__file__).parents[1] / ".venv" / "plugins"
if PLUGINS.is_dir():
    sys.path.insert(0, str(PLUGINS))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUGINS), os.environ.get("PYTHONPATH")]))

collect_ignore = ["plugins"]  # distributions of their own, not tests

hypothesis.settings.register_profile("srcflow", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("srcflow")

LOOPBACK = ("localhost", "127.", "::1", "0.0.0.0")
ALLOWED_WARNINGS = {
    # tests/plugins/brokenplugin is there to be broken; its tests ask for the warning
    "ignore::srcflow.registry.PluginWarning": "installed on purpose",
    # Lightning's advice about speed and logging, which tiny CPU runs do not follow
    r"ignore:.*does not have many workers.*": "workers cost more than they give here",
    r"ignore:.*The number of training batches .* is smaller than the logging interval.*": "a few steps only",
    r"ignore:.*Starting from v1.9.0, `tensorboardX`.*": "the logger is chosen by the installation",
    r"ignore:.*LeafSpec.* is deprecated:FutureWarning": "Lightning 2.6 on torch 2.15; the command line hides it too",
    r"ignore:.*GPU available but not used.*": "the tests of the CPU path run on machines with a GPU too",
    r"ignore:.*Checkpoint directory .* exists and is not empty.*": "resuming into one folder",
}
attempts: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """One thread, guarded sockets, the warnings that are no errors."""
    torch.set_num_threads(1)
    for line in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, _guarded_connect(getattr(socket.socket, name)))
    socket.getaddrinfo = _guarded_lookup(socket.getaddrinfo)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped, by name, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_report_header() -> str:
    """Which kernels the numbers of this run come from; `make test-portable` chooses others."""
    return f"torch {torch.__version__}, CPU kernels for {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """A test that tried to leave this machine fails, even if the code under test swallowed the error."""
    attempts.clear()
    yield
    tried = list(attempts)
    attempts.clear()
    if tried:
        pytest.fail(f"the test tried to reach {', '.join(tried)}")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seeds before a test; environment, working directory, torch's defaults and the registry's caches after it."""
    environment, directory = dict(os.environ), os.getcwd()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # for libraries that draw from the global generator
    torch.manual_seed(0)
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    registry._load.cache_clear()


def _guarded_connect(original: Any) -> Any:
    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_beyond_loopback(str(address[0]))
        return original(self, address)

    return connect


def _guarded_lookup(original: Any) -> Any:
    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, "", socket.gethostname()):
            _refuse_beyond_loopback(str(name))
        return original(host, *args, **kwargs)

    return getaddrinfo


def _refuse_beyond_loopback(host: str) -> None:
    if not host.startswith(LOOPBACK):
        attempts.append(host)
        raise RuntimeError(f"tests open no socket beyond loopback, and something asked for {host!r}")
