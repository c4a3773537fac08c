"""The ASGI application: routes, and around them the key, the counts and the errors."""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna.serve.asgi import ClientLeft, headers_of, send_error
from puna.serve.dispatch import Dispatcher
from puna.serve.errors import ApiError
from puna.serve.generate import ChatEndpoint, CompletionEndpoint, Generation, unknown_model

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.ASCII)
_CLIENT_LEFT = 499

logger = logging.getLogger("puna.serve")


class Guard:
    """Around the routes: checks the key and the host, turns errors into JSON, counts responses.

    Args:
        app: The routes.
        dispatcher: Its metrics count the responses.
        api_key: Asked for everywhere but at ``/health``; None for none.
        only_local: Refuse requests whose Host is not this machine: a web page whose name an
            attacker points at 127.0.0.1 would otherwise reach the server through a browser.
    """

    def __init__(
        self, app: ASGIApp, dispatcher: Dispatcher, api_key: str | None, only_local: bool
    ) -> None:
        self._app, self._dispatcher = app, dispatcher
        self._key = None if api_key is None else api_key.encode()
        self._only_local = only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        scope["app"] = self  # then the router raises what it does not find
        status: int | None = None

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, counting)
        except ClientLeft:
            status = _CLIENT_LEFT
        except ApiError as error:
            await send_error(receive, counting, error)
        except HTTPException as error:  # of the router
            found = ApiError(error.status_code, _no_route(scope, error), code="no_such_endpoint")
            await send_error(receive, counting, found)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if status is not None:
                raise  # in the midst of a response: the connection is closed
            await send_error(receive, counting, ApiError(500, "the server has a fault"))
        finally:
            path = scope["path"]
            label = next((known for known in PATHS if path.startswith(known)), "other")
            self._dispatcher.metrics.responses[label, status or _CLIENT_LEFT] += 1

    def _check(self, scope: Scope) -> None:
        if scope["path"] == "/health":
            return
        headers = headers_of(scope)
        if self._key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
            if scheme.lower() != "bearer" or not is_right:
                raise ApiError(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
        elif self._only_local and not _LOCAL_HOST.fullmatch(headers.get("host", "localhost")):
            raise ApiError(
                403, f"host {headers['host'][:80]!r} is not this machine; to be reached by other "
                "names, start the server with an API key", code="wrong_host",
            )  # fmt: skip


def _no_route(scope: Scope, error: HTTPException) -> str:
    what = f"{scope['method']} {scope['path'][:200]}"
    if error.status_code == 405:
        return f"{what}: another method is needed ({(error.headers or {}).get('Allow', '')})"
    return f"{what}: there is no such endpoint; there are {', '.join(PATHS)}"


def make_app(
    dispatcher: Dispatcher,
    settings: Generation,
    encoder: ThreadPoolExecutor,
    api_key: str | None = None,
    only_local: bool = True,
) -> ASGIApp:
    """Return the application.

    Args:
        dispatcher: Runs the jobs.
        settings: Of the endpoints that generate.
        encoder: Encodes large prompts.
        api_key: See :class:`Guard`.
        only_local: See :class:`Guard`.
    """
    created = int(time.time())

    def described() -> dict[str, Any]:
        card: dict[str, Any] = {
            "id": settings.model, "object": "model", "created": created, "owned_by": "puna",
        }  # fmt: skip
        language_model = dispatcher.worker.language_model
        if language_model is not None:
            card["max_model_len"] = language_model.max_seq_len
        return card

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described()]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != settings.model:
            raise unknown_model(name, settings.model)
        return JSONResponse(described())

    async def health(request: Request) -> Response:
        status = dispatcher.status
        body: dict[str, Any] = {"status": status, "model": settings.model}
        if dispatcher.worker.error is not None:
            body["error"] = f"{type(dispatcher.worker.error).__name__}"
        return JSONResponse(body, 200 if status == "ready" else 503)

    async def metrics(request: Request) -> Response:
        text = dispatcher.metrics.text(
            dispatcher.n_outstanding, dispatcher.worker.stats, dispatcher.status == "ready"
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    generation = (dispatcher, settings, encoder)
    routes: Sequence[Route] = [
        Route("/v1/completions", CompletionEndpoint(*generation), methods=["POST"]),
        Route("/v1/chat/completions", ChatEndpoint(*generation), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    router = Router(routes, redirect_slashes=False)
    return Guard(router, dispatcher, api_key, only_local)
