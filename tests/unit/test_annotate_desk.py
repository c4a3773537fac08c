"""The desk: queue, drafts, checks, gate, blind review, audits, versions, tampering."""

import json
import sqlite3
import threading
from collections import Counter

import pytest

from puna.core.errors import PunaError
from puna.post.annotate import acceptance, dashboard, judge, reliability
from puna.post.annotate.audit import audit, head_of, read_anchor
from puna.post.annotate.desk import Desk
from puna.post.annotate.exchange import (
    examples,
    freeze,
    import_items,
    read_records,
    write_export,
)
from puna.post.annotate.judge import Verdict
from puna.post.annotate.settings import Rules
from puna.post.annotate.store import Store, key_path
from puna.post.annotate.users import User, add_user, csrf_of, get_user, log_in, log_out, who
from puna.post.pairs import read_pairs

argon2 = pytest.importorskip("argon2", reason="the extra `annotate`")
PASSWORD = "a long password"


@pytest.fixture
def open_desk(tmp_path, monkeypatch):
    """Make a desk with rules and people; closed at the end."""
    monkeypatch.setattr(  # the real parameters take 40 ms per hash
        "argon2.PasswordHasher.__init__.__defaults__", (1, 8, 1, 16, 16, "utf-8", argon2.Type.ID)
    )
    opened = []

    def make(people=("ann", "bob", "cyd"), roles=(), **rules):
        rules.setdefault("gold_rate", 0.0)
        rules.setdefault("checks", {"pii": False})
        store = Store.create(tmp_path / "desk.db", Rules(**rules).model_dump_json())
        desk = Desk(store)
        opened.append(desk)
        made = [add_user(store, name, "annotator", PASSWORD) for name in people]
        made += [add_user(store, role, role, PASSWORD) for role in roles]
        return desk, *made

    yield make
    for desk in opened:
        desk.close()


def prompts(desk, n, batch="b", **fields):
    records = [(f"r{i}", {"prompt": f"Question {i}?", "key": f"k{i}", **fields}) for i in range(n)]
    return import_items(desk, records, batch)


def state_of(desk, item=1):
    return desk.store.one("SELECT state FROM items WHERE id = ?", item)["state"]


def write(desk, user, text):
    task = desk.next_task(user)
    return desk.submit(user, task.response, {"text": text})


def test_nobody_gets_an_item_twice_and_no_item_goes_beyond_its_overlap(open_desk):
    desk, *people = open_desk(people=[f"p{i}" for i in range(6)], overlap=2, max_overlap=2)
    prompts(desk, 40, kind="label")
    handed: list[tuple[int, int]] = []

    def work(user):
        while (task := desk.next_task(user)) is not None:
            handed.append((task.item, user.id))
            desk.submit(user, task.response, {"label": "safe"})

    threads = [threading.Thread(target=work, args=(user,)) for user in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handed) == len(set(handed)) == 80
    assert set(Counter(item for item, _ in handed).values()) == {2}
    assert audit(desk.store) == []


def test_a_new_item_is_the_one_in_work_until_it_is_handed_in(open_desk):
    desk, ann, *_ = open_desk()
    prompts(desk, 2)
    task = desk.next_task(ann)
    assert desk.next_task(ann) == task
    desk.skip(ann, task.response, "not for me")
    other = desk.next_task(ann)
    assert other.item != task.item
    with pytest.raises(PunaError, match="not in your hands"):
        desk.submit(ann, task.response, {"text": "too late"})


def test_drafts_are_kept_and_undone(open_desk):
    desk, ann, bob, _ = open_desk()
    prompts(desk, 1)
    task = desk.next_task(ann)
    for text in ("one", "two", "two"):
        desk.save_draft(ann, task.response, {"text": text})
    assert desk.next_task(ann).draft == {"text": "two"}
    assert desk.undo_draft(ann, task.response).draft == {"text": "one"}
    assert desk.undo_draft(ann, task.response).draft is None
    with pytest.raises(PunaError, match="not in your hands"):
        desk.save_draft(bob, task.response, {"text": "mine"})


