"""Meta's own checkpoints: ``params.json`` and ``consolidated.*.pth``, any number of shards.

Opened without torch; read memory-mapped, one tensor at a time. The rows of wq and wk pair element
2i with 2i + 1 in these files and i with i + head_dim / 2 in our models: they are moved on reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from puna.core.errors import PunaError
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import SpecialIds, StoredTable, StoredTensor
from puna.model.formats.hf_config import read_json_object
from puna.model.formats.layout import to_rotate_half
from puna.model.formats.mapped import RELOAD, MappedFile
from puna.model.formats.meta_params import PARAMS_FILE, Measured, Params
from puna.model.formats.meta_shards import Merge, Shards, axis_of
from puna.model.names import EMBEDDING, HEAD, parameter_shapes

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_KV = ("wk", "wv")


class MetaCheckpoint:
    """A Meta folder; see :class:`puna.model.formats.checkpoint.Checkpoint`.

    Args:
        path: Holds ``params.json`` and the shards.
        rope_scaling: How RoPE is scaled, when ``params.json`` does not say it, or says it wrongly.
        rope_factor: The factor alone, of Llama 3.1's kind of scaling.

    Raises:
        PunaError: A file is missing or damaged, a tensor is missing, surplus, of the wrong shape or
            no float, the shards do not fit each other, or RoPE is scaled by an unknown factor.
    """

    kind: Literal["meta"] = "meta"

    def __init__(
        self,
        path: Path,
        *,
        rope_scaling: RopeScaling | LinearScaling | None = None,
        rope_factor: float | None = None,
    ) -> None:
        self.path = path
        params_path = path / PARAMS_FILE
        values = read_json_object(params_path, "point to a folder that holds a Meta checkpoint")
        params = Params(params_path, values)
        self._shards = Shards(path)
        vocab_size = self._shards.rows(HEAD) if HEAD in self._shards else None
        embedding = self._shards.merge_embedding(params.dim, vocab_size)
        tied = vocab_size is None or self._shards.head_is_embedding(embedding)
        measured = Measured(
            vocab_size=embedding.shape[0],
            ffn_dim=self._shards.rows("layers.0.feed_forward.w1.weight"),
            kv_rows=self._shards.rows("layers.0.attention.wk.weight"),
            tie_embeddings=tied,
        )
        self.config: LlamaConfig = params.config(measured, rope_scaling, rope_factor)
        self.notes: list[str] = params.notes
        if tied and vocab_size is not None:
            self.notes.append(f"{HEAD} holds the values of {EMBEDDING}: the head is tied")
        self.special_ids = SpecialIds()  # the tokenizer beside the weights knows them
        self._merges: dict[str, Merge] = {EMBEDDING: embedding}
        self.stored: dict[str, StoredTensor] = self._check()

    def _check(self) -> dict[str, StoredTensor]:
        table = StoredTable(self.config, self.path, PARAMS_FILE)
        expected = parameter_shapes(self.config)
        surplus = []
        for name in self._shards.names:
            if name == HEAD and self.config.tie_embeddings:
                continue
            if name not in expected:
                surplus.append(name)
                continue
            merge = self._merges.setdefault(name, self._merge(name))
            pieces = self._shards.pieces(name)
            n_bytes = sum(piece.n_bytes for piece in pieces)
            table.found[name] = StoredTensor(
                name, name, merge.shape, str(self._shards.dtype(name)), n_bytes,
                tuple(self._shards.files),
            )  # fmt: skip
        return table.finish(surplus)

    def _merge(self, name: str) -> Merge:
        if name == EMBEDDING:
            return self._merges[name]
        if name.endswith("norm.weight"):
            return self._shards.merge(name, None)
        merge = self._shards.merge(name, axis_of(name))
        module = name.rsplit(".", 2)[-2]
        n_shards, n_heads = len(self._shards), self.config.n_kv_heads
        rows = self.config.kv_dim
        if module in _KV and n_shards > n_heads and merge.shape[0] > rows:
            copies, rest = divmod(merge.shape[0], rows)
            if rest == 0 and copies * n_heads == n_shards:
                return Merge(0, (rows, merge.shape[1]), copies)
        return merge

    def tensors(
        self, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
        """Yield (our name, tensor) one at a time, merged and in our layout.

        Raises:
            PunaError: A tensor that all shards must hold alike differs between them.
        """
        maps = [MappedFile(file) for file in self._shards.files]
        for name in list(self.stored if names is None else names):
            yield name, self._ours(name, maps)

    def _ours(self, name: str, maps: list[MappedFile]) -> Float[Tensor, "*shape"]:
        tensor = self._whole(name, maps)
        if name.endswith(("wq.weight", "wk.weight")):
            return to_rotate_half(tensor, self.config.head_dim)
        return tensor

    def _whole(self, name: str, maps: list[MappedFile]) -> Float[Tensor, "*shape"]:
        import torch

        merge = self._merges[name]
        parts = []
        for file, piece in zip(maps, self._shards.pieces(name), strict=True):
            flat = file.tensor(piece.offset_bytes, str(piece.dtype), (piece.n_values,))
            parts.append(flat.as_strided(piece.shape, piece.stride))
        if merge.axis is None:
            self._check_copies(name, [parts])
            return parts[0]
        if merge.copies > 1:
            # Heads follow each other in groups, or, in files of Meta's resharding, go round.
            groups = [parts[at : at + merge.copies] for at in range(0, len(parts), merge.copies)]
            if not _all_equal(groups):
                groups = [parts[at :: len(groups)] for at in range(len(groups))]
            self._check_copies(name, groups)
            parts = [group[0] for group in groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=merge.axis)

    def _check_copies(self, name: str, groups: list[list[Tensor]]) -> None:
        if not _all_equal(groups):
            raise PunaError(
                f"{self.path}: tensor {name} must be the same in all shards, but differs",
                f"the shards are of different checkpoints; {RELOAD}",
            )


def _all_equal(groups: list[list[Tensor]]) -> bool:
    import torch

    def bits(tensor: Tensor) -> Tensor:  # not values: NaN equals itself here
        return tensor.contiguous().view(torch.uint8)

    return all(torch.equal(bits(group[0]), bits(other)) for group in groups for other in group[1:])
