"""The stage post.sft with real training processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.fsio import hash_file, remove_tree, write_json
from puna.core.ledger import Ledger
from puna.model.config import LlamaConfig
from puna.post.sft import SftConfig, fine_tune
from puna.tokens import bpe
from puna.tokens.lineage import step_lineage
from puna.tokens.tokenizer import Tokenizer

N_SPECIAL = 12
CONFIG = LlamaConfig(
    vocab_size=256 + N_SPECIAL, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64,
    max_seq_len=128,
)  # fmt: skip


def tokenizer() -> Tokenizer:
    return Tokenizer(bpe.definition(bpe.train_ranks([], 256, 1), N_SPECIAL), bpe.tokenizer_config())


def pair(i: int, question: str, answer: str, split: str = "train") -> dict[str, Any]:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"id": f"p{i:03d}", "document_id": f"d{i:03d}", "source": "reference", "split": split,
            "messages": messages}  # fmt: skip


PAIRS = [
    *(pair(i, f"what is {i}?", f" it is {i} ") for i in range(40)),
    pair(40, "long?", "y" * 300),
    pair(41, "held out?", "yes", "heldout"),
]


def artifact(folder: Path, stage: str) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "fingerprint": "f", "content_hash": "c", "metrics": {}, "files": []}
    write_json(folder / "artifact.json", {**record, "config": {}})
    return Artifact(folder)


def make_inputs(root: Path, pairs: list[dict[str, Any]]) -> dict[str, Artifact]:
    from puna.model.formats.hf import save_hf
    from puna.model.llama import Llama

    save_hf(root / "train.pretrain" / "model", CONFIG, Llama(CONFIG).state_dict())
    tokenizer().save(root / "tokens.train")
    (root / "post.pairs").mkdir()
    lines = [json.dumps(one) + "\n" for one in pairs]
    (root / "post.pairs" / "pairs.jsonl").write_text("".join(lines))
    return {
        "model": artifact(root / "train.pretrain", "train.pretrain"),
        "tokenizer": artifact(root / "tokens.train", "tokens.train"),
        "pairs": artifact(root / "post.pairs", "post.pairs"),
    }


def tune(root: Path, inputs: dict[str, Artifact], **config: Any) -> dict[str, Any]:
    out = root / "post.sft.partial"
    out.mkdir(exist_ok=True)
    values = {"seq_len": 128, "global_batch": 4, "optim": {"lr": 1e-2}, **config}
    return fine_tune(SftConfig(**values), inputs, out, Ledger(root / "events.jsonl"))


@pytest.mark.distributed
def test_fine_tuning_learns_the_answers_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, PAIRS)
    metrics = tune(tmp_path, inputs, epochs=4)
    assert metrics["conversations"] == {"in": 41, "kept": 40, "rejected": {"too_long": 1}}
    assert metrics["label_check"]["n_conversations"] >= 4
    example = metrics["label_check"]["example"]
    number = int(example["pair_id"][1:])
    assert example["labels"] == f"it is {number}<|eot_id|>"
    assert metrics["final_loss"] < 0.7 * metrics["first_loss"]
    assert metrics["epochs"] == pytest.approx(4, abs=0.5)
    out = tmp_path / "post.sft.partial"
    assert (out / "model" / "tokenizer.json").is_file()
    (tmp_path / "post.sft").symlink_to(out)  # what the runner's rename does
    rows = step_lineage(tmp_path, 0, "post.sft")
    documents = {part["document_id"] for row in rows for part in row["segments"]}
    assert documents <= {f"d{i:03d}" for i in range(40)}
    assert len(rows) == 4
    first = hash_file(out / "model" / "model.safetensors")
    remove_tree(out)
    tune(tmp_path, inputs, epochs=4)
    assert hash_file(out / "model" / "model.safetensors") == first


def test_conversations_that_do_not_fit_are_an_error_before_any_training(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, PAIRS)
    with pytest.raises(PunaError, match=r"none of 41 conversations .*'too_long': 41"):
        tune(tmp_path, inputs, seq_len=16)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_fault_after_the_last_step_is_an_error(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, PAIRS)
    with pytest.raises(PunaError, match=r"fault\.step=999 never comes"):
        tune(tmp_path, inputs, epochs=1, fault={"step": 999})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"epochs": 1, "steps": 2}, "only one of epochs, steps and tokens"),
        ({"epochs": 0}, "epochs"),
        ({"nproc": 3, "global_batch": 16}, "do not divide"),
        ({"steps": 3, "fault": {"step": 5}}, r"fault\.step=5 never comes"),
    ],
)
def test_wrong_configuration_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SftConfig(**config)


def test_fields_keep_their_defaults() -> None:
    config = SftConfig()
    assert (config.epochs, config.steps, config.optim.lr) == (None, None, 2e-5)
    assert config.with_steps(7).n_steps == 7
    assert config.with_steps(7).optim.lr == 2e-5
    assert SftConfig(optim={"weight_decay": 0.0}).optim.lr == 2e-5
    assert SftConfig(tokens=10_000, seq_len=100, global_batch=10).with_steps(None).n_steps == 10
