"""What every checkpoint format offers: its configuration, its table of tensors, the tensors.

Opening a checkpoint reads headers only and imports no torch, so that `puna model inspect` answers
at once for a checkpoint of any size. Every reader checks the whole table against the configuration
before the first weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.model.names import parameter_shapes

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Tensors: TypeAlias = (
        Mapping[str, Float[Tensor, "*shape"]] | Iterable[tuple[str, Float[Tensor, "*shape"]]]
    )

Kind = Literal["hf", "meta", "gguf"]


@dataclass(frozen=True)
class StoredTensor:
    """One parameter as it lies in the files.

    Attributes:
        name: Our name of the parameter.
        stored_name: Its name in the files.
        shape: Of the whole, merged parameter, (rows, columns).
        dtype: ``float32``, ``bfloat16``, ``float16``, or the name of a GGUF block format
            (``Q4_1``).
        n_bytes: In the files, all shards together.
        files: Those that hold it, in the order of the shards.
    """

    name: str
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    files: tuple[Path, ...]

    @property
    def n_elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that the files beside the weights name; None or empty where they name none."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None


class Checkpoint(Protocol):
    """An opened checkpoint; the headers were read and checked, no weight was."""

    @property
    def kind(self) -> Kind:
        """The format."""
        ...

    @property
    def path(self) -> Path:
        """The folder, or the file of a GGUF checkpoint."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """The model."""
        ...

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Every parameter by our name, in the order of the model.

        A tied head that is stored again does not appear.
        """
        ...

    @property
    def special_ids(self) -> SpecialIds:
        """What the files say about special tokens."""
        ...

    @property
    def notes(self) -> list[str]:
        """What is unusual about the files but no error, one sentence each."""
        ...

    def tensors(
        self, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
        """Yield (our name, tensor) one at a time, in our layout (rotate-half q and k).

        Quantised tensors come as float32 and belong to the caller. Others come as they are stored
        and may be views of the mapped file: copy one before changing it or keeping it beyond the
        file.

        Args:
            names: Only these parameters; all when None.

        Raises:
            PunaError: The file is damaged where a tensor lies.
        """
        ...


@dataclass
class StoredTable:
    """Collects the tensors of a checkpoint and checks them against the configuration.

    Args:
        config: The model.
        where: The checkpoint's path, for messages.
        source: The file that the configuration was read from, for messages.
        spell: Gives the format's name of one of our parameters, for messages.
    """

    config: LlamaConfig
    where: Path
    source: str
    spell: Callable[[str], str] = str
    found: dict[str, StoredTensor] = field(default_factory=dict)

    def finish(self, surplus: Iterable[str] = ()) -> dict[str, StoredTensor]:
        """Return the table in the order of the model.

        Args:
            surplus: Stored names that belong to no parameter of this model.

        Raises:
            PunaError: A tensor is missing, surplus or of the wrong shape; the message names it.
        """
        expected = parameter_shapes(self.config)
        for name, shape in expected.items():
            stored = self.found.get(name)
            if stored is not None and stored.shape != shape:
                raise PunaError(
                    f"{stored.files[0]}: tensor {stored.stored_name} has shape "
                    f"{list(stored.shape)}, {self.source} asks for {list(shape)}"
                    f"{self._about_heads(name, stored.shape)}",
                    f"check that {self.source} and the weights are of one model",
                )
        wrong = [*surplus, *(s.stored_name for n, s in self.found.items() if n not in expected)]
        if wrong:
            raise PunaError(
                f"{self.where}: tensor {wrong[0]} does not belong to this model{more(wrong)}",
                f"check that {self.source} and the weights are of one model",
            )
        missing = [name for name in expected if name not in self.found]
        if missing:
            raise PunaError(
                f"{self.where}: tensor {self.spell(missing[0])} is missing{more(missing)}",
                "download or write the checkpoint again",
            )
        return {name: self.found[name] for name in expected}

    def _about_heads(self, name: str, shape: tuple[int, ...]) -> str:
        """Say what a wrong number of K or V rows means: GQA was dropped or expanded on the way."""
        heads, rest = divmod(shape[0], self.config.head_dim)
        if rest or not name.endswith(("wk.weight", "wv.weight")) or shape[1:] != (self.config.dim,):
            return ""
        what = "grouped-query attention was lost: " if heads == self.config.n_heads else ""
        return f" ({what}{heads} key/value heads instead of {self.config.n_kv_heads})"


def tensor_pairs(
    shapes: Mapping[str, tuple[int, ...]], tensors: Tensors
) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
    """Give a writer its tensors one by one, each checked: exactly those of the configuration.

    A mapping is checked as a whole before this returns, pairs as they come.

    Args:
        shapes: Of the configuration's parameters.
        tensors: Full, unsharded parameters by our names.

    Raises:
        ValueError: A parameter is missing, surplus, there twice, or of the wrong shape.
    """
    if isinstance(tensors, Mapping):
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = sorted(set(given.items()) ^ set(shapes.items()))
        if wrong:
            raise ValueError(f"parameters do not fit the configuration, first of them: {wrong[0]}")
        values = cast("Mapping[str, Tensor]", tensors)
        return ((name, values[name]) for name in shapes)
    return _checked(dict(shapes), tensors)


def _checked(
    waiting: dict[str, tuple[int, ...]], pairs: Iterable[tuple[str, Float[Tensor, "*shape"]]]
) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
    for name, tensor in pairs:
        shape = tuple(tensor.shape)
        if waiting.pop(name, None) != shape:
            raise ValueError(f"parameters do not fit the configuration: {name} of shape {shape}")
        yield name, tensor
        del tensor  # or it would live on while the next one is made
    if waiting:
        raise ValueError(f"parameters do not fit the configuration: no {', '.join(waiting)}")


def more(names: list[str]) -> str:
    """Say how many further names a message leaves out."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def open_checkpoint(path: Path | str, *, rope_factor: float | None = None) -> Checkpoint:
    """Open a checkpoint of any format by what the path holds.

    Args:
        path: A folder of Hugging Face (``config.json``) or Meta (``params.json``) layout, or a
            ``.gguf`` file, or a folder with exactly one.
        rope_factor: Factor of the RoPE scaling of a Meta checkpoint, whose ``params.json`` may ask
            for scaling without naming the factor.

    Raises:
        PunaError: There is no checkpoint, or it is damaged, or a factor is given for a format that
            states its own.
    """
    path = Path(path)
    if not path.exists():
        raise PunaError(f"{path} does not exist", "give a model folder or a .gguf file")
    opener: Any
    if path.is_file():
        from puna.model.formats.gguf import GGUFCheckpoint as opener
    elif (path / "config.json").is_file():
        from puna.model.formats.hf import HFCheckpoint as opener
    elif (path / "params.json").is_file():
        from puna.model.formats.meta import MetaCheckpoint

        return MetaCheckpoint(path, rope_factor=rope_factor)
    else:
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise PunaError(
                f"{path} holds no model: no config.json, no params.json and {len(files)} .gguf "
                "files",
                "give a Hugging Face or Meta folder, or one .gguf file",
            )
        from puna.model.formats.gguf import GGUFCheckpoint as opener

        path = files[0]
    if rope_factor is not None:
        raise PunaError(
            f"--rope-factor is for Meta checkpoints; {path} states its RoPE scaling itself",
            "leave --rope-factor out",
        )
    return opener(path)
