"""Continued pretraining: the loaded loss, new and untrained rows, longer contexts, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import open_checkpoint
from puna.model.formats.gguf import save_gguf
from puna.model.formats.hf import save_hf
from puna.model.formats.load import load_model
from puna.model.formats.meta_save import save_meta
from puna.model.llama import Llama
from puna.model.names import EMBEDDING, HEAD
from puna.resilience.heartbeat import HeartbeatWriter, read_heartbeats
from puna.tokens.loader import PackedLoader
from puna.tokens.tokenizer import load_tokenizer
from puna.tokens.use import UseTokenizerConfig, use_tokenizer
from puna.train import stage as stage_module
from puna.train.config import PretrainConfig
from puna.train.continued import content_digest, extend_context, plan_start
from puna.train.initial import NOISE, fill_rows
from puna.train.loop import train
from puna.train.parallel.world import World
from puna.train.stage import pretrain
from puna.train.start_config import ContextConfig, InitConfig
from tests.unit.byte_model import CONFIG, byte_tokenizer

TEXTS = ["the llama eats grass in the high Andes " * 6, "quinoa and ichu, slowly " * 9] * 4


class InThisProcess:
    """Runs the one rank of a job in this process."""

    n_ranks = 1

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        spec.write()

    def start(self, attempt: int) -> InThisProcess:
        self.folder = self.spec.attempt_dir(attempt)
        self.folder.mkdir(parents=True)
        world = World(0, 1, torch.device("cpu"), 1, None)
        events = Ledger(self.spec.ledger, job=self.spec.job, **self.spec.common)
        train(self.spec.read(self.spec.write()), attempt, world,
              HeartbeatWriter(self.folder, 0), events)  # fmt: skip
        return self

    def prepare(self, attempt: int) -> None:
        pass

    def close(self) -> None:
        pass

    def poll(self) -> int:
        return 0

    def kill(self) -> None:
        pass

    def heartbeats(self) -> Any:
        return read_heartbeats(self.folder)

    def failures(self) -> list[Any]:
        return []

    def log_tail(self) -> str:
        return ""


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "TrainJob", InThisProcess)
    monkeypatch.setattr("puna.train.metrics.measure_peak_flops", lambda *_: 1e9)


def tensors(config: LlamaConfig = CONFIG) -> dict[str, torch.Tensor]:
    model = Llama(config)
    model.init_weights(5)
    return {name: value.detach() for name, value in model.state_dict().items()}


def save(path: Path, kind: str = "hf", config: LlamaConfig = CONFIG,
         values: dict[str, torch.Tensor] | None = None) -> Path:  # fmt: skip
    values = values or tensors(config)
    if kind == "gguf":
        save_gguf(path, config, values, metadata=byte_tokenizer().gguf_metadata())
        return path
    (save_hf if kind == "hf" else save_meta)(path, config, values)
    if kind == "hf":
        byte_tokenizer().save(path)
    else:
        byte_tokenizer().save_meta(path)
    return path


def shards(folder: Path, tokenizer: Any) -> SimpleNamespace:
    where = folder / "train" / "web"
    where.mkdir(parents=True)
    documents = [tokenizer.encode(text, True, True) for text in TEXTS]
    lengths = np.array([len(one) for one in documents])
    np.concatenate(documents).astype(np.uint16).tofile(where / "tokens.bin")
    np.save(where / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(where / "ids.npy", np.array([f"web-{i}" for i in range(len(TEXTS))], "S32"))
    np.save(where / "n_bytes.npy", np.array([len(text) for text in TEXTS]))
    counts = {"n_docs": len(TEXTS), "n_tokens": int(lengths.sum()), "n_bytes": 1}
    (folder / "index.json").write_text(json.dumps({
        "dtype": "uint16", "vocab_size": tokenizer.vocab_size,
        "tokenizer_digest": tokenizer.digest, "splits": {"train": {"web": counts}},
    }))  # fmt: skip
    return SimpleNamespace(path=folder)


def config(path: Path, **values: Any) -> PretrainConfig:
    usual = {"steps": 2, "seq_len": 32, "global_batch": 4, "init": str(path), "precision": "fp32"}
    return PretrainConfig.model_validate({**usual, **values})


def run(tmp_path: Path, cfg: PretrainConfig, inputs: dict[str, Any]) -> Path:
    out = tmp_path / "train.pretrain.partial"
    out.mkdir()
    pretrain(cfg, inputs, out, Ledger(tmp_path / LEDGER_FILE, stage="train.pretrain"))
    return out


def losses(tmp_path: Path) -> list[float]:
    return [event["loss"] for event in read_events(tmp_path / LEDGER_FILE, "train.step")]


def loss_of(model: Llama, folder: Path, cfg: PretrainConfig) -> float:
    batch = PackedLoader(folder, "train", None, cfg.seq_len, cfg.global_batch, cfg.seed) \
        .batch(0, 0, 1)  # fmt: skip
    with torch.no_grad():
        logits = model(
            torch.from_numpy(batch.tokens_BT), torch.from_numpy(batch.positions_BT),
            doc_ids_BT=torch.from_numpy(batch.doc_ids_BT),
        )  # fmt: skip
    labels = torch.from_numpy(batch.labels_BT)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf"])
def test_training_goes_on_from_the_loaded_loss(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / ("m.gguf" if kind == "gguf" else "m"), kind)
    inputs = {"tokens": shards(tmp_path / "tokens", byte_tokenizer())}
    cfg = config(path, steps=6)
    out = run(tmp_path, cfg, inputs)
    found = losses(tmp_path)
    assert found[0] == pytest.approx(
        loss_of(load_model(path, dtype=torch.float32), tmp_path / "tokens", cfg), rel=1e-5
    )
    assert found[-1] < found[0]
    trained = open_checkpoint(out / "model")
    assert trained.config == open_checkpoint(path).config
    assert load_tokenizer(out / "model").digest == load_tokenizer(path).digest
    (event,) = read_events(tmp_path / LEDGER_FILE, "train.init")
    assert event["content"] == content_digest(open_checkpoint(path))
    assert (event["stored_rows"], event["rows"], event["untrained_filled"]) == (268, 268, [])


def extended(tmp_path: Path, names: list[str]) -> SimpleNamespace:
    byte_tokenizer().save(tmp_path)
    folder = tmp_path / "tokens.use"
    folder.mkdir()
    cfg = UseTokenizerConfig(path=str(tmp_path / "tokenizer.json"), add=names)
    metrics = use_tokenizer(cfg, {}, folder, Ledger(None))
    assert metrics["added"] == len(names)
    return SimpleNamespace(path=folder)


def test_new_tokens_get_rows_and_untrained_ones_are_filled(tmp_path: Path) -> None:
    values = tensors()
    values[EMBEDDING][260] = 0.0
    values[EMBEDDING][262] = values[EMBEDDING][263]
    path = save(tmp_path / "m", values=values)
    tokenizer = extended(tmp_path, ["<|tool|>", "<|quinoa|>"])
    new = load_tokenizer(tokenizer.path)
    assert new.encode("<|tool|>", allow_special=True) == [268]
    inputs = {"tokens": shards(tmp_path / "tokens", new), "tokenizer": tokenizer}
    cfg = config(
        path,
        init={"path": str(path), "untrained": "fill"},
        optim={"kind": "adamw", "lr": 1e-9},
        steps=1,
    )
    out = run(tmp_path, cfg, inputs)
    (event,) = read_events(tmp_path / LEDGER_FILE, "train.init")
    assert (event["stored_rows"], event["rows"]) == (268, 270)
    assert event["untrained_filled"] == [260, 262, 263]
    assert event["new_filled"] == [268, 269]
    trained = dict(open_checkpoint(out / "model").tensors())
    filled = [260, 262, 263, 268, 269]
    kept = [row for row in range(268) if row not in filled]
    for name in (EMBEDDING, HEAD):
        table, before = trained[name], values[name][kept]
        torch.testing.assert_close(table[kept], before, rtol=0, atol=1e-6)
        spread = (table[filled] - before.mean(0)) / before.std(0)
        assert spread.abs().max() < 6 * NOISE
        assert spread.std() == pytest.approx(NOISE, rel=0.4)
        assert len(torch.unique(table[filled], dim=0)) == 5


def test_padding_that_gets_a_token_is_filled_like_a_new_row(tmp_path: Path) -> None:
    padded = CONFIG.model_copy(update={"vocab_size": 272})
    path = save(tmp_path / "m", config=padded)
    tokenizer = load_tokenizer(extended(tmp_path, ["<|tool|>", "<|quinoa|>"]).path)
    start = plan_start(InitConfig(path=str(path)), None, tokenizer, tokenizer.digest)
    assert (start.model.vocab_size, start.stored_rows, start.rows) == (272, 272, [268, 269])
    own = plan_start(InitConfig(path=str(path)), None, byte_tokenizer(), "")
    assert (own.model.vocab_size, own.rows) == (272, [])


def test_filled_rows_depend_on_seed_parameter_and_row_alone() -> None:
    table = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    one = fill_rows(EMBEDDING, table, 22, [3, 20, 21], 1)
    again = fill_rows(EMBEDDING, table, 23, [3, 20, 21, 22], 1)
    assert torch.equal(one, again[:22])
    assert not torch.equal(one, fill_rows(EMBEDDING, table, 22, [3, 20, 21], 2))
    assert not torch.equal(one, fill_rows(HEAD, table, 22, [3, 20, 21], 1))
    keep = [row for row in range(20) if row != 3]
    assert torch.equal(one[keep], table[keep])


@pytest.mark.parametrize("context", [{"method": "llama3"}, {"method": "linear"},
                                     {"method": "theta"}])  # fmt: skip
def test_a_longer_context_is_trained_and_written(tmp_path: Path, context: dict[str, str]) -> None:
    path = save(tmp_path / "m")
    inputs = {"tokens": shards(tmp_path / "tokens", byte_tokenizer())}
    cfg = config(path, steps=1, seq_len=300, context={"max_seq_len": 640, **context})
    out = run(tmp_path, cfg, inputs)
    found = open_checkpoint(out / "model").config
    assert found == extend_context(CONFIG, ContextConfig(max_seq_len=640, **context))
    assert found.max_seq_len == 640
    model = Llama(found)
    model.load_state_dict(tensors())
    assert losses(tmp_path)[0] == pytest.approx(loss_of(model, tmp_path / "tokens", cfg), rel=1e-5)


LLAMA3_8B = {"vocab_size": 128_256, "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
             "ffn_dim": 14336, "rope_theta": 500_000.0}  # fmt: skip


def test_8k_becomes_128k_as_llama_3_1_did() -> None:
    old = LlamaConfig(**LLAMA3_8B, max_seq_len=8192)
    new = extend_context(old, ContextConfig(max_seq_len=131_072, factor=8))
    assert new.rope_scaling == RopeScaling(factor=8.0, original_max_seq_len=8192)
    assert (new.max_seq_len, new.rope_theta) == (131_072, 500_000.0)
    middle = extend_context(old, ContextConfig(max_seq_len=32_768, method="linear"))
    assert middle.rope_scaling == LinearScaling(factor=4.0)
    twice = extend_context(middle, ContextConfig(max_seq_len=131_072, method="linear"))
    assert twice.rope_scaling == LinearScaling(factor=16.0)
    longer = extend_context(new, ContextConfig(max_seq_len=262_144))
    assert longer.rope_scaling == RopeScaling(factor=16.0, original_max_seq_len=8192)
    base = extend_context(old, ContextConfig(max_seq_len=32_768, method="theta"))
    assert base.rope_scaling is None
    # the slowest pair of a head of width d turns by theta ** -((d - 2) / d) per position
    slow = [c.rope_theta ** -(126 / 128) for c in (old, base)]
    assert slow[0] / slow[1] == pytest.approx(4.0)
    given = ContextConfig(max_seq_len=32_768, method="theta", rope_theta=8e6)
    assert extend_context(old, given).rope_theta == 8e6


def test_what_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = save(tmp_path / "m")
    tokens = shards(tmp_path / "tokens", byte_tokenizer())

    def refused(words: str, cfg: PretrainConfig, inputs: dict[str, Any]) -> None:
        out = tmp_path / words[:9]
        out.mkdir()
        with pytest.raises(PunaError, match=words) as raised:
            pretrain(cfg, inputs, out, Ledger(tmp_path / LEDGER_FILE))
        assert raised.value.fix

    refused("no token shards", config(path), {})
    refused("does not exist", config(tmp_path / "gone"),
            {"tokens": tokens, "tokenizer": SimpleNamespace(path=path)})  # fmt: skip
    refused("context.max_seq_len = 100 is not longer",
            config(path, context={"max_seq_len": 100}), {"tokens": tokens})  # fmt: skip
    bare = tmp_path / "bare"
    save_hf(bare, CONFIG, tensors())
    refused("has no tokenizer", config(bare), {"tokens": tokens})
    more = extended(tmp_path, ["<|new|>"])
    refused("268 rows and no tokenizer", config(bare), {
        "tokens": shards(tmp_path / "more", load_tokenizer(more.path)), "tokenizer": more,
    })  # fmt: skip
    refused("made by another tokenizer", config(path), {"tokens": tokens, "tokenizer": more})
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    text = byte_tokenizer().text.replace('"<|eom_id|>"', '"<|quipu|>"')
    (swapped / "tokenizer.json").write_text(text)
    refused("is b'<|eom_id|>' to .* but b'<|quipu|>'", config(path), {
        "tokens": shards(tmp_path / "swap", load_tokenizer(swapped)),
        "tokenizer": SimpleNamespace(path=swapped),
    })  # fmt: skip
    scaled = LlamaConfig(**LLAMA3_8B, max_seq_len=16_384, rope_scaling=LinearScaling(factor=2))
    with pytest.raises(PunaError, match="scaled by 'linear' already"):
        extend_context(scaled, ContextConfig(max_seq_len=32_768))
    for values, words in (
        ({"model": {"preset": "tiny"}}, "init brings the shape of the model"),
        ({"init": None, "context": {"max_seq_len": 99}}, "context is for a checkpoint"),
        ({"context": {"max_seq_len": 999, "rope_theta": 9.0}}, "rope_theta=9.0 is for method"),
    ):
        with pytest.raises(ValueError, match=words):
            config(path, **values)


def test_a_token_to_add_must_be_new(tmp_path: Path) -> None:
    for names in (["<|eot_id|>"], ["<|a|>", "<|a|>"], [""]):
        folder = tmp_path / str(len(names))
        byte_tokenizer().save(tmp_path)
        cfg = UseTokenizerConfig(path=str(tmp_path), add=names)
        with pytest.raises(PunaError, match="a token already"):
            use_tokenizer(cfg, {}, folder, Ledger(None))
