"""Tiers, rails and oversubscription: what must never get better by being worse."""

from __future__ import annotations

import itertools

import pytest

from puna.core.errors import PunaError
from puna.plan.estimate import estimate
from puna.plan.fabric import BALANCE, PACKED_SHARE, REFERENCE, Fabric, parse_fabric
from puna.plan.hardware import find_gpu
from puna.plan.job import Job, Layout, find_model

COUNTS = (8, 16, 64, 128, 129, 1024, 3072, 3073, 8192, 24_576)
FULL = 400e9 / 8
WHICH = ("mid", "low", "high")


def _all_of(**changes: object) -> list[Fabric]:
    """Fabrics of many kinds with some fields set."""
    kinds = itertools.product(
        ("ib", "roce"), (1, 4, 16), (1.0, 2.0, 7.0), (0, 16, 128), (1.0, 2.0), (False, True),
        ("packed", "random"),
    )  # fmt: skip
    found = []
    for kind, flows, top, leaf, low, rails, placement in kinds:
        if leaf or (low == 1 and not rails):
            values = {
                "kind": kind, "flows": flows, "oversubscription": top, "leaf": leaf,
                "leaf_oversubscription": low, "rails": rails, "placement": placement, **changes,
            }  # fmt: skip
            found.append(Fabric.model_validate(values))
    return found


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"oversubscription": 8.0}, {"oversubscription": 4.0}),
        ({"leaf": 16, "leaf_oversubscription": 3.0}, {"leaf": 16, "leaf_oversubscription": 1.5}),
        ({"leaf": 16, "rails": False}, {"leaf": 16, "rails": True}),
        ({"leaf": 16}, {"leaf": 64}),
        ({"leaf": 64, "rails": True}, {"leaf": 128, "rails": True}),
        ({"pod": 2048}, {"pod": 4096}),
        ({"flows": 1}, {"flows": 16}),
        ({"adaptive": False}, {"adaptive": True}),
        ({"kind": "roce"}, {"kind": "ib"}),
        ({"placement": "random"}, {"placement": "packed"}),
        ({"gbit": 200.0}, {"gbit": 400.0}),
    ],
)
def test_a_better_fabric_never_gives_less(worse: dict, better: dict) -> None:
    pairs = zip(_all_of(**worse), _all_of(**better), strict=True)
    n_better = 0
    for bad, good in pairs:
        for n, which in itertools.product(COUNTS, WHICH):
            assert good.nic(n, which) >= bad.nic(n, which) * (1 - 1e-12), (bad, good, n, which)
            n_better += good.nic(n, which) > bad.nic(n, which) * (1 + 1e-9)
    assert n_better > 0  # the field is looked at


def test_more_gpus_never_get_more_each_and_the_range_holds_the_middle() -> None:
    for fabric in _all_of():
        for which in WHICH:
            shares = [fabric.nic(n, which) for n in COUNTS]
            assert shares == sorted(shares, reverse=True), fabric
        for n in COUNTS:
            low, mid, high = (fabric.nic(n, which) for which in ("low", "mid", "high"))
            assert 0 < low <= mid <= high


def test_rails_keep_rings_below_a_leaf() -> None:
    plain, rails = (Fabric(leaf=32, leaf_oversubscription=4.0, rails=r) for r in (False, True))
    assert (plain.reach, rails.reach) == (32, 256)
    assert rails.squeeze(256) == 1.0
    assert plain.squeeze(256) == pytest.approx(1 / (4 * PACKED_SHARE))
    # A leaf of two nodes without rails: every second hop of a ring leaves it.
    assert Fabric(leaf=16, leaf_oversubscription=4.0).squeeze(256) == pytest.approx(0.5)
    # As many GPUs below the leaf, but of 16 nodes: one hop in 16, at least the prior's share.
    wide = Fabric(leaf=16, leaf_oversubscription=8.0, rails=True)
    assert wide.squeeze(1024) == pytest.approx(1 / (8 * PACKED_SHARE))


def test_below_one_leaf_nothing_is_hashed() -> None:
    fabric = Fabric(kind="roce", flows=1, leaf=64)
    assert fabric.balance(64) == BALANCE["adaptive"]
    assert fabric.balance(65) == fabric.balance() == BALANCE["ecmp1"]
    assert fabric.nic(64) == pytest.approx(FULL * BALANCE["adaptive"][0] / REFERENCE)


def test_oversubscription_of_both_tiers_multiplies_at_the_top() -> None:
    for placement in ("packed", "random"):
        values = {"pod": 1024, "placement": placement, "leaf": 16, "rails": True}
        top = Fabric.model_validate({**values, "oversubscription": 4.0})
        both = Fabric.model_validate(
            {**values, "oversubscription": 4.0, "leaf_oversubscription": 2.0}
        )
        assert both.squeeze(4096) == pytest.approx(top.squeeze(4096) / 2)
        assert top.squeeze(1024) == 1.0
        assert both.squeeze(128) == 1.0


def test_a_narrower_network_never_makes_a_step_shorter() -> None:
    job = Job(
        model=find_model("llama3-8b"), gpu=find_gpu("h100"), fabric=Fabric(), n_gpus=4096,
        layout=Layout(sharding="zero3"), seq_len=2048, global_batch=4096,
    )  # fmt: skip
    words = (
        "ib:400g", "ib:400g:leaf=128:rails:leafoversub=2", "ib:400g:leaf=16:leafoversub=2",
        "ib:400g:leaf=16:leafoversub=2:oversub=4:pod=1024",
        "ib:400g:leaf=16:leafoversub=2:oversub=4:pod=1024:placement=random",
    )  # fmt: skip
    steps = [
        estimate(job.model_copy(update={"fabric": parse_fabric(text)})).step_s.mid for text in words
    ]
    assert steps == sorted(steps)
    assert steps[-1] > 1.2 * steps[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ib:leaf=1024:rails", "leaf=1024 with rails joins 8192 GPUs, more than pod=3072"),
        ("ib:leafoversub=2", "leafoversub needs leaf"),
        ("ib:leaf=x", "leaf"),
        ("ib:rail", "cannot read 'rail'"),
    ],
)
def test_tiers_that_do_not_nest_are_refused(text: str, says: str) -> None:
    with pytest.raises(PunaError, match=says):
        parse_fabric(text)
