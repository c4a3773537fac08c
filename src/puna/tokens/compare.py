"""Two tokenizers side by side: bytes per token of each source, and what the larger one costs.

A larger vocabulary needs more rows in the embedding and in the output head. It pays by needing
fewer tokens for the same text, and each token saved saves the work of the whole model, and its keys
and values in the cache. From where on it pays follows from three numbers: the two vocabulary sizes
and the ratio of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from puna.data.sources import SourceConfig
    from puna.tokens.tokenizer import Tokenizer

DEFAULT_MAX_BYTES = 2_000_000
"""Text taken of each source."""
KV_BYTES_PER_TOKEN = 131_072
"""Keys and values of a token in Llama 3 8B with 16 bit: 2 x 32 layers x 8 heads x 128 x 2 bytes."""
_PART_CHARS = 1_000_000


@dataclass(frozen=True)
class SourceTokens:
    """Tokens of one source.

    Attributes:
        name: Name of the source.
        n_bytes: UTF-8 of its texts.
        a: Tokens of the first tokenizer.
        b: Tokens of the second.
    """

    name: str
    n_bytes: int
    a: int
    b: int

    @property
    def bytes_per_token(self) -> tuple[float, float]:
        """Bytes per token of the two tokenizers; infinite without tokens."""
        return tuple(self.n_bytes / n if n else float("inf") for n in (self.a, self.b))  # type: ignore[return-value]

    @property
    def saved(self) -> float:
        """Share of the first tokenizer's tokens that the second does not need; may be negative."""
        return 1 - self.b / self.a if self.a else 0.0