def test_claims_that_nobody_began_go_to_others(open_desk):
    desk, ann, bob, _ = open_desk(claim_s=1e-9)
    prompts(desk, 1)
    first = desk.next_task(ann)
    assert desk.next_task(bob) is None
    assert desk.release_stale() == 1
    assert desk.next_task(bob).item == first.item


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no", "length.short"),
        ("x" * 301, "length.long"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("Here you are:\n```python\nprint(1)", "format.fence"),
        ("Sure. <|eot_id|> more", "format.special"),
        ("question 0", "format.echo"),
        ("Das ist eine Antwort in einer ganz anderen Sprache als verlangt wurde.", "language"),
        ("Write to jane.doe@gmail.com and she will answer you.", "pii"),
        ("Natalia sold clips to forty eight of her friends in April and then half as many in May.",
         "contamination"),
    ],
)  # fmt: skip
def test_checks_send_back_what_they_find(open_desk, tmp_path, text, code):
    held_out = tmp_path / "gsm.jsonl"
    question = "Natalia sold clips to forty-eight of her friends in April, and then half as many"
    held_out.write_text(json.dumps({"question": question}) + "\n")
    rules = {"min_chars": 5, "max_chars": 300, "language": "en", "contamination": [str(held_out)]}
    desk, ann, *_ = open_desk(checks=rules)
    prompts(desk, 1)
    done = write(desk, ann, text)
    assert not done.accepted
    assert code in {one.code for one in done.findings}
    assert state_of(desk) == "open"
    assert desk.next_task(ann).draft == {"text": text}
    assert write(desk, ann, "The answer is that it depends on the question.").accepted
    assert state_of(desk) == "review"


def test_worn_phrases_and_openings_are_only_told(open_desk):
    desk, ann, *_ = open_desk()
    prompts(desk, 2)
    with desk.store.write() as tx:
        tx.run("INSERT INTO openings VALUES ('', 300), ('well this is', 40)")
    done = write(desk, ann, "Well, this is so. I hope this helps!")
    assert done.accepted
    assert {one.code for one in done.findings} == {"phrase", "opening"}


def test_the_same_text_for_two_items_is_refused(open_desk):
    desk, ann, bob, _ = open_desk()
    prompts(desk, 2)
    assert write(desk, ann, "All the same to me.").accepted
    done = write(desk, bob, "all the SAME, to me")
    assert [one.code for one in done.findings] == ["duplicate"]


def test_votes_that_differ_get_more_annotators_and_then_a_judge(open_desk):
    desk, *people, judge_user = open_desk(
        people=["a", "b", "c"], roles=["adjudicator"], overlap=2, max_overlap=3,
        labels=("x", "y", "z"), review_share=0.0,
    )  # fmt: skip
    prompts(desk, 3, kind="label")
    given = {1: "xyz", 2: "xx", 3: "xyx"}
    for user, at in zip(people, range(3), strict=True):
        while (task := desk.next_task(user)) is not None:
            if at >= len(given[task.item]):
                desk.skip(user, task.response)
                continue
            desk.submit(user, task.response, {"label": given[task.item][at]})
    assert [state_of(desk, item) for item in (1, 2, 3)] == [
        "adjudication", "accepted", "adjudication",
    ]  # fmt: skip
    case = judge.next_case(desk, judge_user, "adjudication")
    assert {one["answer"]["label"] for one in case.responses} == {"x", "y", "z"}
    own = Verdict("accept", answer={"label": "y"}, note="seen closely")
    judge.judge(desk, judge_user, case.item, own)
    stored = desk.store.one("SELECT answer FROM items WHERE id = 1")["answer"]
    assert json.loads(stored)["answer"] == {"label": "y"}
    assert audit(desk.store) == []


