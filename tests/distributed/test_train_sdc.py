"""Silent data corruption in a training over processes: found, named, healed; and no false alarm."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.resilience.heartbeat import HeartbeatWriter
from puna.resilience.sdc.inject import flip_bit
from puna.tokens.loader import Batch
from puna.train.config import (
    AdamWConfig,
    CheckpointConfig,
    ParallelConfig,
    TrainingConfig,
)
from puna.train.sdc_config import SdcConfig
from puna.train.spec import JobSpec, SourceSpec
from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODEL = LlamaConfig(
    vocab_size=33, dim=12, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=17, max_seq_len=16
)
N_STEPS = 6
ALL = SdcConfig(state=True, at_rest="always", replay_every=2, products=True)


class Rows:
    """Counting rows."""

    n_rows = 12

    def batch(self, step: int, rank: int, world: int) -> Batch:
        rng = np.random.default_rng([7, step])
        tokens = (rng.integers(0, 33, (self.n_rows, 1)) + 3 * np.arange(17)) % 33
        n = self.n_rows // world
        mine = slice(rank * n, (rank + 1) * n)
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (n, 16)).copy()
        return Batch(
            tokens[mine, :-1].copy(),
            tokens[mine, 1:].copy(),
            np.zeros((n, 16), np.int32),
            positions,
        )


def train_on_rank(folder: str, values: dict, damage: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Train on this rank; return how it ended and the parameters' local parts."""
    import torch.distributed as dist

    from puna.train import loop
    from puna.train.parallel.layout import Layout
    from puna.train.parallel.model import ParallelModel
    from puna.train.parallel.shards import local
    from puna.train.parallel.world import make_world

    module = type(sys)("rows_for_sdc")
    module.Rows = Rows  # type: ignore[attr-defined]
    sys.modules["rows_for_sdc"] = module
    out = Path(folder)
    config = TrainingConfig(
        **{
            "steps": N_STEPS, "seq_len": 16, "global_batch": 12, "precision": "fp32",
            "optim": AdamWConfig(lr=1e-2), "nproc": dist.get_world_size(),
            "checkpoint": CheckpointConfig(every=100, memory_every=0), **values,
        }
    )  # fmt: skip
    spec = JobSpec(
        "j", out, out / LEDGER_FILE, {}, SourceSpec("rows_for_sdc:Rows"), MODEL, None,
        {"bos_id": 1, "eos_ids": [2], "pad_id": 0}, config,
    )  # fmt: skip
    world = make_world(torch.device("cpu"), 1, Layout.of(config.parallel, config.nproc))
    models: list[ParallelModel] = []
    build = ParallelModel.__init__

    def keep(self, *args, **kwargs):
        build(self, *args, **kwargs)
        models.append(self)

    ParallelModel.__init__ = keep  # type: ignore[method-assign]
    loop.peak_flops = lambda *_: 1e9  # type: ignore[attr-defined]
    loop.export_model = lambda *_: None  # type: ignore[attr-defined]
    DAMAGE[damage](dist.get_rank(), models)
    heart = HeartbeatWriter(out, dist.get_rank())
    try:
        loop.train(spec, 0, world, heart, Ledger(spec.ledger, job="j"))
        ended = ""
    except (RuntimeError, PunaError) as error:
        ended = f"{type(error).__name__}: {error}"
    return ended, {name: local(p.detach()).clone() for name, p in models[0].named_parameters()}


def none(rank, models):
    """Nothing happens."""


def at_forward(step, rank_hit, act, times=1):
    """Call ``act`` on a rank just before the gradients of a step are computed."""

    def install(rank, models):
        from puna.train.parallel.model import ParallelModel

        compute, seen = ParallelModel.forward_backward, []

        def hit(self, batch):
            seen.append(0)
            if rank == rank_hit and step < len(seen) <= step + times:
                batch = act(self, batch) or batch
            return compute(self, batch)

        ParallelModel.forward_backward = hit  # type: ignore[method-assign]

    return install


def flip_weight(model, batch):
    from puna.train.parallel.shards import local

    flip_bit(local(dict(model.named_parameters())["layers.1.feed_forward.w2.weight"]), 5, 21)


def flip_token(model, batch):
    flip_bit(batch.tokens_BT, 3, 2)


def flip_summed(rank, models):
    """A summed gradient of a rank has a wrong bit in the step 3."""
    from puna.train.parallel.model import ParallelModel
    from puna.train.parallel.shards import local

    compute, seen = ParallelModel.forward_backward, []

    def hit(self, batch):
        seen.append(0)
        loss = compute(self, batch)
        if rank == 1 and len(seen) == 4:
            gradient = dict(self.named_parameters())["layers.0.attention.wq.weight"].grad
            flip_bit(local(gradient), 1, 3)
        return loss

    ParallelModel.forward_backward = hit  # type: ignore[method-assign]


