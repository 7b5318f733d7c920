"""The guard of conftest.py: tests open no socket beyond loopback."""

from __future__ import annotations

import socket

import pytest


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org"])
def test_the_rest_is_refused(host: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(RuntimeError, match="beyond loopback"):
        socket.create_connection((host, 80), timeout=0.01)
    guard = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "_refuse_beyond_loopback"))
    assert guard.attempts == [host]  # what makes the test fail, if it is not cleared as it is here
    guard.attempts.clear()
