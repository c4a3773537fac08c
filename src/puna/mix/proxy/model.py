"""A step of a proxy, written out: forward, backward and update in memory that is taken once.

The function is :class:`puna.model.llama.Llama` with a tied head, the loss is the mean cross entropy
per labelled token, the optimiser the trainer's AdamW on all parameters at once. The matrix products
take float32 or bfloat16; the residual stream, norms, softmax, loss, weights and optimiser are
float32. Documents in a row do not see each other.

Shapes: B rows, T tokens of a row, M = B T, C width, F inner width of the feed-forward, V
vocabulary, and those of :mod:`.kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from puna.mix.proxy import kernels
from puna.model.config import LlamaConfig
from puna.model.llama import init_tensor
from puna.model.names import EMBEDDING
from puna.model.rope import RotationTable
from puna.tokens.loader import Batch
from puna.train.fused import loops
from puna.train.fused.rows import as_array
from puna.train.optim import make_optimizer, set_lr
from puna.train.optim_config import AdamWConfig

_PART_ROWS = 256


def _names(config: LlamaConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return names and shapes of matrices and of norms, in the order of their places."""
    c, kv, f = config.dim, config.kv_dim, config.ffn_dim
    matrices: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, c)}
    norms: dict[str, tuple[int, ...]] = {}
    for layer in range(config.n_layers):
        at = f"layers.{layer}."
        for name, shape in (
            ("attention.wq", (c, c)), ("attention.wk", (kv, c)), ("attention.wv", (kv, c)),
            ("attention.wo", (c, c)), ("feed_forward.w1", (f, c)), ("feed_forward.w3", (f, c)),
            ("feed_forward.w2", (c, f)),
        ):  # fmt: skip
            matrices[f"{at}{name}.weight"] = shape
        norms |= {f"{at}attention_norm.weight": (c,), f"{at}ffn_norm.weight": (c,)}
    return matrices, norms | {"norm.weight": (c,)}


