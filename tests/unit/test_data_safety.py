"""Personal data and keys, block lists, word lists, the hashed classifier, and the stage."""

import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data.kernels.buffers import texts_from, texts_of
from puna.data.reasons import REASONS
from puna.data.safety import SafetyConfig, checks, make_safe, scan
from puna.data.safety.config import KINDS, NATIONAL_IDS, PiiRules
from puna.data.safety.domains import BlockList, read_block_list, split_url, url_of
from puna.data.safety.hashed_model import HashedConfig, features, load_hashed, train_hashed
from puna.data.safety.labelled import VALUES, make_labelled, measure
from puna.data.safety.pii import find_pii, redact
from puna.data.safety.terms import TermList, read_terms
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

ALL_IDS = frozenset(NATIONAL_IDS)
TUNED_SEEDS = (1, 2, 3)
"""Seeds of the labelled sets that the detectors were tuned on; tests use others."""


def find(text, ids=ALL_IDS):
    data = text.encode()
    found = find_pii(texts_from([text]), [ids]).get(0, [])
    return [(kind, data[start:end].decode()) for start, end, kind in found]


# Detectors


@pytest.mark.parametrize("seed", [20, 21])
def test_precision_and_recall_of_every_kind_on_sets_of_other_seeds(seed):
    assert seed not in TUNED_SEEDS
    scores = measure(make_labelled(1200, seed))
    assert set(scores) == set(KINDS)
    for kind, score in scores.items():
        assert score.planted > 150, kind
        assert score.recall >= 0.98, (kind, score)
        assert score.precision >= 0.98, (kind, score)


def test_labelled_sets_are_reproducible_and_spans_hold_the_values():
    first = make_labelled(20, 5)
    assert first == make_labelled(20, 5) != make_labelled(20, 6)
    for document in first:
        for start, end, kind in document.spans:
            value = document.text.encode()[start:end].decode()
            assert value.strip() == value
            assert len(value) >= 5, kind


# Published examples: none of these was made by our generator.
PUBLISHED = [
    ("GB82 WEST 1234 5698 7654 32", "iban"),
    ("NO9386011117947", "iban"),
    ("Steuer-ID 86 095 742 719", "de_tax_id"),
    ("NIR 2 55 08 14 168 025 38", "fr_nir"),
    ("NIE X1234567L", "es_nie"),
    ("CF MRTMTT91D08F205J", "it_codice_fiscale"),
    ("numero 5425 2334 3010 9903", "credit_card"),
]


@pytest.mark.parametrize(("text", "kind"), PUBLISHED)
def test_published_examples_are_found(text, kind):
    assert [found for found, _ in find(text)] == [kind]


