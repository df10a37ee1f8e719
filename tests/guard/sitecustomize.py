"""Blocks every socket that leaves this machine. Python imports it at start when this folder is on PYTHONPATH.

conftest.py puts the folder there, so that subprocesses of tests are guarded as well, and installs it in the test
process itself.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any


class NetworkBlocked(RuntimeError):
    """A test tried to leave the machine. Not an OSError: no fallback for a broken network may hide it."""


def is_local(host: object) -> bool:
    """Whether a host is this machine: a loopback address, its name, or the empty wildcard."""
    if isinstance(host, bytes):
        host = host.decode()
    if not isinstance(host, str) or host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def check(address: object) -> None:
    """Raises: NetworkBlocked unless the address is a path (Unix socket) or on this machine."""
    if isinstance(address, tuple) and address and not is_local(address[0]):
        raise NetworkBlocked(f"tests may not use the network: {address}")


def install() -> None:
    """Wrap the socket functions that start talking to another machine. Installing twice does nothing."""
    if getattr(socket, "_packforcing_guarded", False):
        return
    socket._packforcing_guarded = True  # type: ignore[attr-defined]

    class GuardedSocket(socket.socket):
        def connect(self, address: Any, /) -> None:
            check(address)
            super().connect(address)

        def connect_ex(self, address: Any, /) -> int:
            check(address)
            return super().connect_ex(address)

        def sendto(self, data: Any, *rest: Any) -> int:
            check(rest[-1])
            return super().sendto(data, *rest)

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        check((host,))
        return look_up(host, *rest, **options)

    socket.socket = GuardedSocket  # type: ignore[misc]
    socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]


install()