class _Flat:
    """Parameters in two pieces of memory, matrices and norms: one update each."""

    def __init__(self, n_matrices: int, n_norms: int) -> None:
        self.matrices = nn.Parameter(torch.zeros(n_matrices, 1))
        self.norms = nn.Parameter(torch.zeros(n_norms))
        self.grads = torch.zeros_like(self.matrices), torch.zeros_like(self.norms)
        self.matrices.grad, self.norms.grad = self.grads

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield both: a matrix of one column is decayed as matrices are, a vector is not."""
        yield "matrices", self.matrices
        yield "norms", self.norms


@dataclass
class _Layer:
    """Weights of a layer, their gradients, and what the backward pass needs."""

    weights: list[Tensor]
    grads: list[Tensor]
    norm_weights: list[np.ndarray]
    norm_grads: list[Tensor]
    kept: dict[str, Tensor]
    arrays: dict[str, np.ndarray]


def _views(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    made, at = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        made[name] = flat.view(-1)[at : at + size].view(shape)
        at += size
    return made


class ProxyModel:
    """A proxy in training; made once, then filled anew for each run.

    Args:
        config: Shape; the head must be tied.
        n_rows: Rows of a step, B.
        seq_len: Tokens of a row, T.
        optim: Optimiser.
        dtype: Of the matrix products: float32 or bfloat16.
    """

    def __init__(
        self, config: LlamaConfig, n_rows: int, seq_len: int, optim: AdamWConfig,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        if not config.tie_embeddings:
            raise ValueError("proxies have a tied head")
        self.config, self.n_rows, self.seq_len, self.dtype = config, n_rows, seq_len, dtype
        self._matrices, self._norms = _names(config)
        sizes = [
            sum(int(np.prod(s)) for s in one.values()) for one in (self._matrices, self._norms)
        ]
        self._flat = _Flat(*sizes)
        self._optim = optim
        own = dtype == torch.float32
        self._weights = self._flat.matrices.detach() if own else torch.zeros(sizes[0], dtype=dtype)
        self._grads = self._flat.grads[0] if own else torch.zeros(sizes[0], dtype=dtype)
        self._take_memory()
        self.fill(0)

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Begin anew: the trainer's initial weights of a seed, an empty optimiser."""
        for shapes, flat in (
            (self._matrices, self._flat.matrices),
            (self._norms, self._flat.norms),
        ):
            for name, view in _views(flat.detach(), shapes).items():
                view.copy_(init_tensor(name, tuple(view.shape), seed, self.config))
        self._optimizer = make_optimizer(self._optim, self._flat, dtype=self.dtype)
        self._narrow_weights()

    def tensors(self) -> dict[str, Tensor]:
        """Return the live parameters by the names of the trainer's model."""
        flat = self._flat
        return _views(flat.matrices.detach(), self._matrices) | _views(
            flat.norms.detach(), self._norms
        )

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the last :meth:`forward_backward`, of the summed loss."""
        of_matrices, of_norms = self._flat.grads
        return _views(of_matrices, self._matrices) | _views(of_norms, self._norms)

    @torch.no_grad()
    def step(self, batch: Batch, lr: float, clip_norm: float) -> float:
        """Train on a batch; return its mean loss in nats per labelled token.

        Args:
            batch: Rows.
            lr: Learning rate.
            clip_norm: The gradient of the mean loss is scaled down to this norm; 0 leaves it.
        """
        nats, n_labelled = self.forward_backward(batch)
        of_matrices, of_norms = self._flat.grads
        norm = float(torch.hypot(of_matrices.norm(), of_norms.norm())) / n_labelled
        factor = (clip_norm / norm if 0 < clip_norm < norm else 1.0) / n_labelled
        of_matrices.mul_(factor)
        of_norms.mul_(factor)
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._narrow_weights()
        return nats / n_labelled

    @torch.no_grad()
    def forward_backward(self, batch: Batch) -> tuple[float, int]:
        """Leave the gradient of the summed loss; return that loss and the labelled tokens."""
        nats_M, n_labelled = self._forward(batch)
        self._backward()
        return float(nats_M.sum()), n_labelled

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> np.ndarray:
        """Return the summed cross entropy of each row in nats; nothing changes."""
        nats_M, _ = self._forward(batch)
        return nats_M.reshape(self.n_rows, self.seq_len).sum(1, dtype=np.float64)

    def _narrow_weights(self) -> None:
        if self.dtype != torch.float32:
            self._weights.copy_(self._flat.matrices.detach().view(-1))

    def _take_memory(self) -> None:
        cfg, rows, t = self.config, self.n_rows, self.seq_len
        m, c, f, d = rows * t, cfg.dim, cfg.ffn_dim, cfg.head_dim
        groups, shared = rows * cfg.n_kv_heads, cfg.n_heads // cfg.n_kv_heads
        weights, grads = (_views(x, self._matrices) for x in (self._weights, self._grads))
        norm_weights = _views(self._flat.norms.detach(), self._norms)
        norm_grads = _views(self._flat.grads[1], self._norms)
        wide = c + 2 * cfg.kv_dim
        self._layers: list[_Layer] = []
        for layer in range(cfg.n_layers):
            at = f"layers.{layer}."
            norms = [f"{at}attention_norm.weight", f"{at}ffn_norm.weight"]
            kept = self._kept_by_layer(m, groups, t * shared)
            self._layers.append(
                _Layer(
                    _matrices_of(weights, at, wide), _matrices_of(grads, at, wide),
                    [as_array(norm_weights[name]) for name in norms],
                    [norm_grads[name] for name in norms], kept, _arrays(kept),
                )
            )  # fmt: skip
        self._head, self._head_grad = weights[EMBEDDING], grads[EMBEDDING]
        self._embedding = self.tensors()[EMBEDDING]
        self._embedding_grad = self.gradients()[EMBEDDING]
        self._norm = as_array(norm_weights["norm.weight"])
        self._norm_grad = norm_grads["norm.weight"]
        narrow = self._zeros
        self._own = {
            "h": torch.zeros(m, c), "x": narrow(m, c), "scale": torch.zeros(m),
            "logits": narrow(m, cfg.vocab_size), "y": narrow(m, c), "wide": narrow(m, wide),
            "grad": torch.zeros(m, c), "part": torch.zeros(m, c), "narrow": narrow(m, c),
            "gate": narrow(m, f), "up": narrow(m, f), "z": narrow(m, f),
            "s": narrow(groups, t * shared, t), "do": narrow(groups, t * shared, d),
            "dq": narrow(groups, t * shared, d), "dk": narrow(groups, t, d),
            "dv": narrow(groups, t, d), "mean": torch.zeros(groups * t * shared),
            "nats": torch.zeros(m), "log_sum": torch.zeros(max(m, groups * t * shared)),
            "sums": torch.zeros(-(-m // _PART_ROWS), c),
        }  # fmt: skip
        self._np = _arrays(self._own)
        self._end = np.tile(np.repeat(np.arange(1, t + 1), shared), groups)
        self._begin = np.zeros((rows, cfg.n_kv_heads, t, shared), np.int64)
        self._cos, self._sin = (np.zeros((m, d // 2), np.float32) for _ in range(2))
        table = RotationTable(cfg).at(t, None, torch.device("cpu"))
        self._table = table.cos.contiguous().numpy(), table.sin.contiguous().numpy()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype)

    def _kept_by_layer(self, m: int, groups: int, queries: int) -> dict[str, Tensor]:
        """Return memory for what the backward pass of a layer needs."""
        cfg, t, narrow = self.config, self.seq_len, self._zeros
        c, f, d = cfg.dim, cfg.ffn_dim, cfg.head_dim
        return {
            "h": torch.zeros(m, c), "x": narrow(m, c), "scale": torch.zeros(m),
            "q": narrow(groups, queries, d), "k": narrow(groups, t, d), "v": narrow(groups, t, d),
            "p": narrow(groups, queries, t), "o": narrow(groups, queries, d), "a": narrow(m, c),
            "h2": torch.zeros(m, c), "x2": narrow(m, c), "scale2": torch.zeros(m),
            "gate": narrow(m, f), "up": narrow(m, f), "z": narrow(m, f),
        }  # fmt: skip

    def _take_batch(self, batch: Batch) -> None:
        if batch.tokens_BT.shape != (self.n_rows, self.seq_len):
            raise ValueError(f"a batch of {batch.tokens_BT.shape}")
        positions_BT = batch.positions_BT
        first_BT = np.arange(self.seq_len) - positions_BT
        self._begin[...] = first_BT[:, None, :, None]
        np.take(self._table[0], positions_BT.reshape(-1), axis=0, out=self._cos)
        np.take(self._table[1], positions_BT.reshape(-1), axis=0, out=self._sin)
        self._token_M = np.ascontiguousarray(batch.tokens_BT.reshape(-1))

    def _forward(self, batch: Batch) -> tuple[np.ndarray, int]:
        """Return the cross entropy of each token, and leave the gradient of the logits."""
        self._take_batch(batch)
        m, t, own, a = self.n_rows * self.seq_len, self.seq_len, self._own, self._np
        begin, factor, eps = (
            self._begin.reshape(-1),
            self.config.head_dim**-0.5,
            self.config.norm_eps,
        )
        h = self._layers[0].kept["h"]
        torch.index_select(self._embedding, 0, torch.from_numpy(self._token_M), out=h)
        for number, layer in enumerate(self._layers):
            kept, k = layer.kept, layer.arrays
            w_qkv, w_o, w_1, w_3, w_2 = layer.weights
            loops.norm(0, m, k["h"], layer.norm_weights[0], eps, k["x"], k["scale"])
            torch.mm(kept["x"], w_qkv.T, out=own["wide"])
            kernels.split_heads(a["wide"], self._cos, self._sin, t, k["q"], k["k"], k["v"])
            torch.bmm(kept["q"], kept["k"].transpose(1, 2), out=kept["p"])
            loops.softmax(
                0, len(begin), k["p"].reshape(len(begin), t), begin, self._end, factor, a["log_sum"]
            )
            torch.bmm(kept["p"], kept["v"], out=kept["o"])
            kernels.by_token(k["o"], t, k["a"])
            torch.mm(kept["a"], w_o.T, out=own["y"])
            kernels.add(k["h"].reshape(-1), a["y"].reshape(-1), k["h2"].reshape(-1))
            loops.norm(0, m, k["h2"], layer.norm_weights[1], eps, k["x2"], k["scale2"])
            torch.mm(kept["x2"], w_1.T, out=kept["gate"])
            torch.mm(kept["x2"], w_3.T, out=kept["up"])
            loops.gate(0, m, k["gate"], k["up"], k["z"])
            torch.mm(kept["z"], w_2.T, out=own["y"])
            last = number + 1 == len(self._layers)
            after = a["h"] if last else self._layers[number + 1].arrays["h"]
            kernels.add(k["h2"].reshape(-1), a["y"].reshape(-1), after.reshape(-1))
        loops.norm(0, m, a["h"], self._norm, eps, a["x"], a["scale"])
        torch.mm(own["x"], self._head.T, out=own["logits"])
        label_M = batch.labels_BT.reshape(-1)
        without = np.flatnonzero(label_M < 0)
        label_M = np.maximum(label_M, 0)
        loops.cross_entropy(0, m, a["logits"], label_M, 0.0, a["nats"], a["log_sum"])
        a["nats"][without] = 0.0
        a["logits"][without] = 0
        return a["nats"], m - len(without)

    def _norm_back(
        self, h: np.ndarray, weight: np.ndarray, scale: np.ndarray, weight_grad: Tensor, *,
        first: bool = False,
    ) -> None:  # fmt: skip
        """Take the gradient of a norm's output to that of the residual stream."""
        a = self._np
        a["sums"][:] = 0.0
        loops.norm_backward(
            0, len(a["sums"]), a["y"], h, weight, scale, _PART_ROWS, a["part"], a["sums"]
        )
        weight_grad.copy_(self._own["sums"].sum(0))
        if first:
            a["grad"][:] = 0.0
        kernels.add_narrow(a["grad"].reshape(-1), a["part"].reshape(-1), a["narrow"].reshape(-1))

    def _backward(self) -> None:
        m, t, own, a = self.n_rows * self.seq_len, self.seq_len, self._own, self._np
        begin, factor = self._begin.reshape(-1), self.config.head_dim**-0.5
        torch.mm(own["logits"].T, own["x"], out=self._head_grad)
        torch.mm(own["logits"], self._head, out=own["y"])
        self._norm_back(a["h"], self._norm, a["scale"], self._norm_grad, first=True)
        for layer in reversed(self._layers):
            kept, k = layer.kept, layer.arrays
            w_qkv, w_o, w_1, w_3, w_2 = layer.weights
            g_qkv, g_o, g_1, g_3, g_2 = layer.grads
            torch.mm(own["narrow"].T, kept["z"], out=g_2)
            torch.mm(own["narrow"], w_2, out=own["z"])
            loops.gate_backward(0, m, a["z"], k["gate"], k["up"], a["gate"], a["up"])
            torch.mm(own["gate"].T, kept["x2"], out=g_1)
            torch.mm(own["up"].T, kept["x2"], out=g_3)
            torch.mm(own["gate"], w_1, out=own["y"])
            own["y"].addmm_(own["up"], w_3)
            self._norm_back(k["h2"], layer.norm_weights[1], k["scale2"], layer.norm_grads[1])
            torch.mm(own["narrow"].T, kept["a"], out=g_o)
            torch.mm(own["narrow"], w_o, out=own["y"])
            kernels.by_group(a["y"], t, a["do"])
            d = k["o"].shape[2]
            loops.dots(0, len(begin), k["o"].reshape(-1, d), a["do"].reshape(-1, d), a["mean"])
            torch.bmm(own["do"], kept["v"].transpose(1, 2), out=own["s"])
            torch.bmm(kept["p"].transpose(1, 2), own["do"], out=own["dv"])
            kernels.softmax_gradient(
                k["p"].reshape(-1, t), a["s"].reshape(-1, t), begin, self._end, factor, a["mean"]
            )
            torch.bmm(own["s"], kept["k"], out=own["dq"])
            torch.bmm(own["s"].transpose(1, 2), kept["q"], out=own["dk"])
            kernels.join_heads(a["dq"], a["dk"], a["dv"], self._cos, self._sin, t, a["wide"])
            torch.mm(own["wide"].T, kept["x"], out=g_qkv)
            torch.mm(own["wide"], w_qkv, out=own["y"])
            self._norm_back(k["h"], layer.norm_weights[0], k["scale"], layer.norm_grads[0])
        if self.dtype != torch.float32:
            self._flat.grads[0].view(-1).copy_(self._grads)
        kernels.add_rows(a["grad"], self._token_M, as_array(self._embedding_grad))


def _matrices_of(views: dict[str, Tensor], at: str, wide: int) -> list[Tensor]:
    """Return the matrices of a layer; queries, keys and values stand side by side: one matrix."""
    first = views[f"{at}attention.wq.weight"]
    return [
        first.as_strided((wide, first.shape[1]), (first.shape[1], 1)),
        views[f"{at}attention.wo.weight"],
        *(views[f"{at}feed_forward.{name}.weight"] for name in ("w1", "w3", "w2")),
    ]


def _arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: as_array(one) for name, one in tensors.items()}
