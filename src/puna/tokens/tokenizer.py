"""The tokenizer: text to ids and back, with special tokens that only code can produce.

A model folder holds ``tokenizer.json`` (the format of the ``tokenizers`` library, read by
transformers and many engines) and ``tokenizer_config.json``. Those that puna trains follow Llama 3
exactly: byte-level BPE, its pre-tokenisation pattern, its special tokens. Others are read as well.

The *text* of a special token in a document or in a user's message is ordinary text: it becomes
ordinary ids unless ``allow_special=True`` is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.fsio import hash_json, write_json, write_text
from puna.tokens import chat
from puna.tokens.pretokens import byte_alphabet, split_huge
from puna.tokens.special import EOM, find_roles

if TYPE_CHECKING:
    import numpy as np
    import tokenizers
    from jaxtyping import Int64, UInt32

    from puna.data.kernels.buffers import Texts
    from puna.tokens.bulk import BulkEncoder

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BULK_CHARS = 1_000_000
"""From this much text on, encoding is worth loading the compiled path (about a second)."""


class Tokenizer:
    """Turns text into ids and ids into text.

    Args:
        definition: Content of a ``tokenizer.json``.
        config: Content of its ``tokenizer_config.json``; may be empty.
        where: Named in messages.

    Attributes:
        vocab_size: Number of ids, special ones included.
        bos_id: Begins every text (Llama 3: ``<|begin_of_text|>``); the end id for tokenizers that
            have none.
        eos_id: Ends a document.
        eot_id: Ends a turn of a conversation; the end id for tokenizers without turns.
        pad_id: Fills unused positions.
        stop_ids: Ids at which generation stops.

    Raises:
        PunaError: The definition is damaged, or names no token that ends a text.
    """

    def __init__(
        self, definition: str, config: dict[str, Any] | None = None, where: str = TOKENIZER_FILE
    ) -> None:
        import tokenizers

        self._definition = definition
        self._config = dict(config or {})
        try:
            self._parsed: dict[str, Any] = json.loads(definition)
            self._plain = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises plain Exception
            raise PunaError(
                f"{where} is damaged: {str(error).splitlines()[0]}",
                "copy it again, or train a tokenizer (stage tokens.train)",
            ) from error
        self._plain.encode_special_tokens = True
        added = {entry.content: id_ for id_, entry in self._added.items()}
        roles = find_roles(added, self._config)
        if roles["eos"] is None:
            raise PunaError(f"{where} has no token that ends a text",
                            f"name it as `eos_token` in {CONFIG_FILE}")  # fmt: skip
        self.eos_id: int = roles["eos"]
        self.bos_id: int = self.eos_id if roles["bos"] is None else roles["bos"]
        self.eot_id: int = self.eos_id if roles["eot"] is None else roles["eot"]
        self.pad_id: int = self.eos_id if roles["pad"] is None else roles["pad"]
        stops = {self.eos_id, self.eot_id, added.get(EOM, self.eos_id)}
        self.stop_ids: frozenset[int] = frozenset(stops)
        vocab = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values()) + 1
        self.special_ids: dict[str, int] = {
            entry.content: id_ for id_, entry in self._added.items() if entry.special
        }

    @property
    def digest(self) -> str:
        """Identity of the tokenizer: equal digests encode equally."""
        return hash_json(self._parsed)

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._plain.get_added_tokens_decoder()

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """A second instance that knows special tokens by their text; switching one is not safe."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._definition)

    @cached_property
    def _bulk(self) -> BulkEncoder | None:
        from puna.tokens.bulk import bulk_encoder

        return bulk_encoder(self._parsed)

    @cached_property
    def _pieces(self) -> list[bytes] | None:
        """Bytes of each id of a byte-level tokenizer; None for other kinds."""
        decoder = self._parsed.get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            return None
        alphabet = byte_alphabet()
        pieces = [REPLACEMENT.encode()] * self.vocab_size
        for text, id_ in self._plain.get_vocab(with_added_tokens=False).items():
            pieces[id_] = b"".join(
                bytes((alphabet[char],)) if char in alphabet else char.encode() for char in text
            )
        for id_, entry in self._added.items():
            pieces[id_] = entry.content.encode()
        return pieces

    @property
    def is_compiled(self) -> bool:
        """Whether documents are encoded by the compiled path (tokenizers of Llama 3's kind)."""
        return self._bulk is not None

    def ranks(self) -> dict[bytes, int]:
        """Return the byte-pair ranks (tiktoken's ``mergeable_ranks``) of a byte-level tokenizer.

        Raises:
            PunaError: It is of another kind.
        """
        pieces = self._pieces
        if pieces is None:
            raise PunaError("this tokenizer is not byte-level, it has no ranks of byte strings",
                            "use one that puna trained, or Llama 3's")  # fmt: skip
        ids = self._plain.get_vocab(with_added_tokens=False).values()
        return {pieces[id_]: id_ for id_ in sorted(ids) if id_ not in self._added}

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """Return the ids of a text.

        Args:
            text: Any text; lone surrogates become the replacement character.
            bos: Begin with the begin id, exactly one.
            eos: End with the end id, exactly one.
            allow_special: Read the text of special tokens as the special ids. Only for text from a
                trusted source.
        """
        engine = self._with_special if allow_special else self._plain
        ids: list[int] = []
        for part in split_huge(_clean(text)):
            ids += engine.encode(part, add_special_tokens=False).ids
        if bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if eos and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without begin and end ids."""
        if sum(map(len, texts)) >= BULK_CHARS and self._bulk is not None:
            from puna.data.kernels.buffers import texts_from

            ids, lengths = self._bulk.encode(texts_from([_clean(text) for text in texts]))
            return [part.tolist() for part in _split(ids, lengths)]
        parts: list[str] = []
        n_parts: list[int] = []
        for text in texts:
            before = len(parts)
            parts += split_huge(_clean(text))
            n_parts.append(len(parts) - before)
        encoded = iter(self._plain.encode_batch_fast(parts, add_special_tokens=False))
        return [[id_ for _ in range(n) for id_ in next(encoded).ids] for n in n_parts]

    def encode_documents(
        self, texts: Texts
    ) -> tuple[UInt32[np.ndarray, " n_tokens"], Int64[np.ndarray, " n_docs"]]:
        """Encode a block of documents as begin id + text + end id, by the fastest way there is.

        Args:
            texts: UTF-8 of the documents (:func:`puna.data.kernels.buffers.texts_of`).

        Returns:
            The ids of all documents and the number of ids of each.
        """
        import numpy as np

        if self._bulk is not None:
            return self._bulk.encode(texts, self.bos_id, self.eos_id)
        strings = [bytes(texts.bytes_of(i)).decode() for i in range(len(texts))]
        documents = [[self.bos_id, *ids, self.eos_id] for ids in self.encode_batch(strings)]
        lengths = np.array([len(ids) for ids in documents], np.int64)
        flat = (id_ for ids in documents for id_ in ids)
        return np.fromiter(flat, np.uint32, count=int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of ids; never fails.

        Args:
            ids: Any ids. Bytes that are no valid UTF-8 and ids outside the vocabulary become the
                replacement character.
            skip_special: Leave special tokens out instead of writing their names.
        """
        pieces = self._pieces
        if pieces is not None:
            return b"".join(
                self.piece(id_) for id_ in ids if not (skip_special and self.is_special(id_))
            ).decode("utf-8", "replace")
        texts: list[str] = []
        known: list[int] = []
        for id_ in map(int, ids):
            if 0 <= id_ < self.vocab_size:
                known.append(id_)
            else:
                texts += [self._plain.decode(known, skip_special_tokens=skip_special), REPLACEMENT]
                known = []
        texts.append(self._plain.decode(known, skip_special_tokens=skip_special))
        return "".join(texts)

    def is_special(self, id_: int) -> bool:
        """Tell whether an id is that of a special token."""
        return int(id_) in self._special_set

    @cached_property
    def _special_set(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())

    @property
    def is_byte_level(self) -> bool:
        """Whether each id stands for bytes, as in Llama 3: text is decoded piece by piece."""
        return self._pieces is not None

    def piece(self, id_: int) -> bytes:
        """Return the bytes of one id; the replacement character for ids outside the vocabulary."""
        pieces = self._pieces
        if pieces is None:
            return (self._plain.id_to_token(int(id_)) or REPLACEMENT).encode()
        return pieces[id_] if 0 <= id_ < self.vocab_size else REPLACEMENT.encode()

    def encode_chat(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a conversation in Llama 3's format.

        Args:
            messages: ``{"role", "content"}`` each; roles are system, user, assistant and tool.
            add_generation_prompt: End with the header of the assistant's next message.

        Raises:
            PunaError: A message is malformed, or the tokenizer has no Llama 3 chat tokens.
        """
        ids, _ = chat.encode(self, messages)
        return ids + chat.header(self, "assistant") if add_generation_prompt else ids

    def encode_chat_with_mask(
        self, messages: Sequence[dict[str, str]]
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant says.

        The mask is true on the assistant's content and on the ``<|eot_id|>`` that ends it.

        Raises:
            PunaError: A message is malformed, or the tokenizer has no Llama 3 chat tokens.
        """
        return chat.encode(self, messages)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TOKENIZER_FILE, self._definition)
        write_json(folder / CONFIG_FILE, self._config)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a model folder.

    Args:
        path: The folder, or its ``tokenizer.json``.

    Raises:
        PunaError: There is no ``tokenizer.json``, or it is damaged.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise PunaError(f"{file} does not exist: no tokenizer here",
                        f"give a folder that holds a {TOKENIZER_FILE}, such as the output of "
                        "the stage tokens.train")  # fmt: skip
    config_file = file.with_name(CONFIG_FILE)
    try:
        definition = file.read_text(encoding="utf-8")
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    except ValueError as error:
        raise PunaError(f"the tokenizer in {file.parent} is damaged: {error}",
                        f"copy {TOKENIZER_FILE} and {CONFIG_FILE} again") from error  # fmt: skip
    return Tokenizer(definition, config if isinstance(config, dict) else {}, str(file))


def _clean(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates; pairs of them are the character they mean
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _split(
    ids: UInt32[np.ndarray, " n_tokens"], lengths: Int64[np.ndarray, " n_docs"]
) -> list[UInt32[np.ndarray, " n"]]:
    ends = lengths.cumsum()
    return [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]
