"""The table of runs and the manifest: what is mended, what is refused and with which words."""

import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.mix.runs import read_runs
from puna.mix.sources import read_manifest

HEAD = "run,mix.a,mix.b,mix.c,loss.x,loss.y\n"
ROWS = ["r0,.5,.3,.2,3.1,2.0", "r1,.1,.3,.6,3.3,2.1", "r2,.2,.7,.1,3.0,2.4", "r3,.3,.3,.4,2.9,2.2",
        "r4,.8,.1,.1,2.7,2.3", "r5,.6,.2,.2,2.6,2.5"]  # fmt: skip


def table(folder, rows, head=HEAD, name="runs.csv"):
    path = folder / name
    path.write_text(head + "\n".join(rows) + "\n")
    return path


def test_shares_off_by_rounding_are_divided_by_their_sum(tmp_path):
    runs = read_runs([table(tmp_path, [*ROWS, "r6,.333,.333,.333,2.8,2.2"])])
    assert runs.shares_NK.sum(axis=1) == pytest.approx(np.ones(7), abs=1e-12)
    assert runs.shares_NK[6, 0] == pytest.approx(1 / 3)
    assert "0.999" in runs.notes[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("r6,.5,.3,.1,3.0,2.0", "shares sum to 0.9"),
        ("r6,.5,-.1,.6,3.0,2.0", "share of b is -0.1"),
        ("r6,.5,,.5,3.0,2.0", "share of b is nan"),
        ("r6,much,.5,.5,3.0,2.0", "mix.a is 'much'"),
        ("r5,.5,.3,.2,3.0,2.0", "run r5 stands there twice"),
    ],
)
def test_a_wrong_row_is_refused_by_name(tmp_path, row, words):
    with pytest.raises(PunaError, match=words):
        read_runs([table(tmp_path, [*ROWS, row])])


def test_a_diverged_run_is_left_out_and_many_are_refused(tmp_path):
    runs = read_runs([table(tmp_path, [*ROWS, "r6,.4,.3,.3,nan,2.0"])])
    assert len(runs) == 6
    assert "r6" in runs.notes[-1]
    lost = [f"n{i},.4,.3,.3,nan,2.0" for i in range(3)]
    with pytest.raises(PunaError, match="3 of 9 runs have a loss that is no finite number"):
        read_runs([table(tmp_path, [*ROWS, *lost])])


def test_a_mix_that_stands_there_twice_counts_once_unless_it_is_another_seed(tmp_path):
    again = ["s0,.5,.3,.2,3.1,2.0", "s1,.1,.3,.6,3.35,2.12"]
    runs = read_runs([table(tmp_path, [*ROWS, *again])])
    assert "s0" not in runs.names
    assert "s1" in runs.names
    assert [list(rows) for rows in runs.replicates()] == [[1, 6]]


def test_runs_that_a_file_misses_are_left_out(tmp_path):
    mix = table(
        tmp_path, [row.rsplit(",", 2)[0] for row in ROWS], "run,mix.a,mix.b,mix.c\n", "m.csv"
    )
    loss = table(tmp_path, [f"r{i},{3 - i / 10}" for i in range(5)], "run,loss.x\n", "l.csv")
    runs = read_runs([mix, loss])
    assert runs.names == ["r0", "r1", "r2", "r3", "r4"]
    assert "r5" in runs.notes[0]
    none = table(tmp_path, ["q1,3.0"], "run,loss.x\n", "n.csv")
    with pytest.raises(PunaError, match="no run in common"):
        read_runs([mix, none])


def test_a_source_without_tokens_is_told(tmp_path):
    rows = ["r0,.5,.5,0,3.1,2.0", "r1,.1,.9,0,3.3,2.1", "r2,.2,.8,0,3.0,2.4"]
    runs = read_runs([table(tmp_path, rows)])
    assert runs.sources == ["a", "b"]
    assert "no run has a token of c" in runs.notes[-1]


def test_a_constant_loss_is_refused(tmp_path):
    with pytest.raises(PunaError, match=r"loss.y is the same in every run"):
        read_runs([table(tmp_path, [row.rsplit(",", 1)[0] + ",2.0" for row in ROWS])])


def test_parquet_and_json_lines_give_the_same_table(tmp_path):
    import json

    import pyarrow.parquet as pq
    from pyarrow import csv

    path = table(tmp_path, ROWS)
    want = read_runs([path])
    pq.write_table(csv.read_csv(path), tmp_path / "runs.parquet")
    lines = []
    for row in csv.read_csv(path).to_pylist():
        nested = {"run": row["run"], "mix": {}, "loss": {}}
        for name, value in row.items():
            part, _, key = name.partition(".")
            if key:
                nested[part][key] = value
        lines.append(json.dumps(nested))
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    for name in ("runs.parquet", "runs.jsonl"):
        got = read_runs([tmp_path / name])
        assert got.sources == want.sources
        assert np.array_equal(got.shares_NK, want.shares_NK)
        assert np.array_equal(got.loss_TN, want.loss_TN)


SOURCES = """
[objective]
n_tokens = 1e9
[[source]]
name = "web"
unique_tokens = 2_000_000_000
[[source]]
name = "code"
unique_tokens = 50_000_000
"""


def test_caps_and_repetition_follow_the_manifest(tmp_path):
    path = tmp_path / "mix.toml"
    path.write_text(SOURCES)
    manifest = read_manifest(path)
    assert manifest.caps() == pytest.approx([1.0, 0.2])  # 4 passes over 0.05 of the tokens
    shares = np.array([0.8, 0.2])
    assert manifest.epochs(shares)[1] == pytest.approx(4.0)
    # Muennighoff et al.: 4 passes are worth 1 + 15.4 (1 - exp(-3 / 15.4)) of one
    worth = 1 + 15.4 * (1 - np.exp(-3 / 15.4))
    assert manifest.effective(shares)[1] == pytest.approx(0.05 * worth)
    assert manifest.effective(shares)[0] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("50_000_000", "0"), "unique_tokens"),
        (('"code"', '"web"'), "'web' is named twice"),
        (("1e9", "1e12"), "repeated as often as max_epochs allows"),
        (("unique_tokens = 50", "unqiue_tokens = 50"), "did you mean 'unique_tokens'"),
    ],
)
def test_a_manifest_that_cannot_work_is_refused(tmp_path, change, words):
    path = tmp_path / "mix.toml"
    path.write_text(SOURCES.replace(*change))
    with pytest.raises(PunaError) as caught:
        read_manifest(path)
    assert words in str(caught.value)
