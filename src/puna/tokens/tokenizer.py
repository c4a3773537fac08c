"""The tokenizer: text to ids and back, with special tokens that only code can produce.

Every tokenizer is held as the definition that ``tokenizer.json`` holds (the format of the
``tokenizers`` library, read by transformers and many engines), whatever file it came from: Llama
3's ranks, Llama 2's SentencePiece model, GGUF, or ``tokenizer.json`` itself. Those that puna trains
follow Llama 3 exactly: byte-level BPE, its pre-tokenisation pattern, its special tokens.

The *text* of a special token in a document or in a user's message is ordinary text: it becomes
ordinary ids unless ``allow_special=True`` is given.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.fsio import hash_json
from puna.tokens.library import make_engine, once, part_of
from puna.tokens.pieces import REPLACEMENT, Pieces, find_pieces
from puna.tokens.pretokens import is_llama3_pattern, split_huge, valid_text
from puna.tokens.special import EOM, Version, find_roles

if TYPE_CHECKING:
    import numpy as np
    import tokenizers
    from jaxtyping import Int64, UInt32

    from puna.data.kernels.buffers import Texts
    from puna.tokens.bulk import BulkEncoder
    from puna.tokens.chat import ChatFormat, Message

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
BULK_CHARS = 1_000_000
"""From this much text on, encoding is worth loading the compiled path (about a second)."""


class Tokenizer:
    """Turns text into ids and ids into text.

    Args:
        definition: Content of a ``tokenizer.json``, or the library's tokenizer made of it.
        config: Content of its ``tokenizer_config.json``; may be empty.
        where: Named in messages.
        stop_ids: Further ids at which generation stops (``generation_config.json``).
        sentencepiece: The SentencePiece file that the definition was made of.

    Attributes:
        config: Content of ``tokenizer_config.json``.
        vocab_size: Number of ids, special ones included.
        bos_id: Begins every text (Llama 3: ``<|begin_of_text|>``); the end id for tokenizers that
            have none.
        eos_id: Ends a document.
        eot_id: Ends a turn of a conversation; the end id for tokenizers without turns.
        pad_id: Fills unused positions.
        special_ids: Text -> id of the special tokens.
        sentencepiece: The SentencePiece file that the definition was made of, else None.

    Raises:
        PunaError: The definition is damaged, or names no token that ends a text.
    """

    def __init__(
        self,
        definition: str | tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        where: str = TOKENIZER_FILE,
        *,
        stop_ids: Collection[int] = (),
        sentencepiece: bytes | None = None,
    ) -> None:
        self._plain = make_engine(definition, where)
        if isinstance(definition, str):
            self.__dict__["text"] = definition
        self._plain.encode_special_tokens = True
        self.config = dict(config or {})
        self.sentencepiece = sentencepiece
        self._given_stop_ids = frozenset(stop_ids)
        added = {entry.content: id_ for id_, entry in self._added.items()}
        roles = find_roles(added, self.config)
        if roles["eos"] is None:
            raise PunaError(f"{where} has no token that ends a text",
                            f"name it as `eos_token` in {CONFIG_FILE}")  # fmt: skip
        self.eos_id: int = roles["eos"]
        self.bos_id: int = self.eos_id if roles["bos"] is None else roles["bos"]
        self.eot_id: int = self.eos_id if roles["eot"] is None else roles["eot"]
        self.pad_id: int = self.eos_id if roles["pad"] is None else roles["pad"]
        self._eom_id: int = added.get(EOM, self.eos_id)
        self._vocab = self._plain.get_vocab(with_added_tokens=False)
        self.vocab_size: int = max([*self._vocab.values(), *self._added], default=-1) + 1
        self.special_ids: dict[str, int] = {
            entry.content: id_ for id_, entry in self._added.items() if entry.special
        }
        self.special_set = frozenset(self.special_ids.values())
        self._is_llama3 = is_llama3_pattern(part_of(self._plain.pre_tokenizer))

    @cached_property
    def text(self) -> str:
        """The definition as the text of ``tokenizer.json``."""
        return self._plain.to_str(pretty=True) + "\n"

    @cached_property
    def definition(self) -> dict[str, Any]:
        """The definition as ``tokenizer.json`` holds it."""
        return json.loads(self.text)

    @cached_property
    def digest(self) -> str:
        """Identity of the tokenizer: equal digests encode equally."""
        return hash_json(self.definition)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which generation stops.

        They are the ends of text, turn and message, those of ``generation_config.json``, and the
        token with which the chat format ends what the assistant says.
        """
        ends = {self.eos_id, self.eot_id, self._eom_id} | self._given_stop_ids
        return frozenset(ends | (self._chat.end_ids if self._chat else frozenset()))

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._plain.get_added_tokens_decoder()

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """A second instance that knows special tokens by their text; switching one is not safe."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.text)

    @cached_property
    def _bulk(self) -> BulkEncoder | None:
        from puna.tokens.bulk import bulk_encoder

        return bulk_encoder(self.definition) if self._is_llama3 else None

    @cached_property
    def pieces(self) -> Pieces | None:
        """The bytes of each id; None for a tokenizer whose texts are not made by joining bytes."""
        added = {id_: entry.content for id_, entry in self._added.items()}
        return find_pieces(part_of(self._plain.decoder), self._vocab, added, self.vocab_size)

    @property
    def is_compiled(self) -> bool:
        """Whether documents are encoded by the compiled path (tokenizers of Llama 3's kind)."""
        return self._bulk is not None

    @cached_property
    def is_llama3(self) -> bool:
        """Whether the ids follow from the ranks alone, as in Llama 3."""
        from puna.tokens.bpe import all_merges

        if self._bulk is None:
            return False
        model = self.definition["model"]
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        return set(pairs) == set(all_merges(self.tokens()))

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own files say that a text begins with the begin id."""
        named = self.config.get("add_bos_token")
        if isinstance(named, bool):
            return named
        return self._plain.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    def tokens(self) -> list[str]:
        """Return the tokens of the vocabulary as its file writes them, in the order of their ids.

        Added tokens outside the vocabulary are left out.
        """
        return sorted(self._vocab, key=lambda token: self._vocab[token])

    def ranks(self) -> dict[bytes, int]:
        """Return the byte-pair ranks (tiktoken's ``mergeable_ranks``) of a byte-level tokenizer.

        Raises:
            PunaError: It is of another kind.
        """
        if not self.is_byte_level or self.pieces is None:
            raise PunaError("this tokenizer is not byte-level, it has no ranks of byte strings",
                            "use one that puna trained, or Llama 3's")  # fmt: skip
        table = self.pieces.bytes_of
        return {table[id_]: id_ for id_ in sorted(self._vocab.values()) if id_ not in self._added}

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
        for part in self._parts(text):
            ids += engine.encode(part, add_special_tokens=False).ids
        if bos:
            ids = once(ids, self.bos_id)
        if eos and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without begin and end ids."""
        if sum(map(len, texts)) >= BULK_CHARS and self._bulk is not None:
            from puna.data.kernels.buffers import texts_from

            ids, lengths = self._bulk.encode(texts_from([valid_text(text) for text in texts]))
            return [part.tolist() for part in _split(ids, lengths)]
        parts: list[str] = []
        n_parts: list[int] = []
        for text in texts:
            before = len(parts)
            parts += self._parts(text)
            n_parts.append(len(parts) - before)
        encoded = iter(self._plain.encode_batch_fast(parts, add_special_tokens=False))
        return [[id_ for _ in range(n) for id_ in next(encoded).ids] for n in n_parts]

    def _parts(self, text: str) -> list[str]:
        """Cut a text where Llama 3's tokenizer cuts huge ones; other kinds take any length."""
        text = valid_text(text)
        return list(split_huge(text)) if self._is_llama3 else [text]

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
        shown = [id_ for id_ in map(int, ids) if not (skip_special and id_ in self.special_set)]
        if self.pieces is not None:
            data = b"".join(map(self.piece, shown))
            if self.pieces.drops_space and shown and shown[0] not in self._added:
                data = data.removeprefix(b" ")
            return data.decode("utf-8", "replace")
        texts: list[str] = []
        known: list[int] = []
        for id_ in shown:
            if 0 <= id_ < self.vocab_size:
                known.append(id_)
            else:
                texts += [self._plain.decode(known, skip_special_tokens=False), REPLACEMENT]
                known = []
        texts.append(self._plain.decode(known, skip_special_tokens=False))
        return "".join(texts)

    def is_special(self, id_: int) -> bool:
        """Tell whether an id is that of a special token."""
        return int(id_) in self.special_set

    def is_added(self, id_: int) -> bool:
        """Tell whether an id stands for a token beside the vocabulary, special or not."""
        return int(id_) in self._added

    @property
    def is_byte_level(self) -> bool:
        """Whether each id stands for bytes, as in Llama 3: text is decoded piece by piece."""
        return self.pieces is not None and self.pieces.is_byte_level

    def piece(self, id_: int) -> bytes:
        """Return the bytes of one id; the replacement character for ids outside the vocabulary."""
        if not 0 <= id_ < self.vocab_size:
            return REPLACEMENT.encode()
        if self.pieces is None:
            return (self._plain.id_to_token(int(id_)) or REPLACEMENT).encode()
        return self.pieces.bytes_of[id_]

    @cached_property
    def _chat(self) -> ChatFormat | None:
        from puna.tokens.chat import find_format

        return find_format(self)

    @property
    def chat(self) -> ChatFormat:
        """The format of conversations: Llama 3's, Llama 2's, or the model's own template.

        Raises:
            PunaError: The tokenizer knows none.
        """
        if self._chat is None:
            raise PunaError("the tokenizer has no chat format: no template, and neither Llama 2's "
                            "nor Llama 3's special tokens",
                            "use an instruction-tuned model, or one that puna trained")  # fmt: skip
        return self._chat

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a conversation in the model's format, with exactly one begin id.

        Contents never become special ids. (Llama 2's format begins every turn with the begin id.)

        Args:
            messages: ``{"role", "content"}`` each; roles are system, user, assistant and tool.
            add_generation_prompt: End with the opening of the assistant's next message.

        Raises:
            PunaError: A message is malformed, or the tokenizer knows no chat format.
        """
        return self.chat.encode(messages, add_generation_prompt)

    def encode_chat_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant says.

        The mask is true on the assistant's content and on the token that ends it (Llama 3's
        ``<|eot_id|>``).

        Raises:
            PunaError: A message is malformed, or the tokenizer knows no chat format.
        """
        return self.chat.encode_with_mask(messages)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder."""
        from puna.tokens.formats.folder import save_hf

        save_hf(self, folder)

    def save_meta(self, folder: Path) -> None:
        """Write Meta's ``tokenizer.model``: Llama 3's ranks, or Llama 2's SentencePiece model.

        Raises:
            PunaError: The tokenizer is of neither kind, or its special tokens have other names.
        """
        from puna.tokens.formats.folder import save_meta

        save_meta(self, folder)

    def gguf_metadata(self) -> dict[str, Any]:
        """Return the entries ``tokenizer.*`` of a GGUF file.

        Raises:
            PunaError: GGUF has no name for the way this tokenizer cuts text.
        """
        from puna.tokens.formats.gguf import metadata_of

        return metadata_of(self)


def load_tokenizer(path: str | Path, version: Version | None = None) -> Tokenizer:
    """Load a tokenizer, whatever its format.

    Args:
        path: A model folder (Hugging Face's or Meta's), a ``tokenizer.json``, a ``tokenizer.model``
            (Llama 3's ranks or Llama 2's SentencePiece model), or a ``.gguf`` file.
        version: Names of the special tokens after Llama 3's ranks, ``"3.0"`` or ``"3.1"``; by
            default as the files beside them say, and Llama 3.1's if they say nothing.

    Raises:
        PunaError: There is no tokenizer, or it is damaged or of an unknown kind.
    """
    from puna.tokens.formats.folder import open_tokenizer

    return open_tokenizer(Path(path), version)


def _split(
    ids: UInt32[np.ndarray, " n_tokens"], lengths: Int64[np.ndarray, " n_docs"]
) -> list[UInt32[np.ndarray, " n"]]:
    ends = lengths.cumsum()
    return [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]