def flip_update(rank, models):
    """The update of a rank writes a wrong bit in the step 2."""
    step, seen = torch.optim.AdamW.step, []

    def wrong(self, *args, **kwargs):
        step(self, *args, **kwargs)
        seen.append(0)
        if rank == 1 and len(seen) == 3:
            from puna.train.parallel.shards import local

            flip_bit(local(self.param_groups[0]["params"][0].detach()), 7, 0)

    torch.optim.AdamW.step = wrong  # type: ignore[method-assign]


def broken_rank(rank, models):
    """A rank multiplies wrongly, from the step 3 on, in its backward pass."""
    from puna.train.fused import functions

    backward, seen = functions.silu_gate, []

    def wrong(gate, up):
        x = backward(gate, up)
        seen.append(0)
        if rank == 1 and len(seen) > 12:
            x = x.clone()
            x.register_hook(lambda g: g * 1.0001)
        return x

    from puna.train.fused import fuse

    fuse.silu_gate = wrong


DAMAGE = {
    "none": none,
    "weight": at_forward(3, 1, flip_weight),
    "data": at_forward(4, 1, flip_token),
    "summed": flip_summed,
    "update": flip_update,
    "broken": broken_rank,
}


def train(folder: Path, n_ranks: int, damage: str = "none", sdc: SdcConfig = ALL, **values):
    folder.mkdir()
    values = {"parallel": ParallelConfig(replicate=n_ranks), **values, "sdc": sdc}
    results = run_ranks(n_ranks, train_on_rank, str(folder), values, damage)
    found = list(read_events(folder / LEDGER_FILE, "sdc.detected"))
    return [end for end, _ in results], [state for _, state in results], found


def assert_same(one, two) -> None:
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Parameters of each rank without checks and without faults, by number of ranks."""
    folder = tmp_path_factory.mktemp("clean")
    return {n: train(folder / str(n), n, sdc=SdcConfig())[1] for n in (2, 3)}


@pytest.mark.parametrize(
    ("n_ranks", "values"),
    [
        pytest.param(2, {}, marks=pytest.mark.exhaustive),
        pytest.param(3, {"micro_batch": 2}, marks=pytest.mark.exhaustive),
        pytest.param(2, {"precision": "bf16"}, marks=pytest.mark.exhaustive),
        pytest.param(2, {"parallel": ParallelConfig()}, marks=pytest.mark.exhaustive),
        (2, {"parallel": ParallelConfig(reshard_after_forward=True), "precision": "bf16"}),
        pytest.param(4, {"parallel": ParallelConfig(replicate=2)}, marks=pytest.mark.exhaustive),
    ],
    ids=["replicas", "micro-batches", "bf16", "shards", "resharded", "hybrid"],
)
def test_checks_change_no_bit_and_raise_no_alarm(tmp_path, n_ranks, values):
    ends, with_checks, found = train(tmp_path / "with", n_ranks, **values)
    assert (ends, found) == ([""] * n_ranks, [])
    _, without, _ = train(tmp_path / "without", n_ranks, sdc=SdcConfig(), **values)
    assert_same(with_checks, without)


@pytest.mark.parametrize("n_ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("damage", "where"), [
    ("weight", "at rest"), ("data", "replay"),
    pytest.param("summed", "gradient", marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_faults_are_named_and_healed_to_the_bit(tmp_path, clean, n_ranks, damage, where):
    ends, states, found = train(tmp_path / "run", n_ranks, damage)
    assert ends == [""] * n_ranks
    (event,) = found
    assert (event["where"], event["ranks"], event["cause"]) == (where, [1], "transient")
    assert_same(states, clean[n_ranks])


def test_three_replicas_overrule_a_wrong_update(tmp_path, clean):
    ends, states, found = train(tmp_path / "run", 3, "update")
    assert ends == [""] * 3
    assert [(e["where"], e["ranks"]) for e in found] == [("update", [1])]
    assert_same(states, clean[3])


@pytest.mark.exhaustive
def test_two_replicas_end_the_attempt_after_a_wrong_update(tmp_path):
    ends, _, found = train(tmp_path / "run", 2, "update")
    assert all("differs between replicas 0, 1 after step 2" in end for end in ends)
    assert found[0]["cause"] == "undecided"
    assert set(found[0]["roots"]) == {"0", "1"}


@pytest.mark.exhaustive
def test_shards_without_a_replica_end_the_attempt(tmp_path):
    ends, _, found = train(
        tmp_path / "run", 2, "weight", SdcConfig(state=True), parallel=ParallelConfig()
    )
    assert all("of rank 1 changed at rest before the update of step 3" in end for end in ends)
    assert found[0]["tensors"] == ["model.layers.1.feed_forward.w2.weight"]


def test_a_rank_that_computes_wrongly_is_named(tmp_path):
    ends, _, found = train(tmp_path / "run", 3, "broken", SdcConfig(replay_every=2))
    assert all("FaultyRankError: rank 1 computes wrong gradients" in end for end in ends)
    assert (found[0]["cause"], found[0]["ranks"]) == ("persistent", [1])