def test_review_is_blind_never_by_the_author_and_returns_with_a_reason(open_desk):
    desk, ann, _, _, rev = open_desk(roles=["reviewer"], max_rounds=2)
    prompts(desk, 2)
    assert write(desk, ann, "A first try.").accepted
    assert write(desk, rev, "The reviewer wrote this one.").accepted
    case = judge.next_case(desk, rev)
    assert case.item == 1
    assert "ann" not in json.dumps([case.responses, case.history, case.content])
    with pytest.raises(PunaError, match="response of your own"):
        judge.judge(desk, rev, 2, Verdict("accept", 2))
    with pytest.raises(PunaError, match="reviewer is needed"):
        judge.next_case(desk, ann)
    with pytest.raises(PunaError, match="reason None is unknown"):
        judge.judge(desk, rev, 1, Verdict("return", 1))
    judge.judge(desk, rev, 1, Verdict("return", 1, "incomplete", "say why"))
    task = desk.next_task(ann)
    assert (task.note, task.round, task.draft) == (
        "incomplete: say why", 2, {"text": "A first try."},
    )  # fmt: skip
    assert desk.submit(ann, task.response, {"text": "A better try, because of this."}).accepted
    judge.judge(desk, rev, 1, Verdict("return", 1, "style"))
    assert state_of(desk) == "adjudication"  # after as many rounds as the rules allow


def test_two_reviewers_do_not_judge_the_same_item(open_desk):
    desk, ann, _, _, rev, other = open_desk(roles=["reviewer", "admin"])
    prompts(desk, 1)
    write(desk, ann, "Only one text.")
    assert judge.next_case(desk, rev).item == 1
    assert judge.next_case(desk, rev).item == 1
    assert judge.next_case(desk, other) is None
    with pytest.raises(PunaError, match="somebody else"):
        judge.judge(desk, other, 1, Verdict("accept", 1))


def test_a_submission_can_be_taken_back_until_somebody_looks(open_desk):
    desk, ann, _, _, rev = open_desk(roles=["reviewer"])
    prompts(desk, 1)
    write(desk, ann, "Too early.")
    response = desk.withdraw(ann)
    assert desk.task(ann, response).draft == {"text": "Too early."}
    assert state_of(desk) == "open"
    write(desk, ann, "Now it is good.")
    judge.next_case(desk, rev)
    assert desk.withdraw(ann) is None
    assert audit(desk.store) == []


def test_gold_and_votes_find_a_spammer_who_gets_no_more_items(open_desk):
    names = [f"p{i}" for i in range(5)]
    desk, *people = open_desk(
        people=names, overlap=3, max_overlap=5, gold_rate=0.3, min_votes=20, labels=("x", "y"),
        review_share=0.0,
    )  # fmt: skip
    prompts(desk, 60, kind="label")
    gold = [(f"g{i}", {"prompt": f"Gold {i}", "kind": "label", "gold": {"label": "xy"[i % 2]}})
            for i in range(30)]  # fmt: skip
    assert import_items(desk, gold, "any", gold=True) == (30, 0)
    for _ in range(45):
        for user in people:
            task = desk.next_task(user)
            if task is None:
                continue
            right = "xy"[task.item % 2] if task.item <= 60 else "xy"[(task.item - 61) % 2]
            desk.submit(user, task.response, {"label": "x" if user is people[4] else right})
    found = {one.user: one for one in reliability.refresh(desk)}
    spammer = found.pop(people[4].id)
    assert spammer.status == "spam"
    assert {one.status for one in found.values()} == {"trusted"}
    assert spammer.n_right < spammer.n_gold
    assert all(one.n_right == one.n_gold > 5 for one in found.values())
    assert desk.next_task(people[4]) is None
    assert audit(desk.store) == []


def test_a_doubtful_annotator_gets_company(open_desk):
    desk, *people = open_desk(
        people=["a", "b", "c"], overlap=2, labels=("x", "y"), min_votes=10, spam=0.0, trust=0.9
    )
    prompts(desk, 30, kind="label")
    for user in people[:2]:
        for _ in range(15):
            desk.submit(user, (task := desk.next_task(user)).response,
                        {"label": "xy"[task.item % 2]})  # fmt: skip
    assert {one.status for one in reliability.refresh(desk)} == {"doubtful"}
    rows = desk.store.all("SELECT overlap, state FROM items WHERE priority = 1")
    assert {(row["overlap"], row["state"]) for row in rows} == {(3, "open")}
    assert len(rows) == 15
    assert desk.next_task(people[2]).item == rows[0]["overlap"] - 2  # the first urgent one


