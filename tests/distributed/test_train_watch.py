"""What a step tells about itself is the same in every layout."""

from __future__ import annotations

import pytest
import torch

from puna.model.config import LlamaConfig
from puna.tokens.loader import Batch, rank_rows
from puna.train.batch import TensorBatch
from puna.train.config import ParallelConfig
from puna.train.parallel.layout import Layout
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.shards import local
from puna.train.parallel.world import World, make_world
from puna.train.precision import Precision
from puna.train.watch.heldout import share_of_rows
from tests.distributed.ranks import run_ranks
from tests.unit.test_train_heldout import text_sets
from tests.unit.test_train_metrics import SEQ_LEN, batch_of

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
MODEL = LlamaConfig(
    vocab_size=37, dim=16, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=24, max_seq_len=32
)
N_ROWS = 8
LAYOUTS = {
    2: [
        {}, {"replicate": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"pp": 2, "schedule": "zbv"},
    ],
    4: [{"tp": 2, "cp": 2}, {"pp": 2, "tp": 2}, {"pp": 2}, {"cp": 2}],
}  # fmt: skip


def rows(data_rank: int, n_data: int) -> Batch:
    both = [batch_of(0), batch_of(1)]
    mine = rank_rows(N_ROWS, data_rank, n_data)

    def part(name: str):
        whole = torch.cat([torch.from_numpy(getattr(one, name)) for one in both])
        return whole[mine.start : mine.stop].numpy()

    names = ("tokens_BT", "labels_BT", "doc_ids_BT", "positions_BT")
    return Batch(*map(part, names), both[0].sources, part("source_B"))


def report_of(world: World, parallel: ParallelConfig) -> tuple[float, float, float, dict]:
    micro = 1 if parallel.pp > 1 else 2
    n_own = N_ROWS // world.layout.data
    model = ParallelModel(
        MODEL, SEQ_LEN, micro, n_own // micro, world, parallel, Precision(torch.float32, "")
    )
    model.fill_random(0)
    batch = TensorBatch.of(rows(world.data_rank, world.layout.data), CPU)
    loss = model.forward_backward(batch)
    model.clip_gradients(1.0)
    parts = model.clock.take()
    assert all(seconds >= 0 for seconds in parts.values())
    assert world.size == 1 or parts["communication"] > 0
    assert parts["forward"] > 0
    assert parts["backward"] > 0
    return loss, model.report.n_labelled, model.report.n_visible, dict(model.report.sources)


def nats_of(world: World, parallel: ParallelConfig) -> tuple[list[float], bool]:
    """Held-out sums, and whether three steps end with the same bits with them and without."""
    micro = 1 if parallel.pp > 1 else 2
    n_own = N_ROWS // world.layout.data
    sets = text_sets()
    ends, nats = [], []
    for measures in (False, True):
        model = ParallelModel(
            MODEL, SEQ_LEN, micro, n_own // micro, world, parallel, Precision(torch.float32, "")
        )
        model.fill_random(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        heldout = share_of_rows(sets, SEQ_LEN, model.micro_rows(SEQ_LEN), world)
        for _ in range(3):
            batch = TensorBatch.of(rows(world.data_rank, world.layout.data), CPU)
            model.forward_backward(batch)
            model.clip_gradients(1.0)
            optimizer.step()
            optimizer.zero_grad()
            if measures:
                with model.clock.part("eval"):
                    nats = model.evaluate(heldout, len(sets), lambda: None)
        ends.append([local(parameter.detach()).clone() for parameter in model.parameters()])
        parts = model.clock.take()
        assert (parts["eval"] > 0) == measures
    return nats, all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def measurements(layouts: list[dict]) -> list[tuple]:
    """Runs on every rank."""
    import torch.distributed as dist

    found = []
    for values in layouts:
        parallel = ParallelConfig(**values)
        world = make_world(CPU, 1, Layout.of(parallel, dist.get_world_size()))
        found.append(nats_of(world, parallel))
    return found


@pytest.mark.parametrize(
    "n_ranks", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.exhaustive])]
)
def test_every_layout_measures_held_out_text_as_one_process_and_trains_to_the_same_bits(n_ranks):
    nats, is_same = nats_of(World(0, 1, CPU, 1, None), ParallelConfig())
    assert is_same
    for of_rank in run_ranks(n_ranks, measurements, LAYOUTS[n_ranks]):
        for values, found in zip(LAYOUTS[n_ranks], of_rank, strict=True):
            assert found[0] == pytest.approx(nats, rel=1e-4), values
            assert found[1], values


def reports(layouts: list[dict]) -> list[tuple]:
    """Runs on every rank."""
    import torch.distributed as dist

    found = []
    for values in layouts:
        parallel = ParallelConfig(**values)
        world = make_world(CPU, 1, Layout.of(parallel, dist.get_world_size()))
        found.append(report_of(world, parallel))
    return found


@pytest.mark.parametrize("n_ranks", LAYOUTS)
def test_every_layout_reports_the_sources_of_one_process(n_ranks):
    alone = World(0, 1, CPU, 1, None)
    loss, n_labelled, n_visible, sources = report_of(alone, ParallelConfig())
    for of_rank in run_ranks(n_ranks, reports, LAYOUTS[n_ranks]):
        for values, found in zip(LAYOUTS[n_ranks], of_rank, strict=True):
            assert found[0] == pytest.approx(loss, rel=1e-5), values
            assert found[1] == n_labelled, values
            assert found[2] == pytest.approx(n_visible, rel=1e-12), values
            assert found[3].keys() == sources.keys(), values
            for name, (nats, n_of_source) in sources.items():
                assert found[3][name][0] == pytest.approx(nats, rel=1e-5), (values, name)
                assert found[3][name][1] == n_of_source, (values, name)
