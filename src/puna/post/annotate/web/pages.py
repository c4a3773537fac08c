"""The pages: queue, item, review, adjudication, audit, dashboard, versions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from puna.core.errors import PunaError
from puna.post.annotate import acceptance, judge, reliability, users
from puna.post.annotate.checks import Finding
from puna.post.annotate.desk import Task
from puna.post.annotate.judge import Verdict
from puna.post.annotate.users import User
from puna.post.annotate.web.http import COOKIE, Context, Refused, form_of

_FIELDS = ("text", "edited", "label", "safety", "topic")


def answer_of(form: dict[str, str]) -> dict[str, Any]:
    """Return what a form says of an answer; it is checked by the desk."""
    answer: dict[str, Any] = {name: form[name] for name in _FIELDS if form.get(name)}
    degree = form.get("preference", "")
    if degree.lstrip("-").isdigit():
        answer["preference"] = int(degree)
    return answer


class Pages:
    """The pages of a desk; see :mod:`puna.post.annotate.web.server` for their addresses."""

    def __init__(self, context: Context) -> None:
        self.context, self.desk = context, context.desk
        self._n_votes = 0
        self._refresh: asyncio.Task[None] | None = None

    async def login(self, request: Request) -> Response:
        """Log in."""
        if request.method == "GET":
            return self.context.page(request, "login.html.j2", None, message="")
        form = await form_of(request)
        name = form.get("name", "")[:64]
        if not self.context.may_try(name):
            return self.context.page(request, "login.html.j2", None, 429,
                                     message="too many attempts; wait a minute")  # fmt: skip
        token = await self.context.run(users.log_in, self.desk.store, name,
                                       form.get("password", "")[:1024])  # fmt: skip
        if token is None:
            self.context.failed(name)
            return self.context.page(request, "login.html.j2", None, 401,
                                     message="name or password is wrong")  # fmt: skip
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, token, max_age=int(users.SESSION_S), httponly=True,
                            samesite="strict", secure=request.url.scheme == "https")  # fmt: skip
        return response

    async def logout(self, request: Request, user: User) -> Response:
        """Log out."""
        await self.context.run(users.log_out, self.desk.store, request.cookies[COOKIE])
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        return response

    async def queue(self, request: Request, user: User) -> Response:
        """What there is to do for this user."""
        values = await self.context.run(self._queue, user)
        return self.context.page(request, "queue.html.j2", user, **values)

    def _queue(self, user: User) -> dict[str, Any]:
        store = self.desk.store
        counts = {row["state"]: row["n"] for row in store.all(
            "SELECT state, count(*) AS n FROM responses WHERE user = ? GROUP BY state", user.id
        )}  # fmt: skip
        waiting = {row["state"]: row["n"] for row in store.all(
            "SELECT state, count(*) AS n FROM items WHERE state IN ('review', 'adjudication')"
            " GROUP BY state"
        )}  # fmt: skip
        row = store.one("SELECT count(*) AS n FROM audits WHERE is_defect IS NULL")
        waiting["audit"] = row["n"] if row is not None else 0
        recent = store.all(
            "SELECT r.item, r.state, r.round, r.note, r.submitted_s, i.content, i.kind"
            " FROM responses r JOIN items i ON i.id = r.item WHERE r.user = ? AND"
            " r.state IN ('submitted', 'returned') ORDER BY r.submitted_s DESC LIMIT 8", user.id,
        )  # fmt: skip
        shown = [{**dict(one), "prompt": json.loads(one["content"])["messages"][-1]["content"]}
                 for one in recent]  # fmt: skip
        return {"counts": counts, "waiting": waiting, "recent": shown}

    async def work(self, request: Request, user: User) -> Response:
        """The next item."""
        task = await self.context.run(self.desk.next_task, user)
        return self._task_page(request, user, task)

    def _task_page(
        self, request: Request, user: User, task: Task | None, findings: Sequence[Finding] = ()
    ) -> Response:  # fmt: skip
        if task is None:
            return self.context.page(request, "message.html.j2", user, title="Nothing to do",
                                     message="There is no item for you now.", fix=None)  # fmt: skip
        return self.context.page(request, "work.html.j2", user, task=task, findings=findings,
                                 draft=task.draft or {})  # fmt: skip

    async def draft(self, request: Request, user: User) -> Response:
        """Save a draft, from the page's script."""
        content = answer_of(await form_of(request))
        number = int(request.path_params["response"])
        await self.context.run(self.desk.save_draft, user, number, content)
        return Response(status_code=204)

    async def act(self, request: Request, user: User) -> Response:
        """Submit an item, skip it, or undo its last draft."""
        form = await form_of(request)
        number = int(request.path_params["response"])
        what = form.get("action", "submit")
        if what == "skip":
            await self.context.run(self.desk.skip, user, number, form.get("note", ""))
        elif what == "undo":
            await self.context.run(self.desk.undo_draft, user, number)
        else:
            findings = await self.context.run(self._submit, user, number, answer_of(form))
            if findings is not None:
                task = await self.context.run(self.desk.task, user, number)
                return self._task_page(request, user, task, findings)
            self._count_votes()
        return RedirectResponse("/work", 303)

    def _submit(self, user: User, number: int, answer: dict[str, Any]) -> list[Finding] | None:
        """Hand in an answer; return what stands against it, None when it was taken."""
        self.desk.task(user, number)  # an item that is not in these hands has another page
        try:
            done = self.desk.submit(user, number, answer)
        except PunaError as error:
            self.desk.save_draft(user, number, answer)
            return [Finding("not complete", True, f"{error.message}; {error.fix}")]
        return None if done.accepted else [one for one in done.findings if one.is_hard]

    def _count_votes(self) -> None:
        """Estimate reliability anew from time to time, beside the requests and once at a time."""
        self._n_votes += 1
        is_running = self._refresh is not None and not self._refresh.done()
        if self._n_votes >= self.desk.rules.refresh_every and not is_running:
            self._n_votes = 0
            self._refresh = asyncio.create_task(self.context.run(self._look_after))

    def _look_after(self) -> None:
        reliability.refresh(self.desk)
        self.desk.release_stale()

    async def withdraw(self, request: Request, user: User) -> Response:
        """Take back the last submission."""
        if await self.context.run(self.desk.withdraw, user) is None:
            raise PunaError("it is too late to take it back", "go on with the next item")
        return RedirectResponse("/work", 303)

    async def case(self, request: Request, user: User) -> Response:
        """The next item to review or to adjudicate."""
        state = "adjudication" if request.url.path == "/adjudicate" else "review"
        found = await self.context.run(judge.next_case, self.desk, user, state)
        if found is None:
            return self.context.page(request, "message.html.j2", user, title="Nothing to judge",
                                     message="No item waits for you now.", fix=None)  # fmt: skip
        return self.context.page(request, "judge.html.j2", user, case=found)

    async def decide(self, request: Request, user: User) -> Response:
        """Take a verdict."""
        form = await form_of(request)
        chosen = form.get("response", "")
        own = answer_of(form) if form.get("action") == "own" else None
        verdict = "accept" if own is not None else form.get("action", "")
        given = Verdict(
            verdict, int(chosen) if chosen.isdigit() and own is None else None,
            form.get("reason") or None, form.get("note", "")[:2000], own,
        )  # fmt: skip
        item = int(request.path_params["item"])
        await self.context.run(judge.judge, self.desk, user, item, given)
        back = "/adjudicate" if request.url.path.startswith("/adjudicate") else "/review"
        return RedirectResponse(back, 303)

    async def audit(self, request: Request, user: User) -> Response:
        """The next accepted item to look at for a batch's audit."""
        if request.method == "POST":
            form = await form_of(request)
            await self.context.run(
                acceptance.record_audit, self.desk, user, int(request.path_params["audit"]),
                form.get("action") == "defect", form.get("reason") or None,
            )  # fmt: skip
            return RedirectResponse("/audit", 303)
        await self.context.run(acceptance.draw_audits, self.desk)
        found = await self.context.run(acceptance.next_audit, self.desk, user)
        if found is None:
            return self.context.page(request, "message.html.j2", user, title="Nothing to audit",
                                     message="No batch waits for you.", fix=None)  # fmt: skip
        number, case, answer = found
        return self.context.page(request, "audit.html.j2", user, case=case, answer=answer,
                                 number=number)  # fmt: skip

    async def dashboard(self, request: Request, user: User) -> Response:
        """Progress, agreement and defects by round, people, batches."""
        from puna.post.annotate import dashboard

        await self.context.run(reliability.refresh, self.desk)
        values = await self.context.run(dashboard.collect, self.desk)
        return self.context.page(request, "dashboard.html.j2", user, **values)

    async def versions(self, request: Request, user: User) -> Response:
        """Frozen versions, and freezing one."""
        from puna.post.annotate import exchange

        if request.method == "POST":
            name = (await form_of(request)).get("name", "").strip()
            if not name or not name.replace("-", "").replace(".", "").isalnum():
                raise PunaError(f"version name {name!r} is not allowed", "letters, digits, . and -")
            await self.context.run(exchange.freeze, self.desk, user, name)
            return RedirectResponse("/versions", 303)
        rows = await self.context.run(
            self.desk.store.all, "SELECT * FROM versions ORDER BY made_s DESC"
        )
        return self.context.page(request, "versions.html.j2", user, versions=rows)

    async def download(self, request: Request, user: User) -> Response:
        """Stream a version as JSONL."""
        from puna.post.annotate import exchange

        name, form = request.path_params["name"], request.query_params.get("format", "sft")
        if self.desk.store.one("SELECT 1 FROM versions WHERE name = ?", name) is None:
            raise Refused(404, f"there is no version {name[:80]!r}")
        if form not in exchange.FORMATS:
            raise Refused(400, f"format {form[:80]!r} is unknown")

        def lines() -> Iterator[str]:
            buffer: list[str] = []
            for one in exchange.examples(self.desk, name, form):
                buffer.append(json.dumps(one, ensure_ascii=False) + "\n")
                if len(buffer) == 500:
                    yield "".join(buffer)
                    buffer.clear()
            yield "".join(buffer)

        return StreamingResponse(lines(), media_type="application/x-ndjson", headers={
            "content-disposition": f'attachment; filename="{name}-{form}.jsonl"',
        })  # fmt: skip
