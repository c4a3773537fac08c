"""Reading bodies and writing responses over ASGI, guarded against clients that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from puna.serve.errors import ApiError

BODY_TIMEOUT_S = 30.0
"""A body that is not there after this time is not waited for."""
_DRAIN_BYTES, _DRAIN_S = 64 << 20, 5.0


class ClientLeft(Exception):
    """The client closed the connection before its body was complete."""


async def read_body(scope: Scope, receive: Receive, most_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 415 for another type than JSON, 413 when it is too large (whatever its header
            says), 408 when it comes too slowly.
        ClientLeft: It will never come.
    """
    headers = headers_of(scope)
    kind = headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415, f"content-type is {json.dumps(kind[:80])}, send application/json",
            code="unsupported_media_type",
        )  # fmt: skip
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(
            415, "content-encoding is not supported, send plain JSON",
            code="unsupported_media_type",
        )  # fmt: skip
    announced = headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most_bytes:
        raise too_large(most_bytes)
    parts: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                parts.append(message.get("body", b""))
                n_bytes += len(parts[-1])
                if n_bytes > most_bytes:
                    raise too_large(most_bytes)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(
            408, f"the body was not complete after {BODY_TIMEOUT_S:g} s", code="slow_body",
            headers={"connection": "close"},
        ) from None  # fmt: skip


def too_large(most_bytes: int) -> ApiError:
    """The error of a body that is too large."""
    return ApiError(
        413, f"the body is larger than {most_bytes} bytes", code="body_too_large",
        headers={"connection": "close"},
    )  # fmt: skip


def headers_of(scope: Scope) -> dict[str, str]:
    """Return the headers by lower-case name; of repeated ones the last."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def start_message(status: int, headers: Mapping[str, str]) -> Message:
    """The ASGI message that begins a response."""
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }


async def send_body(
    send: Send,
    status: int,
    body: bytes,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a whole response."""
    fields = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    await send(start_message(status, fields))
    await send({"type": "http.response.body", "body": body})


async def send_error(receive: Receive, send: Send, error: ApiError) -> None:
    """Send an error; a client that still sends a refused body is listened to for a while.

    Closing at once would reset its connection, and it would never see the response.
    """
    if error.status != 413:
        await send_body(send, error.status, error.body, headers=error.headers)
        return
    fields = {"content-type": "application/json", "content-length": str(len(error.body))}
    await send(start_message(error.status, {**fields, **error.headers}))
    await send({"type": "http.response.body", "body": error.body, "more_body": True})
    n_bytes = 0
    try:
        async with asyncio.timeout(_DRAIN_S):
            while n_bytes < _DRAIN_BYTES:
                message: dict[str, Any] = dict(await receive())
                n_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})