CASES = [
    ("Write to jürgen@bücher.de.", [("email", "jürgen@bücher.de")]),
    ("联系abc@qq.com谢谢", [("email", "abc@qq.com")]),
    ("see https://x.org/a/me@mail.org", [("email", "me@mail.org")]),
    ("+49 (0)30 1234567 / +49 171 1234567",
     [("phone", "+49 (0)30 1234567"), ("phone", "+49 171 1234567")]),
    ("Tel: 030 1234567 / 0171 1234567", [("phone", "030 1234567"), ("phone", "0171 1234567")]),
    ("Phone\n030 1234567", [("phone", "030 1234567")]),
    ("number 030 1234567", []),
    ("or (415) 555-2671.", [("phone", "(415) 555-2671")]),
    ("06 12 34 56 78 is mine", [("phone", "06 12 34 56 78")]),
    ("01 12 23 34 45\n06 12 34 56 78", []),
    ("Decimal('+35236450.6')", []),
    ("upgrade to version 81.2.69.142", []),
    ("81.2.69.142:8080, 2a02:8071:b82:1::5", [("ip", "81.2.69.142"), ("ip", "2a02:8071:b82:1::5")]),
    ("host 5.9.4.12", [("ip", "5.9.4.12")]),
    ("5.9.4.12", []),
    ("1.0.0.127.in-addr.arpa", []),
    # Found in real texts: changelogs, tables of code points, clauses, bug numbers.
    ("deps: upgrade V8 from 4.2.77.13 to 4.2.77.15, V8 5.0.71.34", []),
    ("addresses (section 2.5.5.2)", []),
    ("5.9.44.12 - - [10/Oct/2000]", [("ip", "5.9.44.12")]),
    ("[.0A12.0020.0002.0037] # DIGIT SEVEN", []),
    ("FB03; 0046 0066 0069; 0046", []),
    ("DFARS 252.227-7014 (June 1995)", []),
    ("call to keypad() from 20011215 changes", []),
    ("call 030 1234567", [("phone", "030 1234567")]),
    ("tel:+14155550123", []),
    ("524C 5282 5281 5290 5293", []),
    ("https://oss-fuzz.com/detail/5390364397928448.", []),
    ("http://proxyuser:proxypass@proxyhost:80", []),
    ("0049 40 1234567", [("phone", "0049 40 1234567")]),
    ("797-386-9073x6625", [("phone", "797-386-9073x6625")]),
    ("(0161) 4960066", [("phone", "(0161) 4960066")]),
    ("(11) 91234-5678", [("phone", "(11) 91234-5678")]),
    ("4532 0151 1283 0366 12/26 123", [("credit_card", "4532 0151 1283 0366")]),
    ("4532 0151 1283 0366 4532 0151 1283 0366", []),
    ("order 219-44-1234", []),
    ("219-44-1234", [("us_ssn", "219-44-1234")]),
    ("219 44 1234", []),
    ("SSN 219 44 1234", [("us_ssn", "219 44 1234")]),
    ('password = "hX7$kq9Lw2"', [("password", "hX7$kq9Lw2")]),
    ("password = hX7(kq9Lw2)", []),
    ("the password: correct-horse-battery-9", []),
    ("mysql://root:Tr0ub4dor@db/x", [("url_password", "Tr0ub4dor")]),
    ("https://user@host.com/", []),
    ("key AKIAIOSFODNN7EXAMPLE or AKIAJ4KDWL2MN3PQRS7T", [("aws_key", "AKIAJ4KDWL2MN3PQRS7T")]),
    ("-----BEGIN RSA PRIVATE KEY-----\nshort\n-----END RSA PRIVATE KEY-----", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_traps_and_edges(text, expected):
    assert find(text) == expected


def test_national_ids_are_searched_for_only_where_they_are_asked_for():
    text = "Steuer-ID 86095742719, SSN 219-44-1234"
    assert find(text, frozenset()) == []
    assert find(text, frozenset({"us_ssn"})) == [("us_ssn", "219-44-1234")]


@pytest.mark.parametrize("kind", ["credit_card", "iban", "de_tax_id", "fr_nir", "es_dni", "es_nie",
                                  "it_codice_fiscale"])  # fmt: skip
def test_one_wrong_digit_is_noticed(kind):
    """Every check digit scheme used here finds any single changed digit but for a known few."""
    rng = random.Random(7)
    n_noticed = n_changed = 0
    for _ in range(60):
        value = VALUES[kind](rng)
        prefix = "DNI " if kind == "es_dni" else ""
        assert (kind, value) in find(prefix + value)
        places = [i for i, char in enumerate(value) if char.isdigit()]
        at = rng.choice(places)
        other = value[:at] + str((int(value[at]) + rng.randint(1, 9)) % 10) + value[at + 1 :]
        n_changed += 1
        n_noticed += (kind, other) not in find(prefix + other)
    assert n_noticed >= n_changed - 6  # the weighted letters of Italy and Spain miss some


def test_what_overlaps_goes_to_the_more_telling_kind():
    assert find("api_key = AIzaSyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q") == [
        ("google_key", "AIzaSyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q")
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(
    st.text(max_size=40),
    st.sampled_from(["a.b@c.de", "+49 30 1234567", "1.2.3.4", "@", "://", "-----BEGIN ", "eyJ",
                     'token = "x', "DE89", "2a02:", "sk-", "4532 0151 1283 0366", "\n"]),
), max_size=8))  # fmt: skip
def test_any_text_is_redacted_the_same_alone_and_in_a_batch(parts):
    text = "".join(parts)
    data = text.encode(errors="ignore")
    text = data.decode()
    batch = texts_from(["7", text, "x@"])
    found = find_pii(batch, [ALL_IDS] * 3)
    spans = found.get(1, [])
    assert spans == find_pii(texts_from([text]), [ALL_IDS]).get(0, [])
    assert all(0 <= a < b <= len(data) for a, b, _ in spans)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    names = {kind: PiiRules().replacement_of(kind) for kind in KINDS}
    joined, offsets = redact(batch, found, names)
    expected, at = b"", 0
    for start, end, kind in spans:
        expected += data[at:start] + names[kind].encode()
        at = end
    assert joined[offsets[1] : offsets[2]] == expected + data[at:]
    (expected + data[at:]).decode()  # never cut inside a code point


def test_redaction_of_a_sliced_batch():
    texts = pa.array(["skip a@b.de", "keep", "mail c@d.de!"], pa.large_string()).slice(1)
    batch = texts_of(texts)
    data, offsets = redact(batch, find_pii(batch, [ALL_IDS] * 2), {"email": "<E>"})
    assert data == b"keepmail <E>!"
    assert offsets.tolist() == [0, 4, 13]


def test_the_scan_leaves_plain_text_alone():
    plain = "The council decided to build a tower of stone; work went on for 9 summers. " * 20
    code = "@property\ndef area(self): return 3.14159265"
    candidates = scan.find_candidates(texts_from([plain, code]))
    assert len(candidates.doc) == 0


def test_luhn_and_the_others_reject_what_they_must():
    assert checks.luhn("79927398713")
    assert not checks.luhn("79927398710")
    assert not checks.is_card("4242424242424242")  # published for tests
    assert not checks.is_us_ssn("078051120")  # was printed on a wallet
    assert not checks.is_iban("GB82WEST12345698765433")
    assert not checks.is_fr_nir("255081416802539")


# Block lists


def test_block_list_formats_and_subdomains(tmp_path):
    path = tmp_path / "domains"
    path.write_text(
        "# adult\nevil.com\n\n0.0.0.0 ads.example # hosts\n127.0.0.1 localhost\n*.wild.org\n"
        "site.net/bad/area\nBÜCHER.de\n10.1.2.3\n"
    )
    blocked = BlockList.of("adult", [str(path)])
    for url, entry in [
        ("https://evil.com", "evil.com"), ("http://a.b.EVIL.com:80/x?y", "evil.com"),
        ("http://u:p@ads.example/", "ads.example"), ("https://x.wild.org", "wild.org"),
        ("https://site.net/bad/area/page", "site.net/bad/area"),
        ("https://bücher.de/x", "xn--bcher-kva.de"), ("http://10.1.2.3/x", "10.1.2.3"),
    ]:  # fmt: skip
        assert blocked.match(url) == entry, url
    for url in ["https://notevil.com", "https://evil.com.org", "https://site.net/bad/areas",
                "http://localhost/", "http://2.3/", "evil.com", "https://[::1",
                "http://1.10.1.2.3"]:  # fmt: skip
        assert blocked.match(url) is None, url


def test_url_of_a_document():
    assert url_of("https://a.b/c", "{}") == "https://a.b/c"
    assert url_of("f.jsonl#3", '{"url":"http://a.b"}') == "http://a.b"
    assert url_of("f.jsonl#3", '{"url":7}') is None
    assert url_of("f.jsonl#3", "{}") is None
    assert split_url("https://A.b./C") == ("a.b", "/c")


def test_bad_block_lists_name_file_and_line(tmp_path):
    path = tmp_path / "bad"
    path.write_text("ok.com\nthis is no domain\n")
    with pytest.raises(PunaError, match=r"bad, line 2: 'this is no domain' is no domain"):
        list(read_block_list(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PunaError, match="utf-8"):
        list(read_block_list(path))
    with pytest.raises(PunaError, match="does not exist"):
        BlockList.of("x", [str(tmp_path / "none")])


# Word lists

TERMS = TermList.of({"porn": 1, "porn video": 2, "sex": 0.5, "жопа": 1}, {"health", "medizin"})


def test_terms_count_whole_words_and_the_longest_once():
    texts = texts_from([
        "PORN video, porn. sussex sexes porny", "sex " * 3 + "x " * 7, "sex and health", "",
        "porn and health", "жопа жопам", "porn_video",
    ])  # fmt: skip
    scores = TERMS.measure(texts)
    n_words = np.array([6, 10, 3, 1, 3, 2, 1])
    sums = (scores.per_1000 * n_words / 1000).round(9)
    assert sums.tolist() == [3, 1.5, 0, 0, 1, 1, 0]
    assert scores.n_distinct.tolist() == [2, 1, 0, 0, 1, 1, 0]
    assert scores.top[0] == "porn video, porn"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abAB é_-0", max_size=60))
def test_terms_equal_a_plain_search(text):
    terms = {"a": 1, "ab": 1, "ab a": 1, "bab": 1, "é": 1, "b-a": 1}
    expected = {}
    data = text.encode()
    folded = data.lower()
    # Of terms that end at one place the longest counts, and swallows those that begin inside it.
    found = []
    for end in range(1, len(folded) + 1):
        for term in sorted(terms, key=lambda term: -len(term.encode())):
            start = end - len(term.encode())
            around = folded[max(start - 1, 0) : max(start, 0)] + folded[end : end + 1]
            is_inside = any(chr(byte).isalnum() or byte > 127 or byte == 95 for byte in around)
            if start >= 0 and folded[start:end] == term.encode() and not is_inside:
                found = [item for item in found if item[0] < start] + [(start, term)]
                break
    for _, term in found:
        expected[term] = expected.get(term, 0) + 1
    scores = TermList.of(terms, ()).measure(texts_from([text]))
    assert scores.n_distinct[0] == len(expected)
    n_words = max(len([word for word in data.split(b" ") if word]), 1)
    assert scores.per_1000[0] == pytest.approx(1000 * sum(expected.values()) / n_words)


def test_a_context_word_excuses_weak_terms_within_its_window_only():
    near, far = "health " + "x " * 40 + "sex", "health " + "x " * 60 + "sex"
    assert TERMS.measure(texts_from([near, far])).n_distinct.tolist() == [0, 1]


def test_word_list_files(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_text("# ours\nBad  Word\t2.5\n\nplain\n")
    assert read_terms(path) == {"bad word": 2.5, "plain": 1.0}
    path.write_text("ok\nword\t-1\n")
    with pytest.raises(PunaError, match=r"terms.txt, line 2: 'word\\t-1'"):
        read_terms(path)
    with pytest.raises(PunaError, match="65,535 bytes"):
        TermList.of({"a" * 40_000: 1, "b" * 40_000: 1}, ())


# The classifier


def _write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def examples(tmp_path):
    rng = random.Random(0)
    bad, good = ["vile", "stupid", "trash", "scum"], ["river", "tower", "lamp", "stone"]
    both = [f"w{i}" for i in range(40)]

    def make(own, i):
        return " ".join([*rng.choices(both, k=20), *rng.choices(own, k=3), f"n{i}"])

    positive = _write(tmp_path / "bad.jsonl", [make(bad, i) for i in range(200)])
    return positive, _write(tmp_path / "good.jsonl", [make(good, i + 500) for i in range(400)])


def test_training_is_deterministic_and_tells_the_classes_apart(tmp_path, examples):
    positive, negative = examples
    config = HashedConfig(bits=14, epochs=4)
    report = train_hashed([positive], [negative], tmp_path / "a.safetensors", config)
    train_hashed([positive], [negative], tmp_path / "b.safetensors", config)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert report["auc"] > 0.99
    model = load_hashed(tmp_path / "a.safetensors", "1")
    stupid, river = model.values(texts_from(["you stupid scum w1", "the river tower w1"]))
    assert stupid > 0.5 > river
    misspelt, other = model.margins(texts_from(["stuppid", "towerr"]))
    assert misspelt > other  # byte n-grams reach spellings that were not seen
    assert model.report["counts"]["used"] == 600


def test_features_are_unit_vectors_of_words_pairs_and_ngrams():
    config = HashedConfig(bits=20, min_chars=3, max_chars=3)
    starts, buckets, values = features(texts_from(["ab cd", "", "ab ab ab"]), config)
    # ab, cd, the pair, <ab, ab>, <cd, cd> / nothing / ab, the pair, <ab, ab>
    assert np.diff(starts).tolist() == [7, 0, 4]
    assert set(buckets[7:].tolist()) & set(buckets[:7].tolist()) != set()
    assert np.add.reduceat(values**2, [0, 7]).tolist() == pytest.approx([1, 1])


def test_classifier_errors(tmp_path, examples):
    positive, negative = examples
    with pytest.raises(PunaError, match=r"does not end with .safetensors"):
        train_hashed([positive], [negative], tmp_path / "model.bin")
    few = _write(tmp_path / "few.jsonl", ["a b", "c d"])
    with pytest.raises(PunaError, match="2 distinct positive texts are too few"):
        train_hashed([few], [negative], tmp_path / "m.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors")
    with pytest.raises(PunaError, match=r"damaged.safetensors: no classifier"):
        load_hashed(damaged, "2")
    cfg = SafetyConfig(models={"toxic": {"path": str(tmp_path / "none")}})
    with pytest.raises(PunaError, match=r"data.safety.models.toxic: .*none is no classifier"):
        run_stage(tmp_path, cfg, [("s", "a", "x")])


# The stage


def run_stage(tmp_path, cfg, texts, n_shards=1, extra=None):
    documents = make_documents(tmp_path / "in", texts, n_shards=n_shards, extra=extra)
    out = tmp_path / "out"
    out.mkdir()
    return make_safe(cfg, {"documents": documents}, out, Ledger(None)), out


def test_actions_reasons_and_counts(tmp_path):
    texts = [
        ("web", "a", "mail a@b.de or c@d.de, ring 030 1234567 now"),
        ("web", "b", "x@y.org " * 3),
        ("code", "c", "host 81.2.69.142 and 81.2.69.142; mail u@v.com"),
        ("code", "d", "clean"),
    ]
    cfg = SafetyConfig(
        workers=1,
        pii=PiiRules(actions={"email": "drop", "ip": "keep"}, drop_above=2,
                     replacements={"email": "|||EMAIL_ADDRESS|||"}),
    )  # fmt: skip
    metrics, out = run_stage(tmp_path, cfg, texts)
    kept = {row["path"]: row for row in kept_rows(out)}
    assert kept["a"]["text"] == (
        "mail |||EMAIL_ADDRESS||| or |||EMAIL_ADDRESS|||, ring <PHONE> now"
    )
    assert kept["a"]["n_bytes"] == len(kept["a"]["text"])
    assert kept["c"]["text"].startswith("host 81.2.69.142 and")
    assert json.loads(kept["c"]["pii"]) == {"email": 1, "ip": 2}
    assert (kept["d"]["text"], kept["d"]["pii"]) == ("clean", None)
    (row,) = rejected_rows(out)
    assert (row["path"], row["reason"], row["value"], row["threshold"]) == ("b", "pii.email", 3, 2)
    assert row["text"] == "x@y.org " * 3
    assert metrics["pii"] == {
        "code": {"email": {"docs": 1, "found": 1, "redacted": 1},
                 "ip": {"docs": 1, "found": 2, "redacted": 0}},
        "web": {"email": {"docs": 2, "found": 5, "redacted": 2},
                "phone": {"docs": 1, "found": 1, "redacted": 1}},
    }  # fmt: skip


def test_national_ids_follow_the_language(tmp_path):
    text = "86095742719 and 219-44-1234"
    cfg = SafetyConfig(workers=1, pii={"national_ids": {"de": ["de_tax_id"], "*": ["us_ssn"]}})
    rows = [("s", "a", text), ("s", "b", text)]
    _, out = run_stage(tmp_path, cfg, rows, extra={"language": ["de", "en"]})
    assert {row["path"]: row["text"] for row in kept_rows(out)} == {
        "a": "<DE_TAX_ID> and 219-44-1234", "b": "86095742719 and <US_SSN>",
    }  # fmt: skip


def test_every_drop_has_its_reason_value_threshold_and_detail(tmp_path, examples):
    (tmp_path / "domains").write_text("evil.com\n")
    (tmp_path / "insults").write_text("scum\nvermin\n")
    model = tmp_path / "m.safetensors"
    train_hashed([examples[0]], [examples[1]], model, HashedConfig(bits=14))
    cfg = SafetyConfig(
        workers=1,
        block_lists={"adult": (str(tmp_path / "domains"),)},
        toxic={"files": (str(tmp_path / "insults"),), "min_distinct": 2},
        models={"toxic": {"path": str(model), "max": 0.9, "except_sources": ("forum",)}},
    )
    nasty = "you stupid vile trash w1 w2 w3"
    texts = [
        ("web", "https://a.evil.com/x", "fine text"),
        ("web", "b", "free porn videos with horny milf and blowjob"),
        ("web", "c", "sex education in school: porn and health, consent, anatomy " * 3),
        ("web", "d", "scum and vermin"),
        ("web", "e", nasty),
        ("forum", "f", nasty),
    ]
    _, out = run_stage(tmp_path, cfg, texts)
    rows = {row["path"]: row for row in rejected_rows(out)}
    assert {path: row["reason"] for path, row in rows.items()} == {
        "https://a.evil.com/x": "safety.url", "b": "safety.nsfw", "d": "safety.toxic",
        "e": "safety.model",
    }  # fmt: skip
    assert all(row["value"] > row["threshold"] for row in rows.values())
    assert all(row["reason"] in REASONS and row["step"] == "data.safety" for row in rows.values())
    assert rows["https://a.evil.com/x"]["detail"] == "adult: evil.com"
    assert rows["b"]["detail"].startswith("4 terms: ")
    assert rows["e"]["detail"] == "toxic"
    assert {row["path"] for row in kept_rows(out)} == {"c", "f"}


def test_same_bytes_for_any_number_of_workers_and_again_on_its_own_output(tmp_path):
    texts = [(f"s{i % 2}", f"d{i}", document.text) for i, document in
             enumerate(make_labelled(60, 30))]  # fmt: skip
    folders = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        _, out = run_stage(tmp_path / str(workers), SafetyConfig(workers=workers), texts, 3)
        folders.append({name: data for name, data in folder_bytes(out).items()
                        if name.endswith(".parquet")})  # fmt: skip
    assert folders[0] == folders[1]
    assert len(folders[0]) == 6
    again = [(row["source"], row["path"], row["text"]) for row in kept_rows(out)]
    (tmp_path / "again").mkdir()
    metrics, _ = run_stage(tmp_path / "again", SafetyConfig(workers=1), again)
    assert metrics["pii"] == {}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"pii": {"actions": {"emial": "drop"}}}, "unknown kind 'emial'; did you mean 'email'"),
        ({"pii": {"national_ids": {"de": ["email"]}}}, "unknown kind 'email'.*de_tax_id"),
        ({"pii": {"action": "hide"}}, "data.safety.pii.action"),
        ({"nsfw": {"max_per_1000": -1}}, "data.safety.nsfw.max_per_1000"),
    ],
)
def test_bad_rules_are_named_with_their_place(rules, message):
    with pytest.raises(PunaError, match=message):
        resolve({"name": "r", "data": {"safety": rules}})


def test_the_stage_runs_in_a_recipe_and_notes_its_files(tmp_path):
    documents = make_documents(tmp_path / "in", [("s", "a", "mail a@b.de")])
    (tmp_path / "domains").write_text("evil.com\n")
    raw = {
        "name": "r", "runs_dir": str(tmp_path), "workers": 1,
        "inputs": {"data.safety.documents": str(documents.path)},
        "data": {"safety": {"block_lists": {"adult": [str(tmp_path / "domains")]}}},
    }  # fmt: skip
    run_recipe(resolve(raw))
    out = tmp_path / "r" / "data.safety"
    assert [row["text"] for row in kept_rows(out)] == ["mail <EMAIL>"]
    record = json.loads((out / "artifact.json").read_text())
    assert list(record["external_state"]) == [str(tmp_path / "domains")]
    assert record["metrics"]["pii"]["s"]["email"]["redacted"] == 1
