"""Training on packed shards over two processes: phases, a store, damage, and a kill on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.resilience.processes import process_alive
from puna.tokens.curriculum import Curriculum, Phase
from puna.tokens.loader import PackedLoader
from puna.tokens.remote import Cache
from puna.train.config import CheckpointConfig, FaultConfig, TrainingConfig
from puna.train.spec import SourceSpec
from puna.train.stage import train_job
from tests.unit.range_server import serving
from tests.unit.token_shards import SIZES, seal, write_shards

pytestmark = pytest.mark.distributed

MODEL = LlamaConfig(
    vocab_size=700, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=8, max_seq_len=16
)
N_STEPS = 8
CURRICULUM = Curriculum(
    [Phase(2, {"web": 0, "code": 1, "notes": 1}, 3)], {"code": 1.5}, "share", N_STEPS
)
WEIGHTS = {"web": 2.0, "code": 1.0, "notes": 1.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seal(write_shards(tmp_path_factory.mktemp("s") / "shards", {"train": SIZES}, 700))


def loader(folder: Path | str, **changes: Any) -> PackedLoader:
    values = {"curriculum": CURRICULUM, **changes}
    return PackedLoader(folder, "train", WEIGHTS, 16, 4, 0, **values)


def run(folder: Path, source: PackedLoader, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    cfg = TrainingConfig(
        steps=N_STEPS, seq_len=16, global_batch=4, nproc=2, precision="fp32",
        checkpoint=CheckpointConfig(every=3, memory_every=0), **values,
    )  # fmt: skip
    events = Ledger(folder / LEDGER_FILE)
    train_job(cfg, MODEL, SourceSpec(**source.spec()), folder / "out", events)
    return folder


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(folder / LEDGER_FILE, "train.step")}


def weights_hash(folder: Path) -> str:
    return hash_file(folder / "out" / "model" / "model.safetensors")


def test_a_killed_run_on_a_store_ends_like_one_on_a_folder(shards: Path, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", loader(shards), prefetch=0)
    with serving(shards) as server:
        remote = loader(server.url, cache=Cache(tmp_path / "cache", 1 << 20))
        fault = FaultConfig(rank=1, step=5, what="kill")
        killed = run(tmp_path / "killed", remote, prefetch=3, fault=fault)
        counted = {name: n for name, n in server.asked.items() if name != "index.json"}
        assert set(counted.values()) == {1}  # two ranks, two attempts, one download
    assert len(list(read_events(killed / LEDGER_FILE, "attempt.start"))) == 2
    assert losses(killed) == losses(plain)
    assert weights_hash(killed) == weights_hash(plain)
    steps = list(read_events(killed / LEDGER_FILE, "train.step"))
    assert all(0 <= event["data_s"] < event["step_s"] for event in steps)
    workers = {event["pid"] for event in read_events(killed / LEDGER_FILE)} - {
        event["pid"] for event in read_events(killed / LEDGER_FILE, "job.start")
    }
    assert not any(process_alive(pid) for pid in workers)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = seal(write_shards(tmp_path / "damaged", {"train": SIZES}, 700))
    path = folder / "train" / "notes" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    return folder


def test_damage_stops_the_run_with_its_name(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"notes/tokens\.bin, bytes 0 to 42.*documents 0 to 4"):
        run(tmp_path / "stops", loader(damaged))


def test_damaged_documents_are_left_out_on_all_ranks(damaged: Path, tmp_path: Path) -> None:
    folder = run(tmp_path / "skips", loader(damaged, on_damage="skip", curriculum=None))
    found = list(read_events(folder / LEDGER_FILE, "data.left_out"))
    assert sorted(event["document_id"] for event in found) == [f"notes-{i:03d}" for i in range(5)]
    assert sorted(losses(folder)) == list(range(N_STEPS))
