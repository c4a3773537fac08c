"""Silent data corruption: digests, verdicts, healing, replay, checksums of products, coverage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.resilience.sdc import known
from puna.resilience.sdc.abft import RotatingCheck, check_product
from puna.resilience.sdc.coverage import measure_coverage
from puna.resilience.sdc.digest import digest_all, digest_named, digest_tensor, digest_words
from puna.resilience.sdc.guard import ARBITRATED, DETECTED, StateGuard, unsettled
from puna.resilience.sdc.inject import flip_bit
from puna.resilience.sdc.peers import run_threads
from puna.resilience.sdc.replay import ReplayCheck
from puna.resilience.sdc.trial import Replica
from puna.resilience.sdc.verdict import FaultyRankError, SilentCorruptionError, judge, vote


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def detected(path) -> list[dict]:
    return list(read_events(path, DETECTED))


@pytest.mark.parametrize("digest", [digest_tensor, digest_words])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_every_single_bit_changes_the_digest(digest, dtype):
    x = torch.arange(37).to(dtype)  # an odd size: the last word is torn
    whole = digest(x)
    seen = {whole}
    n_bits = 8 * x.element_size()
    for element in range(len(x)):
        for bit in range(n_bits):
            flip_bit(x, element, bit)
            seen.add(digest(x))
            flip_bit(x, element, bit)
    assert len(seen) == 1 + len(x) * n_bits
    assert digest(x) == whole


@pytest.mark.parametrize("digest", [digest_tensor, digest_words])
def test_digest_sees_swaps_and_opposite_flips(digest):
    x = torch.tensor([1.0, 2.0, 3.0])
    assert digest(x) != digest(x.flip(0))
    y = torch.tensor([5, 4], dtype=torch.int32)
    assert digest(y) != digest(torch.tensor([4, 5], dtype=torch.int32))
    assert digest(torch.tensor([-0.0])) != digest(torch.tensor([0.0]))
    assert digest(x.expand(4, 3)) == digest(x.expand(4, 3).contiguous())
    names = {"a": x, "b": y}
    assert digest_named(names) == digest_named({"b": y, "a": x})
    assert digest_all([x]).dtype == "uint64"


def test_flip_moves_what_it_says():
    x = torch.ones(3)
    assert flip_bit(x, 1, 31) == 2.0
    assert x.tolist() == [1.0, -1.0, 1.0]
    with pytest.raises(ValueError, match="bit 16"):
        flip_bit(x.bfloat16(), 0, 16)


def test_votes():
    assert vote({0: 5, 1: 5, 2: 6}) == (2,)
    assert vote({0: 5, 1: 6}) is None
    assert vote({0: 5, 1: 5}) == ()
    assert vote({0: 1, 1: 2, 2: 3}) is None


@pytest.mark.parametrize(
    ("first", "again", "cause", "bad"),
    [
        ({1: 9, 2: 5}, {0: [5, 5], 1: [5, 5], 2: [5, 5]}, "transient", (1,)),
        ({1: 9, 2: 5}, {0: [5, 5], 1: [9, 9], 2: [5, 5]}, "persistent", (1,)),
        ({1: 9, 2: 5}, {0: [5, 5], 1: [7, 8], 2: [5, 5]}, "persistent", (1,)),
        ({1: 9, 2: 5}, {0: [1, 2], 1: [3, 4], 2: [5, 5]}, "software", (0, 1)),
        ({0: 9, 1: 5}, {0: [9, 9], 1: [5, 5]}, "undecided", (0, 1)),
        ({0: 9, 1: 5}, {0: [5, 5], 1: [5, 5]}, "transient", (0,)),
    ],
)
def test_re_execution_tells_the_cause(first, again, cause, bad):
    verdict = judge(first, again)
    assert (verdict.cause, verdict.bad) == (cause, bad)


def guarded(n_ranks, ledger, damage, **options):
    """Two updates of a state that all ranks share, with damage in between; return what is left."""

    def run(peers):
        state = {"w": torch.ones(4, 5), "m": torch.arange(6.0)}
        guard = StateGuard(state, peers, Ledger(ledger, job="j"), **options)
        guard.after_update(0)
        redo = []
        for step in (1, 2):
            damage(peers.rank, step, "before", state)
            redo.append(guard.before_update(step))
            for x in state.values():
                x.add_(1)
            damage(peers.rank, step, "update", state)
            guard.after_update(step)
        return redo, {name: x.clone() for name, x in state.items()}

    return run_threads(n_ranks, run)


def flip_on(rank, step, when, name="w"):
    def damage(own, now, where, state):
        if (own, now, where) == (rank, step, when):
            flip_bit(state[name], 3, 7)

    return damage


def test_majority_heals_an_update_and_names_the_rank(tmp_path):
    path = tmp_path / LEDGER_FILE
    results = guarded(3, path, flip_on(2, 1, "update", "m"))
    for redo, state in results:
        assert redo == [False, False]
        assert torch.equal(state["m"], torch.arange(6.0) + 2)
    (event,) = detected(path)
    assert (event["ranks"], event["tensors"], event["cause"], event["where"]) == (
        [2], ["m"], "transient", "update",
    )  # fmt: skip


def test_two_replicas_heal_what_changed_at_rest_and_compute_again(tmp_path):
    path = tmp_path / LEDGER_FILE
    for redo, state in guarded(2, path, flip_on(1, 2, "before")):
        assert redo == [False, True]
        assert torch.equal(state["w"], torch.full((4, 5), 3.0))
    (event,) = detected(path)
    assert (event["ranks"], event["tensors"], event["where"]) == ([1], ["w"], "at rest")


def test_two_replicas_that_differ_are_settled_by_a_replay(tmp_path):
    path = tmp_path / LEDGER_FILE
    with pytest.raises(SilentCorruptionError, match="w differs between replicas 0, 1 after step 1"):
        guarded(2, path, flip_on(1, 1, "update"))
    pending = unsettled(list(read_events(path, DETECTED, ARBITRATED)))
    assert list(pending) == [1]
    guarded(2, path, lambda *_: None, pending=pending)  # the run, again from a snapshot
    (event,) = read_events(path, ARBITRATED)
    assert (event["step"], event["ranks"], event["cause"]) == (1, [1], "transient")
    assert unsettled(list(read_events(path, DETECTED, ARBITRATED))) == {}


def test_one_rank_alone_gives_up_state_that_changed_at_rest(tmp_path):
    with pytest.raises(SilentCorruptionError, match="m of rank 0 changed at rest"):
        guarded(1, tmp_path / LEDGER_FILE, flip_on(0, 2, "before", "m"))


def test_a_second_strike_is_persistent(tmp_path):
    def damage(rank, step, when, state):
        if rank == 1 and when == "update":
            flip_bit(state["w"], step, 2)

    guarded(3, tmp_path / LEDGER_FILE, damage)
    assert [event["cause"] for event in detected(tmp_path / LEDGER_FILE)] == [
        "transient", "persistent",
    ]  # fmt: skip


def test_a_defect_that_copies_do_not_mend_stops(tmp_path):
    def run(peers):
        state = {"w": torch.ones(4)}
        guard = StateGuard(state, peers, Ledger(tmp_path / LEDGER_FILE))
        guard.after_update(0)
        if peers.rank == 1:
            flip_bit(state["w"], 0, 3)
            peers.copy_from = lambda source, x: type(peers).copy_from(peers, source, x.clone())
        guard.before_update(1)

    with pytest.raises(FaultyRankError, match="rank 1 does not keep"):
        run_threads(3, run)
    assert detected(tmp_path / LEDGER_FILE)[0]["cause"] == "persistent"


@pytest.mark.parametrize("n_ranks", [3, 4])
def test_a_rank_with_wrong_gradients_is_found_within_k_steps(n_ranks):
    k, bad, since = 8, 1, 3

    def run(peers):
        replica = Replica(peers, replay_every=k)
        replica._products.arm = lambda step: ""  # only the replay looks
        for step in range(since + k):
            if step == since and peers.rank == bad:
                replica.broken = lambda gradients: flip_bit(gradients["up.weight"], 5, 12)
            try:
                replica.step(step)
            except FaultyRankError as error:
                return step, str(error), replica.events.seen
        return None

    for step, message, _ in run_threads(n_ranks, run):
        assert since <= step < since + k
        assert message.startswith("rank 1 computes wrong gradients")


def test_partners_rotate_and_never_are_oneself():
    check = ReplayCheck(2, None, None, Ledger(None))  # type: ignore[arg-type]
    partners = [[check.partner(step, rank, 4) for rank in range(4)] for step in range(0, 12, 2)]
    assert all(sorted(row) == [0, 1, 2, 3] for row in partners)
    assert all(row[rank] != rank for row in partners for rank in range(4))
    assert {row[0] for row in partners} == {1, 2, 3}
    assert [check.is_due(step) for step in range(3)] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "n"), [(64, 256, 320), (33, 64, 100)])
def test_checksums_find_large_flips_and_accept_clean_products(dtype, m, k, n):
    torch.manual_seed(0)
    large = found = 0
    for trial in range(120):
        x_MK, w_NK = torch.randn(m, k).to(dtype), (0.02 * torch.randn(n, k)).to(dtype)
        y_MN = x_MK @ w_NK.T
        assert check_product(x_MK, w_NK, y_MN) is None
        element = int(torch.randint(y_MN.numel(), ()))
        moved = flip_bit(y_MN, element, trial % (8 * y_MN.element_size()))
        if not moved <= float((x_MK @ w_NK.T).float().abs().mean()) / 4:
            large += 1
            wrong = check_product(x_MK, w_NK, y_MN)
            found += wrong is not None
            if wrong is not None:
                assert wrong.row == element // n
                assert wrong.block <= element % n < wrong.block + 64
    assert large > 20
    assert found >= 0.95 * large


def test_checksums_are_exact_inside_autocast():
    torch.manual_seed(0)
    layer, x_MK = nn.Linear(512, 256), torch.rand(300, 512)
    nn.init.uniform_(layer.weight)  # sums far larger than what they are made of
    check = RotatingCheck({"only": layer})
    with torch.autocast("cpu", torch.bfloat16):
        check.arm(0)
        assert layer(x_MK).dtype == torch.bfloat16
        assert check.take() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_checksums_find_what_is_no_number(value):
    x_MK, w_NK = torch.randn(4, 8), torch.randn(100, 8)
    y_MN = x_MK @ w_NK.T
    y_MN[1, 99] = value
    wrong = check_product(x_MK, w_NK, y_MN)
    assert wrong is not None
    assert (wrong.row, wrong.block) == (1, 64)


def test_each_layer_has_its_turn_and_the_bias_counts():
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8, bias=False)}
    check = RotatingCheck(layers)
    assert [check.arm(step) for step in range(3)] == ["a", "b", "a"]
    layers["a"](torch.randn(5, 8))
    layers["b"].register_forward_hook(lambda *_: torch.full((5, 8), 7.0), prepend=True)
    layers["b"](torch.randn(5, 8))  # not its turn
    assert check.take() == []
    check.arm(1)
    layers["b"](torch.randn(5, 8))
    assert [wrong.layer for wrong in check.take()] == ["b"]
    layers["b"](torch.randn(5, 8))
    assert check.take() == []


def test_known_answers_hold_and_a_broken_product_fails(monkeypatch):
    assert known.run_known() == []
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        c = right(a, b)
        if c.dtype == torch.bfloat16:
            c[3, 4] += 1
        return c

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert known.run_known() == ["product in bf16"]


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_coverage_counts_every_site(n_ranks, monkeypatch):
    monkeypatch.setattr("puna.resilience.sdc.coverage.measure_overhead", lambda _: {})
    coverage = measure_coverage(4, n_ranks=n_ranks, replay_every=64)
    assert coverage.false_alarms == 0
    rows = {row.site: row for row in coverage.sites}
    assert len(rows) == 7
    for site in ("weight", "optimiser state", "summed gradient"):
        row = rows[site]
        assert (row.checked, row.scheduled, row.healed, row.named) == (4, 4, 4, 4)
        assert row.detectors == {"state": 4}
    for site in ("local gradient", "activation", "data"):
        row = rows[site]
        assert row.scheduled == pytest.approx(row.checked / 64)
        assert row.healed == row.checked
