"""The HTTP/1.1 connection: uvicorn's, with a limit on how long and how large a head may be."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 15.0
MAX_HEAD_BYTES = 64 << 10
ABORT = "puna.abort"
"""Key of the ASGI scope: a function that closes the connection without waiting for the reader."""


class Protocol(HttpToolsProtocol):
    """A connection whose client must send the head of a request in time, and a small one."""

    _timer: asyncio.TimerHandle | None = None
    _is_in_head = True
    _n_head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; refuse a head that has no end."""
        super().data_received(data)
        if self._is_in_head and not self.transport.is_closing():
            self._n_head_bytes += len(data)
            if self._n_head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """Begin to wait for the rest of a head."""
        super().on_message_begin()
        self.scope[ABORT] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        if not self._is_in_head:
            self._arm()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._disarm()
        super().on_headers_complete()

    def _arm(self) -> None:
        self._is_in_head, self._n_head_bytes = True, 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _disarm(self) -> None:
        self._is_in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
