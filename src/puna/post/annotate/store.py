"""The file of a desk: SQLite in WAL mode, and in it an append-only, hash-chained list of events.

Every change is one transaction that also appends the events that tell of it. One process takes its
write transactions in turn, so that none of its threads waits for SQLite's lock; other processes
wait by the busy timeout.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError

SCHEMA_VERSION = 1
GENESIS = "0" * 64
_BUSY_MS = 30_000

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE users (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, pseudonym TEXT NOT NULL UNIQUE,
  role TEXT NOT NULL, password TEXT NOT NULL, active INTEGER NOT NULL DEFAULT 1,
  cursor INTEGER NOT NULL DEFAULT 0, n_claims INTEGER NOT NULL DEFAULT 0);
CREATE TABLE sessions (
  token TEXT PRIMARY KEY, user INTEGER NOT NULL REFERENCES users, expires_s REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE items (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, batch TEXT NOT NULL,
  content TEXT NOT NULL, sha TEXT NOT NULL, state TEXT NOT NULL, round INTEGER NOT NULL DEFAULT 1,
  overlap INTEGER NOT NULL, n_claimed INTEGER NOT NULL DEFAULT 0,
  n_submitted INTEGER NOT NULL DEFAULT 0, priority INTEGER NOT NULL DEFAULT 0, gold TEXT,
  answer TEXT, posterior REAL, lease_user INTEGER, lease_s REAL NOT NULL DEFAULT 0);
CREATE INDEX items_open ON items (id)
  WHERE state = 'open' AND gold IS NULL AND n_claimed < overlap;
CREATE INDEX items_urgent ON items (id)
  WHERE state = 'open' AND gold IS NULL AND n_claimed < overlap AND priority > 0;
CREATE INDEX items_waiting ON items (state, priority DESC, id)
  WHERE state IN ('review', 'adjudication');
CREATE INDEX items_gold ON items (id) WHERE gold IS NOT NULL;
CREATE INDEX items_batch ON items (batch, state);
CREATE TABLE responses (
  id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items,
  user INTEGER NOT NULL REFERENCES users, state TEXT NOT NULL, content TEXT, sha TEXT,
  text_sha TEXT, vote TEXT, flags TEXT NOT NULL DEFAULT '[]', round INTEGER NOT NULL DEFAULT 1,
  note TEXT NOT NULL DEFAULT '', claimed_s REAL NOT NULL, submitted_s REAL,
  UNIQUE (item, user));
CREATE INDEX responses_user ON responses (user, state);
CREATE INDEX responses_text ON responses (text_sha) WHERE text_sha IS NOT NULL;
CREATE TABLE openings (words TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE drafts (
  id INTEGER PRIMARY KEY, response INTEGER NOT NULL REFERENCES responses, at_s REAL NOT NULL,
  content TEXT NOT NULL);
CREATE INDEX drafts_response ON drafts (response, id);
CREATE TABLE reviews (
  id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items, round INTEGER NOT NULL,
  reviewer INTEGER NOT NULL REFERENCES users, kind TEXT NOT NULL, verdict TEXT NOT NULL,
  reason TEXT, note TEXT NOT NULL DEFAULT '', response INTEGER, at_s REAL NOT NULL);
CREATE INDEX reviews_item ON reviews (item);
CREATE TABLE batches (
  name TEXT PRIMARY KEY, state TEXT NOT NULL, round INTEGER NOT NULL DEFAULT 1) WITHOUT ROWID;
CREATE TABLE audits (
  id INTEGER PRIMARY KEY, batch TEXT NOT NULL, round INTEGER NOT NULL,
  item INTEGER NOT NULL REFERENCES items, auditor INTEGER, is_defect INTEGER, reason TEXT,
  UNIQUE (batch, round, item));
CREATE INDEX audits_open ON audits (batch) WHERE is_defect IS NULL;
CREATE TABLE reliability (
  user INTEGER NOT NULL REFERENCES users, kind TEXT NOT NULL, status TEXT NOT NULL,
  n_votes INTEGER NOT NULL, value REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL,
  n_gold INTEGER NOT NULL, n_right INTEGER NOT NULL, confusion TEXT NOT NULL,
  PRIMARY KEY (user, kind)) WITHOUT ROWID;
CREATE TABLE versions (
  name TEXT PRIMARY KEY, made_s REAL NOT NULL, n_items INTEGER NOT NULL, sha TEXT NOT NULL,
  seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE version_items (
  id INTEGER PRIMARY KEY, version TEXT NOT NULL, item INTEGER NOT NULL, example TEXT NOT NULL);
CREATE INDEX version_items_version ON version_items (version, id);
CREATE TABLE events (
  seq INTEGER PRIMARY KEY, at_s REAL NOT NULL, actor INTEGER, kind TEXT NOT NULL, item INTEGER,
  payload TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL);
CREATE INDEX events_item ON events (item, seq) WHERE item IS NOT NULL;
CREATE TRIGGER events_no_update BEFORE UPDATE ON events
  BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_no_delete BEFORE DELETE ON events
  BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""


def sha_of(text: str) -> str:
    """Return the SHA-256 of a text as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(value: Any) -> str:
    """Write a value the one way in which it is stored and hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def event_hash(
    seq: int, at_s: float, actor: int | None, kind: str, item: int | None, payload: str,
    previous: str,
) -> str:  # fmt: skip
    """Return the link of an event in the chain: it covers the event and the link before it."""
    return sha_of(to_json([seq, at_s, actor, kind, item, payload, previous]))


class Transaction:
    """A write transaction: statements, and events that are appended with them."""

    def __init__(self, connection: sqlite3.Connection, key: bytes) -> None:
        self._connection, self._key = connection, key
        self.now_s = time.time()
        row = connection.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1")
        self._seq, self._hash = row.fetchone() or (0, GENESIS)
        self._first = self._seq

    def run(self, sql: str, *values: Any) -> sqlite3.Cursor:
        """Execute a statement."""
        return self._connection.execute(sql, values)

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """Return the first row of a query."""
        return self._connection.execute(sql, values).fetchone()

    def event(self, kind: str, actor: int | None, item: int | None = None, **payload: Any) -> int:
        """Append an event; return its number."""
        text = to_json(payload)
        seq = self._seq + 1
        link = event_hash(seq, self.now_s, actor, kind, item, text, self._hash)
        self.run("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                 seq, self.now_s, actor, kind, item, text, self._hash, link)  # fmt: skip
        self._seq, self._hash = seq, link
        return seq

    def seal(self) -> None:
        """Note the end of the chain under the key, so that an end cut off is noticed."""
        if self._seq != self._first:
            self.run("INSERT OR REPLACE INTO meta VALUES ('seal', ?)",
                     seal_of(self._key, self._seq, self._hash))  # fmt: skip


def seal_of(key: bytes, seq: int, link: str) -> str:
    """Return what is noted about the last event: nobody without the key can make it."""
    return hmac.new(key, f"{seq}:{link}".encode(), hashlib.sha256).hexdigest()


class Store:
    """An open desk file; may be used by several threads.

    Args:
        path: The file.

    Raises:
        PunaError: It is missing, its key is missing, or another program made it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise PunaError(f"{path}: there is no desk", f"make it: puna annotate init {path}")
        self.key = _read_key(path)
        self._local, self._lock = threading.local(), threading.Lock()
        self._open: list[sqlite3.Connection] = []
        try:
            version = self.meta("schema")
        except sqlite3.DatabaseError as error:
            self.close()
            raise PunaError(f"{path} is not a desk: {error}", "name another file") from error
        if version != str(SCHEMA_VERSION):
            self.close()
            raise PunaError(
                f"{path} has schema {version}, this version reads {SCHEMA_VERSION}",
                "make a new desk and import the exported items",
            )

    @classmethod
    def create(cls, path: Path, rules: str) -> Store:
        """Make a desk file and its key beside it.

        Raises:
            PunaError: The file is there already.
        """
        if path.exists():
            raise PunaError(f"{path} is there already", "choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(key_path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        connection = sqlite3.connect(path)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            values = [("schema", str(SCHEMA_VERSION)), ("rules", rules)]
            connection.executemany("INSERT INTO meta VALUES (?, ?)", values)
            connection.commit()
        finally:
            connection.close()
        store = cls(path)
        with store.write() as tx:
            tx.event("desk.made", None, rules=sha_of(rules))
        return store

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        return connection

    def _connection(self) -> sqlite3.Connection:
        """Return the connection of this thread."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._connect()
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")  # a submitted answer survives
            connection.execute("PRAGMA cache_size = -8192")
            self._local.connection = connection
            self._open.append(connection)
        return connection

    def all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Return the rows of a query."""
        return self._connection().execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """Return the first row of a query."""
        return self._connection().execute(sql, values).fetchone()

    def stream(self, sql: str, *values: Any) -> Iterator[sqlite3.Row]:
        """Yield the rows of a query as they are read, all as they are at the beginning."""
        connection = self._connect()  # of its own: the rows may be read by several threads
        try:
            yield from connection.execute(sql, values)
        finally:
            connection.close()

    def meta(self, key: str) -> str | None:
        """Return a value of the desk."""
        row = self.one("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else str(row["value"])

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        """Run a write transaction; an error undoes all of it."""
        with self._lock:
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                transaction = Transaction(connection, self.key)
                yield transaction
                transaction.seal()
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def close(self) -> None:
        """Close all connections; no thread may use the store any more."""
        for connection in self._open:
            connection.close()
        self._open.clear()
        self._local = threading.local()


def key_path(path: Path) -> Path:
    """Return where the key of a desk stands."""
    return path.with_name(path.name + ".key")


def _read_key(path: Path) -> bytes:
    try:
        return bytes.fromhex(key_path(path).read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise PunaError(
            f"{key_path(path)} is missing or no key: {error}",
            "put back the key file that stood beside the desk",
        ) from error
