"""The suite runs with every socket that leaves the machine blocked."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import sitecustomize

ELSEWHERE = ("192.0.2.1", 80)  # reserved for documentation, RFC 5737


def test_connecting_elsewhere_is_blocked() -> None:
    with socket.socket() as s, pytest.raises(sitecustomize.NetworkBlocked):
        s.connect(ELSEWHERE)
    with pytest.raises(sitecustomize.NetworkBlocked):
        socket.create_connection(("example.invalid", 443), timeout=1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, pytest.raises(sitecustomize.NetworkBlocked):
        s.sendto(b"x", ELSEWHERE)


def test_loopback_works() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"


def test_subprocesses_are_guarded_too() -> None:
    code = f"import socket; socket.socket().connect({ELSEWHERE!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "NetworkBlocked" in done.stderr
