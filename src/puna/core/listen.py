"""Addresses that servers listen at."""

from __future__ import annotations

import ipaddress
import socket

from puna.core.errors import PunaError, explain_environment_error

_BACKLOG = 2048


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a host name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket that does not block.

    Args:
        host: Name or address.
        port: 0 takes a free one.

    Raises:
        PunaError: The port is taken, or the host is not this machine's.
    """
    where = f"{host}:{port}"
    try:
        [first, *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # Named, for asyncio sends small parts at once only where it knows that this is TCP.
        sock = socket.socket(first[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(first[4])
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        known = explain_environment_error(error)
        if known is not None:
            raise PunaError(f"{where}: {known.message}", "take a port above 1023") from error
        raise PunaError(
            f"cannot listen at {where}: {error.strerror or error}",
            "choose another --port (0 takes a free one) or --host",
        ) from error
    sock.setblocking(False)
    return sock