def accepted_desk(open_desk, n, **rules):
    desk, ann, _, _, rev, adj = open_desk(roles=["reviewer", "adjudicator"], **rules)
    prompts(desk, n)
    for item in range(n):
        write(desk, ann, f"Text number {item} is this.")
        case = judge.next_case(desk, rev)
        judge.judge(desk, rev, case.item, Verdict("accept", case.responses[0]["id"]))
    return desk, rev, adj


def test_a_batch_passes_only_when_its_audit_bounds_its_defects(open_desk):
    desk, rev, adj = accepted_desk(open_desk, 12, defect_limit=0.3, audit_defects=0)
    assert acceptance.draw_audits(desk) == ["b"]
    assert acceptance.draw_audits(desk) == []
    assert acceptance.next_audit(desk, rev) is None  # reviewed them all
    lot, n = None, 0
    while (found := acceptance.next_audit(desk, adj)) is not None:
        number, case, answer = found
        assert answer == case.responses[0]["answer"]
        lot = acceptance.record_audit(desk, adj, number, n < 2, "factual" if n < 2 else None)
        n += 1
    assert (lot.n_audited, lot.n_defects, lot.accepted) == (9, 2, False)
    states = Counter(row["state"] for row in desk.store.all("SELECT state FROM items"))
    assert states == {"review": 12}
    with pytest.raises(PunaError, match="no item is accepted"):
        freeze(desk, None, "v1")
    assert audit(desk.store) == []


def test_a_version_is_frozen_and_exported_for_fine_tuning(open_desk, tmp_path):
    desk, _, adj = accepted_desk(open_desk, 5, defect_limit=0.5, audit_defects=0)
    acceptance.draw_audits(desk)
    while (found := acceptance.next_audit(desk, adj)) is not None:
        acceptance.record_audit(desk, adj, found[0], False)
    assert freeze(desk, adj, "v1") == 5
    path = tmp_path / "out" / "v1.jsonl"
    assert write_export(examples(desk, "v1", "sft"), path) == 5
    pairs = read_pairs(path, "train")
    assert pairs[0]["messages"][-1] == {"role": "assistant", "content": "Text number 0 is this."}
    told = pairs[0]["provenance"]
    assert told["author"].startswith("a-")
    assert told["reviews"][0]["verdict"] == "accept"
    assert told["annotators"][0]["who"] == told["author"]
    assert not {"ann", "reviewer"} & {one["who"] for one in told["reviews"]}
    assert write_export(examples(desk, "v1", "sft"), tmp_path / "v1.parquet") == 5
    with pytest.raises(PunaError, match=r"\.jsonl or \.parquet"):
        write_export([], tmp_path / "v1.csv")
    with pytest.raises(PunaError, match="no version"):
        list(examples(desk, "v2", "sft"))
    assert audit(desk.store, (head_of(desk.store),)) == []


def test_preferences_with_degree_and_edited_answer(open_desk, tmp_path):
    desk, ann, _, _, rev, adj = open_desk(roles=["reviewer", "adjudicator"])
    import_items(desk, [("r", {"prompt": "Why?", "responses": ["Bad.", "Good."]})], "b")
    task = desk.next_task(ann)
    with pytest.raises(PunaError, match="preference 0"):
        desk.submit(ann, task.response, {"preference": 0})
    desk.submit(ann, task.response, {"preference": 3, "edited": "Good, and here is why."})
    judge.judge(desk, rev, 1, Verdict("accept", 1))
    acceptance.draw_audits(desk)
    acceptance.record_audit(desk, adj, acceptance.next_audit(desk, adj)[0], False)
    freeze(desk, None, "v1")
    made = next(examples(desk, "v1", "preference"))
    assert made["chosen"][0]["content"] == "Good."
    assert made["rejected"][0]["content"] == "Bad."
    assert made["edited"][0]["content"] == "Good, and here is why."
    assert made["degree"] == 3
    sft = next(examples(desk, "v1", "sft"))
    assert sft["messages"][-1]["content"] == "Good, and here is why."
    assert write_export(examples(desk, "v1", "preference"), tmp_path / "v1.parquet") == 1