@dataclass(frozen=True)
class TokenizerComparison:
    """What two tokenizers make of the same texts, and what their vocabularies cost.

    Attributes:
        sources: One per source.
        vocab_sizes: Ids of the two.
        dim: Width of the model.
        bytes_per_weight: Of the embedding and the head.
        tied: The head shares the embedding's weights.
        kv_bytes_per_token: Keys and values of a token.
    """

    sources: Sequence[SourceTokens]
    vocab_sizes: tuple[int, int]
    dim: int
    bytes_per_weight: float
    tied: bool
    kv_bytes_per_token: int

    @property
    def total(self) -> SourceTokens:
        """All sources together."""
        columns = [(one.n_bytes, one.a, one.b) for one in self.sources]
        return SourceTokens("all", *(sum(column) for column in zip(*columns, strict=True)))

    @property
    def vocab_bytes(self) -> tuple[int, int]:
        """Bytes of embedding and head of the two."""
        copies = 1 if self.tied else 2
        a, b = (int(n * self.dim * copies * self.bytes_per_weight) for n in self.vocab_sizes)
        return a, b

    @property
    def break_even_params(self) -> float | None:
        """Parameters of layers from which on a byte of text costs less with the larger vocabulary.

        Both the work and the weights read per token are those of layers and head, N + V x dim, so
        per byte of text the larger vocabulary wins when (N + V_large x dim) / (N + V_small x dim)
        is below the ratio of the tokens. None when it needs no fewer tokens, so never pays.
        """
        (small, few), (large, many) = self._by_size()
        if few <= many:
            return None
        ratio = few / many
        return max(0.0, self.dim * (large - ratio * small) / (ratio - 1))

    @property
    def break_even_cached_bytes(self) -> float | None:
        """Bytes of text in the cache from which on the keys and values saved outweigh the rows."""
        (_, few), (_, many) = self._by_size()
        saved_per_byte = (few - many) / self.total.n_bytes * self.kv_bytes_per_token
        extra = abs(self.vocab_bytes[1] - self.vocab_bytes[0])
        return extra / saved_per_byte if saved_per_byte > 0 else None

    def _by_size(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return vocabulary size and tokens of the smaller vocabulary, then of the larger."""
        total = self.total
        a, b = sorted(zip(self.vocab_sizes, (total.a, total.b), strict=True))
        return a, b

    def to_json(self) -> dict[str, Any]:
        """Return all numbers."""
        return {
            "sources": [_row(one) for one in self.sources],
            "total": _row(self.total),
            "vocab_size": {"a": self.vocab_sizes[0], "b": self.vocab_sizes[1]},
            "vocab_bytes": {"a": self.vocab_bytes[0], "b": self.vocab_bytes[1]},
            "dim": self.dim,
            "bytes_per_weight": self.bytes_per_weight,
            "tied": self.tied,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "break_even": {
                "layer_params": self.break_even_params,
                "cached_text_bytes": self.break_even_cached_bytes,
            },
        }


def _row(one: SourceTokens) -> dict[str, Any]:
    a, b = one.bytes_per_token
    return {
        "name": one.name, "bytes": one.n_bytes, "tokens": {"a": one.a, "b": one.b},
        "bytes_per_token": {"a": a, "b": b}, "saved": one.saved,
    }  # fmt: skip


def count_tokens(
    a: Tokenizer, b: Tokenizer, sources: Mapping[str, Sequence[str]]
) -> list[SourceTokens]:
    """Count the tokens of two tokenizers in the same texts.

    Args:
        a: The first.
        b: The second.
        sources: Name -> texts.

    Raises:
        PunaError: A source has no text.
    """
    rows = []
    for name, texts in sources.items():
        n_bytes = sum(len(text.encode()) for text in texts)
        if not n_bytes:
            raise PunaError(f"source {name!r} has no text", "give a file or folder with text in it")
        counts = [sum(map(len, tokenizer.encode_batch(list(texts)))) for tokenizer in (a, b)]
        rows.append(SourceTokens(name, n_bytes, counts[0], counts[1]))
    return rows


def default_sources(max_bytes: int) -> dict[str, list[str]]:
    """Return texts that every machine with Python has: source code, docstrings, documentation.

    Args:
        max_bytes: About how much of each.
    """
    from puna.data.sources.python_code import PythonCodeConfig
    from puna.data.sources.python_docs import PythonDocsConfig
    from puna.data.sources.python_reference import PythonReferenceConfig

    exclude = ("stdlib/test/**", "**/tests/**")
    configs: list[SourceConfig] = [
        PythonCodeConfig(max_bytes=2 * max_bytes, exclude=exclude),
        PythonReferenceConfig(max_bytes=8 * max_bytes),  # a fifth of it is documentation
        PythonDocsConfig(max_bytes=4 * max_bytes),
    ]
    return {config.name: list(_texts(config, max_bytes)) for config in configs}


def own_source(name: str, path: Path, max_bytes: int) -> list[str]:
    """Return the texts of a file or a folder, in any format that ``data.ingest`` reads.

    Args:
        name: Name of the source.
        path: File or folder.
        max_bytes: About how much.

    Raises:
        PunaError: There is no such path, the name is no name, or nothing in it can be read.
    """
    from pydantic import ValidationError

    from puna.data.sources.files import FilesConfig

    try:
        config = FilesConfig(name=name, paths=(str(path),))
    except ValidationError as error:
        raise PunaError(
            f"--source {name}={path}: {error.errors()[0]['msg']}",
            "name sources in small letters and digits: --source books=books/",
        ) from error
    texts = list(_texts(config, max_bytes))
    if not texts:
        raise PunaError(f"source {name!r}: no text in {path}", "give a file or folder with text")
    return texts


def _texts(config: SourceConfig, max_bytes: int) -> Iterator[str]:
    """Yield the texts of a source until there are ``max_bytes``."""
    from puna.data.extract import extract
    from puna.data.readers.records import BadRecord, UnusableError
    from puna.data.sources import list_source, open_source

    source, left = open_source(config), max_bytes
    for item in list_source(config):
        for record in source.read(item):
            if isinstance(record, BadRecord):
                continue
            try:
                text, _ = extract(record.content, record.media_type, record.encoding)
            except UnusableError:
                continue
            if not text:
                continue
            yield text[:_PART_CHARS]
            left -= len(text[:_PART_CHARS])
            if left <= 0:
                return
