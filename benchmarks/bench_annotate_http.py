"""The desk under eight annotators over real HTTP, with 100,000 items; its export and its audit.

    python benchmarks/bench_annotate_http.py [--items 100000] [--each 150]

Server and annotators run on the same machine, so the figures contain the work of the clients. Every
answer passes the real checks, and every transaction reaches the disk before it is answered.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode

import numpy as np

from puna.post.annotate import acceptance
from puna.post.annotate.audit import audit
from puna.post.annotate.desk import Desk, accept
from puna.post.annotate.exchange import examples, freeze, import_items, write_export
from puna.post.annotate.settings import Rules
from puna.post.annotate.store import Store, sha_of, to_json
from puna.post.annotate.users import User, add_user

T = TypeVar("T")
PASSWORD = "a long password"
N_ANNOTATORS = 8
SENTENCE = (
    "the answer depends on how much water is in the pot and on the height of the place above the"
    " sea because the air is thinner there"
)
WORDS = SENTENCE.split()


class Browser:
    """Keeps a connection and a session, and the seconds of each kind of request."""

    def __init__(self, port: int, name: str) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.seconds: dict[str, list[float]] = {}
        self.statuses: Counter[int] = Counter()
        self._cookie = ""
        self.request("log in", "/login", {"name": name, "password": PASSWORD})

    def request(self, kind: str, path: str, form: dict[str, str] | None = None) -> str:
        """Send a request, note how long it took, and return the page."""
        start_s = time.perf_counter()
        headers = {"cookie": self._cookie}
        if form is None:
            self._http.request("GET", path, headers=headers)
        else:
            headers["content-type"] = "application/x-www-form-urlencoded"
            self._http.request("POST", path, urlencode(form), headers)
        response = self._http.getresponse()
        body = response.read().decode()
        self.seconds.setdefault(kind, []).append(time.perf_counter() - start_s)
        self.statuses[response.status] += 1
        cookie = response.getheader("set-cookie")
        if cookie:
            self._cookie = cookie.partition(";")[0]
        return body

    def annotate(self, n_items: int, seed: int) -> None:
        """Fetch an item, save a draft, hand it in, and so on."""
        rng = np.random.default_rng(seed)
        for number in range(n_items):
            page = self.request("queue fetch", "/work")
            path = re.search(r'action="(/answer/\d+)"', page)
            token = re.search(r'data-csrf="(\w+)"', page)
            assert path is not None, page[:2000]
            assert token is not None
            text = f"{seed}-{number}: " + " ".join(rng.choice(WORDS, 60))
            form = {"csrf": token[1], "text": text}
            self.request("draft", path[1] + "/draft", {**form, "text": text[:100]})
            self.request("submit", path[1], {**form, "action": "submit"})


def timed(what: str, call: Callable[[], T]) -> T:
    start_s = time.perf_counter()
    done = call()
    print(f"{what:<44}{time.perf_counter() - start_s:8.2f} s", flush=True)
    return done


def first_page(path: Path) -> tuple[subprocess.Popen[str], int, float]:
    """Start the server; return it, its port, and the seconds until its first page."""
    start_s = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "puna.cli.main", "annotate", "serve", str(path), "--port", "0"],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert server.stdout is not None
    port = int(server.stdout.readline().rstrip().rpartition(":")[2])
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/login")
            if connection.getresponse().status == 200:
                return server, port, time.perf_counter() - start_s
        except ConnectionError:
            time.sleep(0.005)
        finally:
            connection.close()


def run_http(port: int, n_each: int) -> None:
    """Let eight annotators work at once, and print what they waited for."""
    browsers = [Browser(port, f"p{i}") for i in range(N_ANNOTATORS)]
    warm = browsers[0]
    warm.annotate(1, 999)  # the first answer waits until the compiled checks are loaded
    print(f"first answer, with its checks loaded: {warm.seconds['submit'][0]:.2f} s")
    warm.seconds.clear()
    threads = [
        threading.Thread(target=one.annotate, args=(n_each, seed))
        for seed, one in enumerate(browsers)
    ]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent_s = time.perf_counter() - start_s
    print(f"{N_ANNOTATORS} annotators at once, no pause for thought: "
          f"{N_ANNOTATORS * n_each / spent_s:.0f} answers/s")  # fmt: skip
    for kind in ("queue fetch", "draft", "submit"):
        values = 1e3 * np.concatenate([one.seconds[kind] for one in browsers])
        p50, p95, p99 = np.percentile(values, [50, 95, 99])
        print(f"  {kind:<12} p50 {p50:6.1f} ms  p95 {p95:6.1f} ms  p99 {p99:6.1f} ms  "
              f"longest {values.max():6.1f} ms", flush=True)  # fmt: skip
    statuses = sum((one.statuses for one in browsers), Counter())
    bad = {status: n for status, n in statuses.items() if status >= 400}
    print(f"  {statuses.total()} requests, errors: {bad or 'none'}")


def accept_all(desk: Desk, author: User) -> None:
    """Answer and accept what is left, without HTTP, many in a transaction."""
    while rows := desk.store.all("SELECT * FROM items WHERE state IN ('open', 'review')"
                                 " LIMIT 5000"):  # fmt: skip
        with desk.store.write() as tx:
            for row in rows:
                found = tx.one("SELECT id FROM responses WHERE item = ? AND content IS NOT NULL",
                               row["id"])  # fmt: skip
                response = found["id"] if found is not None else None
                if response is None:
                    text = to_json({"text": f"Answer {row['id']}: " + " ".join(WORDS * 3)})
                    response = tx.run(
                        "INSERT OR REPLACE INTO responses (item, user, state, content, sha,"
                        " claimed_s, submitted_s) VALUES (?, ?, 'submitted', ?, ?, ?, ?)",
                        row["id"], author.id, text, sha_of(text), tx.now_s, tx.now_s,
                    ).lastrowid  # fmt: skip
                    tx.event("submitted", author.id, row["id"], response=response,
                             sha=sha_of(text), round=1, flags=[])  # fmt: skip
                accept(tx, row, response, None)


def audit_batch(desk: Desk, auditor: User) -> None:
    """Look at the sample of the batch and find nothing wrong."""
    acceptance.draw_audits(desk)
    while (found := acceptance.next_audit(desk, auditor)) is not None:
        acceptance.record_audit(desk, auditor, found[0], False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--each", type=int, default=150)
    given = parser.parse_args()
    print(
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, nice {os.nice(0)}"
    )
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "desk.db"
        Store.create(path, Rules(gold_rate=0.0).model_dump_json()).close()
        desk = Desk.open(path)
        people = [add_user(desk.store, f"p{i}", "annotator", PASSWORD) for i in range(8)]
        boss = add_user(desk.store, "boss", "admin", PASSWORD)
        records = ((f"r{i}", {"prompt": f"Question {i}: how long does water take to boil?"})
                   for i in range(given.items))  # fmt: skip
        timed(f"import of {given.items:,} items", lambda: import_items(desk, records, "b"))
        server, port, seconds = first_page(path)
        print(f"{'from the command to the first page':<44}{seconds:8.2f} s")
        try:
            run_http(port, given.each)
        finally:
            server.terminate()
            server.wait(30)
        accept_all(desk, people[0])
        audit_batch(desk, boss)
        timed("freezing a version", lambda: freeze(desk, boss, "v1"))
        for suffix in ("jsonl", "parquet"):
            out = Path(name) / f"v1.{suffix}"
            n = timed(f"export, {suffix}", lambda out=out: write_export(
                examples(desk, "v1", "sft"), out))  # fmt: skip
            print(f"  {n:,} examples, {out.stat().st_size / 1e6:.0f} MB")
        problems = timed("audit of the chain and the tables", lambda: audit(desk.store))
        n_events = desk.store.one("SELECT count(*) AS n FROM events")
        print(f"  {n_events['n']:,} events, {len(problems)} problems, "
              f"{path.stat().st_size / 1e6:.0f} MB")  # fmt: skip
        desk.close()


if __name__ == "__main__":
    main()
