"""One trainer in a process of its own, told by its parent when to compute a step.

Started by ``bench_train.py``, which gives a JSON object as the only argument; every line on
standard input is one step, every line on standard output the JSON of what it took. Peers import
nothing of puna, so that one may live in another environment. They run as their users run them; ours
in the environment that ``puna`` gives its ranks.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PADDED_ROWS = 8  # documents of a padded forward pass


def make_batch(spec: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    """Random tokens; with ``mean_doc``, packed documents of that many on average (gamma, shape 2).

    Every trainer of a run makes the same ones.
    """
    rng = np.random.default_rng([1, step])
    n_rows, seq_len = spec["rows"], spec["seq_len"]
    tokens = rng.integers(0, spec["vocab"], (n_rows, seq_len + 1))
    docs = np.zeros((n_rows, seq_len), np.int32)
    positions = np.tile(np.arange(seq_len, dtype=np.int32), (n_rows, 1))
    labels = tokens[:, 1:].copy()
    for row in range(n_rows if spec["mean_doc"] else 0):
        start, number = 0, 0
        while start < seq_len:
            length = max(8, int(rng.gamma(2.0, spec["mean_doc"] / 2)))
            stop = min(start + length, seq_len)
            docs[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
            labels[row, stop - 1] = -100  # the last token of a document predicts nothing
            start, number = stop, number + 1
    return {
        "tokens": tokens[:, :-1].copy(), "labels": labels, "docs": docs, "positions": positions
    }  # fmt: skip


def llama(spec: dict[str, Any]) -> Any:
    """The shape in our words."""
    from puna.model.config import LlamaConfig

    return LlamaConfig(
        vocab_size=spec["vocab"], dim=384, n_layers=6, n_heads=6, n_kv_heads=2, ffn_dim=1024,
        max_seq_len=2048, tie_embeddings=False, rope_theta=500000.0,
    )  # fmt: skip


class Ours:
    """Model, step and optimiser of ``puna``, as a rank of a training has them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from puna.train.config import AdamWConfig, ParallelConfig
        from puna.train.optim import make_optimizer
        from puna.train.parallel.model import ParallelModel
        from puna.train.parallel.world import World
        from puna.train.precision import Precision

        dtype = DTYPES[spec["precision"]]
        self.world = World(0, 1, torch.device("cpu"), torch.get_num_threads(), None)
        self.model = ParallelModel(
            llama(spec), spec["seq_len"], spec["rows"], 1, self.world, ParallelConfig(),
            Precision(dtype, "benchmark"),
        )  # fmt: skip
        self.model.fill_random(0)
        config = AdamWConfig(lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY)
        self.optimizer = make_optimizer(config, self.model, self.world, dtype)

    def step(self, batch: dict[str, np.ndarray]) -> float:
        """Compute one step; return the loss."""
        from puna.tokens.loader import Batch
        from puna.train.batch import TensorBatch

        rows = Batch(batch["tokens"], batch["labels"], batch["docs"], batch["positions"])
        loss = self.model.forward_backward(TensorBatch.of(rows, self.world.device))
        self.model.clip_gradients(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


class Peer:
    """A plain loop around a model: autocast, cross entropy of all logits, clipping, fused AdamW."""

    def __init__(self, spec: dict[str, Any], model: torch.nn.Module) -> None:
        self.spec = spec
        self.model = model
        self.run: Any = torch.compile(model) if spec["compiled"] else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Of the forward pass."""
        if self.spec["precision"] == "fp32":
            return nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def logits(self, tokens_BT: Tensor, **extra: Tensor) -> Tensor:
        """Return the logits (B, T, V)."""
        return self.run(tokens_BT)

    def passes(self, batch: dict[str, np.ndarray]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and labels of each forward pass."""
        return [({"tokens_BT": torch.from_numpy(batch["tokens"])}, _tensor(batch["labels"]))]

    def step(self, batch: dict[str, np.ndarray]) -> float:
        """Compute one step; return the loss."""
        n_labels, total = int((batch["labels"] != -100).sum()), 0.0
        for inputs, labels_BT in self.passes(batch):
            with self.autocast():
                logits_BTV = self.logits(**inputs)
            loss = F.cross_entropy(
                logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), reduction="sum"
            )
            (loss / n_labels).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / n_labels


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).long()