TAMPERINGS = {
    "changed payload": "UPDATE events SET payload = replace(payload, ':', ': ') WHERE seq = 6",
    "changed actor": "UPDATE events SET actor = 1 WHERE seq = 7",
    "changed time": "UPDATE events SET at_s = at_s + 1 WHERE seq = 8",
    "removed": "DELETE FROM events WHERE seq = 9",
    "removed at the end": "DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)",
    "reordered": "UPDATE events SET seq = CASE seq WHEN 10 THEN 1000 ELSE 10 END"
                 " WHERE seq IN (10, 11)",
    "changed answer": "UPDATE responses SET content = '{\"text\":\"other\"}' WHERE id = 1",
    "changed state": "UPDATE items SET state = 'open' WHERE id = 2",
    "changed prompt": "UPDATE items SET content = replace(content, 'Question', 'q') WHERE id = 1",
    "accepted answer": "UPDATE items SET answer = replace(answer, 'Text', 'T') WHERE id = 1",
    "role": "UPDATE users SET role = 'admin' WHERE name = 'ann'",
    "removed review": "DELETE FROM reviews WHERE id = 1",
}  # fmt: skip


@pytest.mark.parametrize("sql", TAMPERINGS.values(), ids=TAMPERINGS)
def test_tampering_is_found(open_desk, sql):
    desk, *_ = accepted_desk(open_desk, 2)
    assert audit(desk.store) == []
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), desk.store.write() as tx:
        tx.run("DELETE FROM events WHERE seq = 3")
    raw = sqlite3.connect(desk.store.path)
    raw.execute("DROP TRIGGER events_no_update")
    raw.execute("DROP TRIGGER events_no_delete")
    if "WHEN 10" in sql:
        raw.execute("UPDATE events SET seq = -1 WHERE seq = 10")
        raw.execute("UPDATE events SET seq = 10 WHERE seq = 11")
        sql = "UPDATE events SET seq = 11 WHERE seq = -1"
    raw.execute(sql)
    raw.commit()
    raw.close()
    assert audit(desk.store)


def test_every_changed_byte_of_every_event_is_found(open_desk):
    desk, *_ = accepted_desk(open_desk, 1)
    n = head_of(desk.store).seq
    raw = sqlite3.connect(desk.store.path, isolation_level=None)
    raw.execute("DROP TRIGGER events_no_update")
    for seq in range(1, n + 1):
        for column in ("at_s", "kind", "payload", "previous", "hash", "actor", "item"):
            (old,) = raw.execute(f"SELECT {column} FROM events WHERE seq = {seq}").fetchone()
            new = old[:-1] + "~" if isinstance(old, str) else (old or 0) + 1
            raw.execute(f"UPDATE events SET {column} = ? WHERE seq = ?", (new, seq))
            assert audit(desk.store), (seq, column)
            raw.execute(f"UPDATE events SET {column} = ? WHERE seq = ?", (old, seq))
    raw.close()
    assert audit(desk.store) == []


def test_a_chain_made_anew_fits_neither_the_seal_nor_an_anchor(open_desk):
    desk, *_ = accepted_desk(open_desk, 1)
    anchor = head_of(desk.store)
    raw = sqlite3.connect(desk.store.path, isolation_level=None)
    raw.execute("DROP TRIGGER events_no_delete")
    raw.execute(f"DELETE FROM events WHERE seq = {anchor.seq}")
    with desk.store.write() as tx:  # another end, sealed by the desk itself
        tx.event("moved", None, 1, to="accepted", round=1)
    raw.close()
    assert [one for one in audit(desk.store, (anchor,)) if "written down" in one.what]
    assert read_anchor(f"{anchor.seq}:{anchor.hash}") == anchor
    with pytest.raises(PunaError, match="NUMBER:HASH"):
        read_anchor("12")


