"""Between Starlette and the pages: who asks, forms, CSRF, threads, errors, headers."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from puna.core.errors import PunaError
from puna.post.annotate import users
from puna.post.annotate.desk import Desk
from puna.post.annotate.settings import DEGREES, Role
from puna.post.annotate.users import User

T = TypeVar("T")
Page = Callable[[Request, User], Awaitable[Response]]
COOKIE = "puna_desk"
MOST_BODY_BYTES = 2 << 20
N_THREADS = 8
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.ASCII)
_MOST_FAILURES, _FAILURES_S, _MOST_NAMES = 5, 60.0, 10_000
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self';"
    " connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
"""On every response: nothing from elsewhere, in no frame, in no cache."""


class Refused(Exception):
    """A request that is not answered with its page.

    Args:
        status: Of HTTP.
        message: For the person.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Context:
    """What the pages share.

    Args:
        desk: The desk.
        names: Host names besides those of this machine.
    """

    def __init__(self, desk: Desk, names: Collection[str] = ()) -> None:
        self.desk = desk
        self.names = frozenset(names)
        self._threads = ThreadPoolExecutor(N_THREADS, thread_name_prefix="desk")
        self._failures: dict[str, deque[float]] = defaultdict(deque)
        self.templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        shared: dict[str, Any] = {"rules": desk.rules, "degrees": DEGREES}
        self.templates.globals.update(shared)
        self.templates.filters |= {
            "pct": lambda share: "-" if share is None else f"{share:.1%}",
            "num": lambda value: "-" if value is None else f"{value:.2f}",
            "n": lambda value: f"{value:,}",
            "date": _date,
        }

    async def run(self, call: Callable[..., T], *values: Any) -> T:
        """Run what waits for the disk or computes in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *values)

    def close(self) -> None:
        """End the threads and close the desk."""
        self._threads.shutdown(wait=True)
        self.desk.close()

    def page(
        self, request: Request, template: str, user: User | None, status: int = 200, **values: Any
    ) -> Response:  # fmt: skip
        """Render a page."""
        token = request.cookies.get(COOKIE, "")
        text = self.templates.get_template(template).render(
            user=user, path=request.url.path,
            csrf=users.csrf_of(self.desk.store, token) if user is not None else "", **values,
        )  # fmt: skip
        return HTMLResponse(text, status)

    def check_host(self, request: Request) -> None:
        """Refuse names that are not this server's: a foreign page could point its name here.

        Raises:
            Refused: The name is another.
        """
        host = request.headers.get("host", "")
        if not _LOCAL_HOST.fullmatch(host) and host.partition(":")[0] not in self.names:
            raise Refused(403, f"host {host[:80]!r} is not this desk; start it with --name")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "the request comes from another site")

    def for_role(self, role: Role, page: Page) -> Callable[[Request], Awaitable[Response]]:
        """Wrap a page: only for who is logged in and may; a POST must carry the session's token."""

        async def guarded(request: Request) -> Response:
            token = request.cookies.get(COOKIE)
            user = None if token is None else await self.run(users.who, self.desk.store, token)
            if user is None or token is None:
                return RedirectResponse("/login", 303)
            if request.method == "POST":
                form = await form_of(request)
                given = request.headers.get("x-csrf") or form.get("csrf", "")
                wanted = users.csrf_of(self.desk.store, token)
                if not hmac.compare_digest(given.encode(), wanted.encode()):
                    raise Refused(403, "the form is of another session; load the page again")
            if not user.may(role):
                raise Refused(403, f"this page is for the role {role}, yours is {user.role}")
            try:
                return await page(request, user)
            except PunaError as error:
                return self.page(request, "message.html.j2", user, 400, title="That did not work",
                                 message=error.message, fix=error.fix)  # fmt: skip

        return guarded

    def may_try(self, name: str) -> bool:
        """Tell whether a name may try to log in: not after five failures in a minute."""
        failures = self._failures[name]
        while failures and failures[0] < time.monotonic() - _FAILURES_S:
            failures.popleft()
        return len(failures) < _MOST_FAILURES

    def failed(self, name: str) -> None:
        """Note that a name or password was wrong."""
        if len(self._failures) > _MOST_NAMES:
            self._failures.clear()
        self._failures[name].append(time.monotonic())


def _date(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(at_s))


async def form_of(request: Request) -> dict[str, str]:
    """Return the fields of a form, or the strings of a JSON object.

    Raises:
        Refused: The body is too large or none of the two.
    """
    kept = getattr(request.state, "form", None)
    if kept is not None:
        return kept
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise Refused(413, "that is too much text")
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            raw = json.loads(body or b"{}")
            fields = {str(name): str(value) for name, value in dict(raw).items()}
        else:
            fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=50))
    except (ValueError, TypeError) as error:
        raise Refused(400, "the form cannot be read") from error
    # Browsers send line ends as CR LF.
    fields = {name: value.replace("\r\n", "\n") for name, value in fields.items()}
    request.state.form = fields
    return fields
