"""A small model over single bytes, with its tokenizer, for tests of what runs a language model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from puna.model.config import LlamaConfig
from puna.model.formats.hf import save_hf
from puna.model.llama import Llama
from puna.tokens import bpe
from puna.tokens.tokenizer import Tokenizer

N_SPECIAL = 12
CONFIG = LlamaConfig(
    vocab_size=256 + N_SPECIAL, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48,
    max_seq_len=160,
)  # fmt: skip


def byte_tokenizer() -> Tokenizer:
    """256 bytes and the special tokens, no merges."""
    return Tokenizer(bpe.definition(bpe.train_ranks([], 256, 1), N_SPECIAL), bpe.tokenizer_config())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices only lose by more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_byte_model(path: Path) -> Path:
    """Write a model with its tokenizer as a Hugging Face folder."""
    model = Llama(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)  # sharp enough that the most likely token varies
    save_hf(path, CONFIG, model.state_dict())
    byte_tokenizer().save(path)
    return path
