"""The desk's pages over real HTTP: roles, CSRF, hosts, drafts, a whole round up to the download."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import httpx
import pytest
from click.testing import CliRunner

argon2 = pytest.importorskip("argon2", reason="the extra `annotate`")
pytest.importorskip("uvicorn", reason="the extra `annotate`")

from puna.cli.annotate import annotate  # noqa: E402
from puna.core.errors import PunaError  # noqa: E402
from puna.post.annotate.audit import audit  # noqa: E402
from puna.post.annotate.exchange import import_items  # noqa: E402
from puna.post.annotate.settings import Rules  # noqa: E402
from puna.post.annotate.store import Store  # noqa: E402
from puna.post.annotate.users import add_user, change_user  # noqa: E402
from puna.post.annotate.web.server import DeskServer  # noqa: E402

PASSWORD = "a long password"
PEOPLE = {"ann": "annotator", "rev": "reviewer", "adj": "adjudicator", "boss": "admin"}
RULES = Rules(gold_rate=0.0, checks={"pii": False}, guidelines="Be <b>brief</b>.",
              topics=("maths",), audit_defects=0, defect_limit=0.5)  # fmt: skip


class Person:
    """A browser of somebody who is logged in."""

    def __init__(self, url, name):
        self.http = httpx.Client(base_url=url, follow_redirects=True)
        self.page = self.http.post("/login", data={"name": name, "password": PASSWORD}).text

    def get(self, path, status=200):
        done = self.http.get(path)
        assert done.status_code == status, done.text
        self.page = done.text
        return self.page

    def post(self, path=None, status=200, **fields):
        """Send the form of the page, or a form to a path."""
        token = re.search(r'data-csrf="(\w+)"', self.page)
        path = path or re.search(r'id="answer".*?action="([^"]+)"', self.page, re.DOTALL)[1]
        fields = {"csrf": token[1] if token else "", **fields}
        done = self.http.post(path, data=fields)
        assert done.status_code == status, done.text
        if done.headers.get("content-type", "").startswith("text/html"):
            self.page = done.text
        return done.text


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "argon2.PasswordHasher.__init__.__defaults__", (1, 8, 1, 16, 16, "utf-8", argon2.Type.ID)
    )
    path = tmp_path / "desk.db"
    Store.create(path, RULES.model_dump_json()).close()
    server = DeskServer(path)
    for name, role in PEOPLE.items():
        add_user(server.context.desk.store, name, role, PASSWORD)
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    people = []

    def enter(name):
        people.append(Person(server.url, name))
        return people[-1]

    server.enter = enter
    yield server
    for one in people:
        one.http.close()
    server.stop()
    thread.join(20)


def prompts(desk, *records):
    import_items(desk.context.desk, [(f"r{n}", raw) for n, raw in enumerate(records)], "b")


def test_an_item_goes_from_the_queue_to_the_download(desk):
    prompts(desk, {"prompt": "What is <script>alert(1)</script> 6 x 7?"})
    ann, rev, adj, boss = (desk.enter(name) for name in PEOPLE)
    page = ann.get("/work")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "Be &lt;b&gt;brief" in page
    assert "I cannot help" in ann.post(action="submit", text="I'm sorry, I cannot help you.")
    assert "refusal" in ann.page
    ann.post(action="submit", text="It is 42.", topic="maths", safety="safe")
    assert "Nothing to do" in ann.page
    assert "It is 42." in rev.get("/review")
    assert "ann" not in re.sub(r"annotat\w+", "", rev.page)
    assert "reason None is unknown" in rev.post(action="return", response="1", status=400)
    rev.get("/review")
    rev.post(action="return", response="1", reason="incomplete", note="say why")
    assert "Nothing to judge" in rev.page
    assert "incomplete: say why" in ann.get("/work")
    ann.post(action="submit", text="It is 42, for 6 tens would be 60.", topic="maths")
    rev.get("/review")
    rev.post(action="accept", response="1")
    assert "Accepted answer" in adj.get("/audit")
    adj.post(action="good")
    assert "Nothing to audit" in adj.page
    adj.get("/dashboard")
    assert adj.page.count("accepted") >= 2
    boss.get("/versions")
    assert "v1" in boss.post("/versions", name="v1")
    lines = boss.get("/versions/v1.jsonl").splitlines()
    example = json.loads(lines[0])
    assert example["messages"][-1]["content"] == "It is 42, for 6 tens would be 60."
    assert example["topic"] == "maths"
    assert example["provenance"]["rounds"] == 2
    assert audit(desk.context.desk.store) == []


def test_drafts_undo_skip_and_taking_back(desk):
    prompts(desk, {"prompt": "One?"}, {"prompt": "Two?"})
    ann = desk.enter("ann")
    first = ann.get("/work")
    draft = re.search(r'data-draft="([^"]+)"', first)[1]
    token = re.search(r'data-csrf="(\w+)"', first)[1]
    for text in ("half", "half a word"):
        done = ann.http.post(draft, json={"text": text}, headers={"x-csrf": token})
        assert done.status_code == 204
    assert ">half a word</textarea>" in ann.get("/work")
    assert ">half</textarea>" in ann.post(action="undo")
    ann.post(action="skip")
    assert "Two?" in ann.page
    ann.post(action="submit", text="The second answer.")
    assert "Take back" in ann.get("/queue")
    assert ">The second answer.</textarea>" in ann.post("/withdraw")


def test_preferences_and_labels_have_their_forms(desk):
    prompts(
        desk, {"prompt": "Rank", "responses": ["one", "two"]}, {"prompt": "Mark", "kind": "label"}
    )
    ann, adj = desk.enter("ann"), desk.enter("adj")
    assert "significantly better" in ann.get("/work")
    assert "not complete" in ann.post(action="submit", edited="three")
    ann.post(action="submit", preference="2", edited="three")
    assert 'name="label"' in ann.page
    ann.post(action="submit", label="unsafe")
    assert "slightly better" in adj.get("/review")
    adj.post(action="escalate", response="1")
    adj.get("/adjudicate")
    adj.post(action="own", preference="-1", edited="four")
    store = desk.context.desk.store
    answers = [row["answer"] for row in store.all("SELECT answer FROM items ORDER BY id")]
    assert json.loads(answers[0])["answer"] == {"preference": -1, "edited": "four"}


def test_who_may_not_does_not_get_in(desk):
    prompts(desk, {"prompt": "One?"})
    url = desk.url
    anyone = httpx.Client(base_url=url)
    assert anyone.get("/health").text == "ok"
    assert anyone.get("/work").headers["location"] == "/login"
    wrong = anyone.post("/login", data={"name": "ann", "password": "no"})
    assert wrong.status_code == 401
    for _ in range(5):
        anyone.post("/login", data={"name": "boss", "password": "no"})
    late = anyone.post("/login", data={"name": "boss", "password": PASSWORD})
    assert late.status_code == 429
    ann = desk.enter("ann")
    for path in ("/review", "/adjudicate", "/audit", "/dashboard", "/versions"):
        assert "is for the role" in ann.get(path, 403)
    assert "no such page" in ann.get("/nothing", 404)
    ann.get("/work")
    assert "another session" in ann.post(action="submit", text="x", csrf="0" * 64, status=403)
    foreign = ann.http.post("/answer/1", data={}, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert ann.http.get("/work", headers={"host": "evil.example"}).status_code == 403
    assert ann.http.post("/login", content=b"x" * (3 << 20)).status_code == 413
    page = ann.http.get("/work")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    cookie = httpx.post(f"{url}/login", data={"name": "ann", "password": PASSWORD})
    assert "HttpOnly" in cookie.headers["set-cookie"]
    assert "SameSite=strict" in cookie.headers["set-cookie"]
    ann.get("/queue")
    ann.post("/logout")
    assert "Password" in ann.get("/work")
    anyone.close()


def test_no_page_asks_for_anything_from_elsewhere(desk):
    prompts(desk, {"prompt": "One?"})
    boss = desk.enter("boss")
    for path in ("/login", "/queue", "/work", "/review", "/dashboard", "/versions",
                 "/static/desk.css", "/static/desk.js"):  # fmt: skip
        text = boss.get(path)
        assert not re.search(r"(?:src|href|action|url)\s*[=(]\s*[\"']?(?:https?:)?//", text), path


def test_an_address_in_use_is_told(desk, tmp_path):
    with pytest.raises(PunaError, match="cannot listen"):
        DeskServer(tmp_path / "desk.db", port=desk.port)


def test_the_commands_serve_and_find_tampering(tmp_path):
    call = [sys.executable, "-m", "puna.cli.main", "annotate"]
    path = tmp_path / "desk.db"
    Store.create(path, RULES.model_dump_json()).close()
    server = subprocess.Popen([*call, "serve", str(path), "--port", "0"], text=True,
                              stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    url = server.stdout.readline().split()[-1]
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            assert "Log in" in httpx.get(f"{url}/login").text
            break
        except httpx.ConnectError:
            time.sleep(0.02)
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=20)
    runner = CliRunner()
    assert runner.invoke(annotate, ["audit", str(path)]).exit_code == 0
    raw = sqlite3.connect(path)
    raw.execute("UPDATE meta SET value = '0' WHERE key = 'seal'")
    raw.commit()
    raw.close()
    done = runner.invoke(annotate, ["audit", str(path)], standalone_mode=False)
    assert done.return_value == 1
    assert "1 problems" in done.output


def test_a_changed_role_ends_the_sessions(desk):
    ann = desk.enter("ann")
    store = desk.context.desk.store
    assert change_user(store, "ann", "reviewer", None).role == "reviewer"
    assert "Password" in ann.get("/queue")
    assert "Review" in desk.enter("ann").page
    change_user(store, "ann", None, False)
    assert "name or password is wrong" in desk.enter("ann").page
    with pytest.raises(PunaError, match="unknown role"):
        change_user(store, "ann", "boss", None)
    assert audit(store) == []