def test_passwords_sessions_and_names(open_desk):
    desk, ann, *_ = open_desk()
    store = desk.store
    assert log_in(store, "ann", "wrong password") is None
    assert log_in(store, "nobody", PASSWORD) is None
    token = log_in(store, "ann", PASSWORD)
    assert who(store, token) == ann == get_user(store, "ann")
    assert isinstance(ann, User)
    assert len(csrf_of(store, token)) == 64
    kept = store.one("SELECT password, (SELECT token FROM sessions) AS token FROM users")
    assert kept["password"].startswith("$argon2id$")
    assert kept["token"] != token
    log_out(store, token)
    assert who(store, token) is None
    for name, role, password, words in (
        ("ann", "annotator", PASSWORD, "there already"), ("x y", "annotator", PASSWORD, "allowed"),
        ("eve", "boss", PASSWORD, "unknown role"), ("eve", "admin", "short", "fewer than 8"),
    ):  # fmt: skip
        with pytest.raises(PunaError, match=words):
            add_user(store, name, role, password)


def test_imports_of_other_tools(open_desk, tmp_path):
    desk, *_ = open_desk()
    studio = tmp_path / "studio.json"
    studio.write_text(json.dumps([{"id": 7, "data": {"text": "Label me"}}]))
    argilla = tmp_path / "argilla.jsonl"
    argilla.write_text(json.dumps(
        {"id": "x", "fields": {"instruction": "Say hi", "response1": "hi", "response2": "ho"}}
    ))  # fmt: skip
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
    chat.write_text(json.dumps({"messages": turns}) + "\n\n")
    for path in (studio, argilla, chat):
        assert import_items(desk, read_records(path), path.stem) == (1, 0)
        assert import_items(desk, read_records(path), path.stem) == (0, 1)
    kinds = [row["kind"] for row in desk.store.all("SELECT kind FROM items ORDER BY id")]
    assert kinds == ["write", "rank", "write"]
    drafted = json.loads(desk.store.one("SELECT content FROM items WHERE id = 3")["content"])
    assert drafted["draft"] == "b."
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "ok"}\n{"messages": []}\n')
    with pytest.raises(PunaError, match=r"bad\.jsonl:2"):
        import_items(desk, read_records(bad), "bad")
    assert desk.store.one("SELECT count(*) AS n FROM items")["n"] == 3


def test_a_desk_that_is_none(tmp_path):
    with pytest.raises(PunaError, match="there is no desk"):
        Store(tmp_path / "none.db")
    Store.create(tmp_path / "d.db", "{}").close()
    with pytest.raises(PunaError, match="there already"):
        Store.create(tmp_path / "d.db", "{}")
    key_path(tmp_path / "d.db").unlink()
    with pytest.raises(PunaError, match="key file"):
        Store(tmp_path / "d.db")
    other = tmp_path / "other.db"
    other.write_text("no database, but long enough to be looked at" * 20)
    key_path(other).write_text("00")
    with pytest.raises(PunaError, match="is not a desk"):
        Store(other)


def test_the_dashboard_tells_what_happened(open_desk):
    desk, _, adj = accepted_desk(open_desk, 4, defect_limit=0.5, audit_defects=0)
    acceptance.draw_audits(desk)
    for is_defect in (True, False, False, False):
        found = acceptance.next_audit(desk, adj)
        acceptance.record_audit(desk, adj, found[0], is_defect, "style" if is_defect else None)
    told = dashboard.collect(desk)
    assert (told["items"]["accepted"], told["items"]["review"]) == (3, 1)
    batch = told["batches"][0]
    assert (batch["state"], batch["n_items"], batch["audit"]["bound"]) == ("accepted", 4, 0.25)
    by = {(one["by"], one["round"]): (one["n"], one["n_defects"]) for one in told["rounds"]}
    assert by == {("review", 1): (4, 0), ("audit", 1): (4, 1)}
    assert told["throughput"][-1]["n"] == 4
    assert json.loads(json.dumps(told)) == told
