"""Addresses of the pages, and the server that answers them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as missing:
    raise PunaError(
        f"puna annotate serve needs the package {missing.name}, which is not installed",
        "pip install 'puna[annotate]'",
    ) from missing

from puna.core.listen import is_loopback, listen
from puna.post.annotate.desk import Desk
from puna.post.annotate.web.http import HEADERS, Context, Refused
from puna.post.annotate.web.pages import Pages

logger = logging.getLogger("puna.annotate")
_WARM_AFTER_S = 2.0
_GRACE_S = 5
_KEEP_ALIVE_S = 75  # longer than the pauses of somebody who writes


class Outside:
    """Around the application: the host is checked, and every response has the safe headers."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                static = scope["path"].startswith("/static/")
                fields = {**HEADERS, "cache-control": "max-age=3600"} if static else HEADERS
                message["headers"] = [*message.get("headers", []), *(
                    (name.encode(), value.encode()) for name, value in fields.items()
                )]  # fmt: skip
            await send(message)

        try:
            self._context.check_host(Request(scope))
        except Refused as error:
            await PlainTextResponse(str(error), error.status)(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)


def make_app(context: Context) -> ASGIApp:
    """Return the application of a desk."""
    pages = Pages(context)
    role = context.for_role

    async def home(request: Request) -> Response:
        return RedirectResponse("/queue", 303)

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return context.page(request, "message.html.j2", None, error.status, title="Refused",
                            message=str(error), fix=None)  # fmt: skip

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return context.page(request, "message.html.j2", None, error.status_code,
                            title="There is no such page", message=request.url.path,
                            fix=None)  # fmt: skip

    app = Starlette(
        routes=[
            Route("/", home),
            Route("/health", health),
            Route("/login", pages.login, methods=["GET", "POST"]),
            Route("/logout", role("annotator", pages.logout), methods=["POST"]),
            Route("/queue", role("annotator", pages.queue)),
            Route("/work", role("annotator", pages.work)),
            Route("/answer/{response:int}", role("annotator", pages.act), methods=["POST"]),
            Route("/answer/{response:int}/draft", role("annotator", pages.draft), methods=["POST"]),
            Route("/withdraw", role("annotator", pages.withdraw), methods=["POST"]),
            Route("/review", role("reviewer", pages.case)),
            Route("/review/{item:int}", role("reviewer", pages.decide), methods=["POST"]),
            Route("/adjudicate", role("adjudicator", pages.case)),
            Route("/adjudicate/{item:int}", role("adjudicator", pages.decide), methods=["POST"]),
            Route("/audit", role("reviewer", pages.audit)),
            Route("/audit/{audit:int}", role("reviewer", pages.audit), methods=["POST"]),
            Route("/dashboard", role("adjudicator", pages.dashboard)),
            Route("/versions", role("admin", pages.versions), methods=["GET", "POST"]),
            Route("/versions/{name}.jsonl", role("admin", pages.download)),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        ],
        exception_handlers={Refused: refused, HTTPException: not_found},
        lifespan=_lifespan(context),
    )
    return Outside(app, context)


def _lifespan(context: Context) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async def warm() -> None:
            # The compiled checks take a second to load: not while the first page is awaited.
            await asyncio.sleep(_WARM_AFTER_S)
            await context.run(lambda: context.desk.checker.is_warm)

        task = asyncio.create_task(warm())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    return lifespan


class DeskServer:
    """Serves a desk; used by the command, and by tests in a thread.

    Args:
        path: The desk's file.
        host: Where to listen.
        port: 0 takes a free one.
        names: Host names besides those of this machine.

    Raises:
        PunaError: The desk cannot be opened or the address not bound.
    """

    def __init__(
        self, path: Path, host: str = "127.0.0.1", port: int = 0, names: Collection[str] = ()
    ) -> None:
        self.context = Context(Desk.open(path), names)
        try:
            self._socket = listen(host, port)
        except PunaError:
            self.context.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        self.host = host
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}"
        config = uvicorn.Config(
            make_app(self.context), log_level="warning", access_log=False, lifespan="on",
            timeout_graceful_shutdown=_GRACE_S, timeout_keep_alive=_KEEP_ALIVE_S,
            server_header=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until a signal, or :meth:`stop`."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
            self.context.close()

    def stop(self) -> None:
        """End; may be called from any thread."""
        self._server.should_exit = True

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)

    @property
    def started(self) -> bool:
        """Whether requests are answered."""
        return self._server.started