class Transformers(Peer):
    """``LlamaForCausalLM`` with PyTorch's fused attention.

    Packed documents either as TRL packs them (position ids, from which transformers makes a
    block-diagonal mask) or each in a row of its own, padded to the longest of a forward pass.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=spec["vocab"], hidden_size=384, intermediate_size=1024,
            num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
            max_position_embeddings=2048, tie_word_embeddings=False,
            attn_implementation="sdpa", use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )  # fmt: skip
        super().__init__(spec, LlamaForCausalLM(config))

    def logits(self, tokens_BT: Tensor, **extra: Tensor) -> Tensor:
        """Return the logits (B, T, V)."""
        return self.run(tokens_BT, **extra).logits

    def passes(self, batch: dict[str, np.ndarray]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and labels of each forward pass."""
        inputs = {"tokens_BT": _tensor(batch["tokens"])}
        if not self.spec["mean_doc"]:
            return [(inputs, _tensor(batch["labels"]))]
        if not self.spec["padded"]:
            inputs["position_ids"] = _tensor(batch["positions"])
            return [(inputs, _tensor(batch["labels"]))]
        documents = []
        for row, docs in enumerate(batch["docs"]):
            edges = [0, *(np.flatnonzero(np.diff(docs)) + 1), len(docs)]
            for start, stop in itertools.pairwise(edges):
                documents.append(
                    (batch["tokens"][row, start:stop], batch["labels"][row, start:stop])
                )
        return [
            self._pad(documents[i : i + PADDED_ROWS]) for i in range(0, len(documents), PADDED_ROWS)
        ]

    @staticmethod
    def _pad(documents: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
        longest = max(len(tokens) for tokens, _ in documents)
        shape = (len(documents), longest)
        tokens_BT, labels_BT = np.zeros(shape, np.int64), np.full(shape, -100)
        mask_BT = np.zeros(shape, np.int64)
        for row, (tokens, labels) in enumerate(documents):
            tokens_BT[row, : len(tokens)], labels_BT[row, : len(labels)] = tokens, labels
            mask_BT[row, : len(tokens)] = 1
        inputs = {"tokens_BT": _tensor(tokens_BT), "attention_mask": _tensor(mask_BT)}
        return inputs, _tensor(labels_BT)


class Plain(Peer):
    """Our model file, which is plain PyTorch, in a plain loop with one fused attention call."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from puna.model.llama import Llama

        model = Llama(llama(spec))
        model.attention_kind = "causal"
        super().__init__(spec, model)


class LitGPT(Peer):
    """LitGPT's model."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from litgpt import GPT, Config

        config = Config(
            block_size=spec["seq_len"], n_layer=6, n_embd=384, n_head=6, n_query_groups=2,
            head_size=64, vocab_size=spec["vocab"], padded_vocab_size=spec["vocab"],
            rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=1024,
            rope_base=500000,
        )  # fmt: skip
        super().__init__(spec, GPT(config))


class Peak:
    """The best rate of large matrix products, as a trainer whose step computes only those."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.dtype, self.rate = DTYPES[spec["precision"]], 0.0

    def step(self, batch: dict[str, np.ndarray]) -> float:
        """Return the best rate in FLOP/s."""
        self.rate = 0.0
        for n in (512, 1024):
            a_NN = torch.ones(n, n, dtype=self.dtype)
            for _ in range(2**26 // n**2):
                begin_s = time.process_time()
                torch.mm(a_NN, a_NN)
                self.rate = max(self.rate, 2 * n**3 / (time.process_time() - begin_s))
        return self.rate


TRAINERS = {
    "puna": Ours, "transformers": Transformers, "plain": Plain, "litgpt": LitGPT, "peak": Peak
}  # fmt: skip


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    trainer = TRAINERS[spec["trainer"]](spec)
    for step, _ in enumerate(sys.stdin):
        batch = make_batch(spec, step)
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        loss = trainer.step(batch)
        cpu_s, wall_s = time.process_time() - begin_cpu_s, time.perf_counter() - begin_s
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        n_labels = int((batch["labels"] != -100).sum())
        told = {"cpu_s": cpu_s, "wall_s": wall_s, "loss": loss, "rss": rss, "labels": n_labels}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
