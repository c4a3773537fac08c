"""What comes in and what goes out: imports, frozen versions, exports with provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path
from puna.post.annotate.content import read_answer, read_item
from puna.post.annotate.desk import Desk, move
from puna.post.annotate.store import sha_of, to_json
from puna.post.annotate.users import User

FORMATS = ("sft", "preference", "label")
_CHUNK = 2000


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and raw item of each record of a file.

    JSONL of prompts, messages or ranking items; JSON arrays of Label Studio tasks (``data``) or
    Argilla records (``fields``).

    Raises:
        PunaError: The file is missing or no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            records = enumerate(json.loads(text), 1)
        else:
            lines = enumerate(text.splitlines(), 1)
            records = ((n, json.loads(line)) for n, line in lines if line.strip())
        for number, raw in records:
            yield f"{path}:{number}", _unified(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError(f"{path}: {error}", "name a JSON or JSONL file") from error
    except ValueError as error:
        raise PunaError(f"{path} is no JSON: {error}", "write one object per line") from error


def _unified(raw: Any) -> Any:
    """Bring a task of Label Studio or a record of Argilla into our fields."""
    if not isinstance(raw, dict):
        return raw
    fields = raw.get("data") if isinstance(raw.get("data"), dict) else raw.get("fields")
    if not isinstance(fields, dict):
        return raw
    prompt = next((fields[n] for n in ("prompt", "instruction", "question", "text") if n in fields),
                  None)  # fmt: skip
    messages = next((fields[n] for n in ("messages", "chat", "dialogue") if n in fields), None)
    draft = next((fields[n] for n in ("response", "answer", "completion") if n in fields), None)
    pairs = (("response1", "response2"), ("answer1", "answer2"), ("chosen", "rejected"))
    ranked = next(([fields[a], fields[b]] for a, b in pairs if a in fields and b in fields), None)
    key = raw.get("id", raw.get("external_id"))
    unified = {"key": key, "prompt": prompt, "messages": messages, "draft": draft,
               "responses": ranked}  # fmt: skip
    return {name: value for name, value in unified.items() if value is not None}


def import_items(
    desk: Desk, records: Iterable[tuple[str, Any]], batch: str, *, gold: bool = False
) -> tuple[int, int]:
    """Import items.

    Args:
        desk: The desk.
        records: Name and raw item of each.
        batch: Batch that they are audited as.
        gold: Each record has a known answer in ``gold`` and is slipped in among the others.

    Returns:
        How many were new, and how many were there already (same key, else same content).

    Raises:
        PunaError: A record is not as it should be; nothing of its chunk is imported.
    """
    n_new = n_old = 0
    chunk: list[tuple[str, Any]] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == _CHUNK:
            new = _import_chunk(desk, chunk, batch, gold)
            n_new, n_old = n_new + new, n_old + len(chunk) - new
            chunk = []
    new = _import_chunk(desk, chunk, batch, gold)
    return n_new + new, n_old + len(chunk) - new


def _import_chunk(desk: Desk, chunk: list[tuple[str, Any]], batch: str, gold: bool) -> int:
    read = []
    for where, raw in chunk:
        item = read_item(raw, where)
        answer = None
        if gold:
            answer = to_json(read_answer(item["kind"], raw.get("gold"), desk.rules))
        content = to_json(item)
        key = str(raw.get("key") or raw.get("id") or xxhash.xxh3_128_hexdigest(content.encode()))
        read.append((key, item["kind"], content, sha_of(content), answer))
    n_new = 0
    with desk.store.write() as tx:
        if read and not gold:
            tx.run("INSERT OR IGNORE INTO batches (name, state) VALUES (?, 'open')", batch)
            if tx.one("SELECT 1 FROM batches WHERE name = ? AND state = 'audit'", batch):
                raise PunaError(f"batch {batch!r} is being audited", "name another batch")
            tx.run("UPDATE batches SET state = 'open', round = round + 1 WHERE name = ?"
                   " AND state = 'accepted'", batch)  # fmt: skip
        for key, kind, content, sha, answer in read:
            made = tx.run(
                "INSERT OR IGNORE INTO items (key, kind, batch, content, sha, state, overlap, gold)"
                " VALUES (?, ?, ?, ?, ?, 'open', ?, ?)",
                key, kind, "gold" if gold else batch, content, sha, desk.rules.overlap, answer,
            )  # fmt: skip
            if made.rowcount:
                n_new += 1
                tx.event("imported", None, made.lastrowid, key=key, sha=sha, batch=batch,
                         gold=None if answer is None else sha_of(answer))  # fmt: skip
    return n_new


def freeze(desk: Desk, user: User | None, name: str) -> int:
    """Freeze all accepted items of accepted batches into a version; return their number.

    Raises:
        PunaError: The version is there, or there is nothing to freeze.
    """
    with desk.store.write() as tx:
        if tx.one("SELECT 1 FROM versions WHERE name = ?", name):
            raise PunaError(f"version {name!r} is there already", "choose another name")
        rows = tx.run(
            "SELECT i.* FROM items i JOIN batches b ON b.name = i.batch WHERE i.gold IS NULL AND"
            " i.state = 'accepted' AND b.state = 'accepted' ORDER BY i.id"
        ).fetchall()  # fmt: skip
        if not rows:
            raise PunaError(
                "no item is accepted in a batch that passed its audit",
                "see the batches: puna annotate report DESK",
            )
        digest = hashlib.sha256()
        for row in rows:
            example = to_json(_example(desk, row))
            digest.update(example.encode() + b"\n")
            tx.run("INSERT INTO version_items (version, item, example) VALUES (?, ?, ?)", name,
                   row["id"], example)  # fmt: skip
            move(tx, row, "frozen", None if user is None else user.id, version=name)
        seq = tx.event("version.frozen", None if user is None else user.id, name=name,
                       n_items=len(rows), sha=digest.hexdigest())  # fmt: skip
        tx.run("INSERT INTO versions VALUES (?, ?, ?, ?, ?)", name, tx.now_s, len(rows),
               digest.hexdigest(), seq)  # fmt: skip
    return len(rows)


def _example(desk: Desk, row: Any) -> dict[str, Any]:
    """Return an accepted item as an example with its provenance."""
    content, final = json.loads(row["content"]), json.loads(row["answer"])
    people = desk.store.all(
        "SELECT r.id, r.vote, r.round, u.pseudonym, q.value FROM responses r"
        " JOIN users u ON u.id = r.user LEFT JOIN reliability q ON q.user = r.user AND q.kind = ?"
        " WHERE r.item = ? AND r.state = 'submitted' ORDER BY r.id", row["kind"], row["id"],
    )  # fmt: skip
    reviews = desk.store.all(
        "SELECT v.round, v.kind, v.verdict, v.reason, u.pseudonym FROM reviews v"
        " JOIN users u ON u.id = v.reviewer WHERE v.item = ? ORDER BY v.id", row["id"],
    )  # fmt: skip
    author = next((one["pseudonym"] for one in people if one["id"] == final["response"]), None)
    if author is None and reviews:
        author = reviews[-1]["pseudonym"]
    drawn = xxhash.xxh3_64_intdigest(f"heldout:{row['key']}".encode()) / 2**64
    is_heldout = drawn < desk.rules.heldout_share
    return {
        "id": xxhash.xxh3_128_hexdigest(row["key"].encode()),
        "document_id": content.get("document_id", row["key"]),
        "source": content.get("source", row["batch"]),
        "split": content.get("split") or ("heldout" if is_heldout else "train"),
        "kind": row["kind"],
        "content": content,
        "answer": final["answer"],
        "provenance": {
            "item": row["key"], "batch": row["batch"], "rounds": row["round"], "author": author,
            "posterior": row["posterior"],
            "annotators": [
                {"who": one["pseudonym"], "vote": one["vote"], "round": one["round"],
                 "informedness": None if one["value"] is None else round(one["value"], 4)}
                for one in people
            ],
            "reviews": [
                {"who": one["pseudonym"], "round": one["round"], "stage": one["kind"],
                 "verdict": one["verdict"], "reason": one["reason"]}
                for one in reviews
            ],
        },
    }  # fmt: skip


def examples(desk: Desk, version: str, form: str) -> Iterator[dict[str, Any]]:
    """Yield the examples of a version, one after the other.

    Args:
        desk: The desk.
        version: Its name.
        form: ``sft`` (conversations, as ``post.sft`` reads them), ``preference`` (prompt, chosen,
            rejected) or ``label``.

    Raises:
        PunaError: There is no such version or form.
    """
    if form not in FORMATS:
        raise PunaError(f"format {form!r} is unknown", f"choose one of {', '.join(FORMATS)}")
    if desk.store.one("SELECT 1 FROM versions WHERE name = ?", version) is None:
        raise PunaError(f"there is no version {version!r}", "see: puna annotate report DESK")
    rows = desk.store.stream("SELECT example FROM version_items WHERE version = ? ORDER BY id",
                             version)  # fmt: skip
    for row in rows:
        made = _in_form(json.loads(row["example"]), form)
        if made is not None:
            yield made


def _in_form(example: dict[str, Any], form: str) -> dict[str, Any] | None:
    content, answer = example.pop("content"), example.pop("answer")
    marks = {name: answer[name] for name in ("safety", "topic") if name in answer}
    kind, messages = example["kind"], content["messages"]

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    if form == "label":
        return {**example, "messages": messages, "label": answer["label"], **marks} if (
            kind == "label"
        ) else None  # fmt: skip
    if kind == "write" and form == "sft":
        return {**example, "messages": messages + said(answer["text"]), **marks}
    if kind != "rank":
        return None
    degree = answer["preference"]
    rejected, chosen = content["responses"] if degree > 0 else reversed(content["responses"])
    best = answer.get("edited", chosen)
    if form == "sft":
        return {**example, "messages": messages + said(best), **marks}
    made = {**example, "prompt": messages, "chosen": said(chosen), "rejected": said(rejected),
            "degree": abs(degree), **marks}  # fmt: skip
    if "edited" in answer:  # edited > chosen > rejected
        made["edited"] = said(best)
    return made


def write_export(made: Iterable[dict[str, Any]], path: Path) -> int:
    """Write examples as they come to ``.jsonl`` or ``.parquet``; return their number.

    Raises:
        PunaError: The name ends otherwise.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise PunaError(f"{path}: the name must end in .jsonl or .parquet", "choose one of them")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            return _write_parquet(made, temporary)
        n = 0
        with temporary.open("w", encoding="utf-8") as file:
            for one in made:
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
                n += 1
        return n


def _write_parquet(made: Iterable[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    names = ("id", "document_id", "source", "split", "kind", "safety", "topic", "label")
    schema = pa.schema(
        [(name, pa.string()) for name in names]
        + [(name, turn) for name in ("messages", "prompt", "chosen", "rejected", "edited")]
        + [("degree", pa.int8()), ("provenance", pa.string())]
    )
    n, rows = 0, []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for one in made:
            rows.append({**one, "provenance": to_json(one["provenance"])})
            if len(rows) == _CHUNK:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                n, rows = n + len(rows), []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return n + len(rows)
