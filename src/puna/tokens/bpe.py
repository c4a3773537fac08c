"""Training byte-level BPE, and the ``tokenizer.json`` around the trained ranks.

The ranks are all there is to Llama 3's tokenizer: a piece that is a token stays whole, else the
neighbours whose concatenation has the lowest rank merge first. ``tokenizer.json`` wants a list of
merges instead; listing *every* way to split each token into two tokens, in the order of the ranks,
says the same (this is how Llama 3's own file was made).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.tokens.chat.llama3 import LLAMA3_TEMPLATE
from puna.tokens.pretokens import LLAMA3_PATTERN, byte_alphabet
from puna.tokens.special import BOS, EOS, PAD, special_names

if TYPE_CHECKING:
    import tokenizers

MAX_TOKEN_BYTES = 128
"""Longest token, as in Llama 3's vocabulary."""


def train_ranks(batches: Iterable[Sequence[str]], n_ranks: int, min_frequency: int) -> list[str]:
    """Train byte-pair merges.

    The result does not depend on the order of the texts or on the number of threads: pairs are
    counted over the whole corpus, and of equally frequent pairs the one with the lowest ids wins.

    Args:
        batches: The corpus, as lists of texts; read once.
        n_ranks: Tokens wanted, the 256 bytes included.
        min_frequency: A pair must occur this often to be merged.

    Returns:
        The tokens in the order of their ranks, written in the byte alphabet; fewer than wanted when
        the corpus has no more pairs that are frequent enough.
    """
    from tokenizers import Tokenizer, models, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=n_ranks,
        min_frequency=min_frequency,
        initial_alphabet=list(byte_alphabet()),
        max_token_length=MAX_TOKEN_BYTES,
        special_tokens=[],
        show_progress=False,
    )
    engine.train_from_iterator(batches, trainer)
    vocab = engine.get_vocab(with_added_tokens=False)
    return sorted(vocab, key=lambda token: vocab[token])


def all_merges(ranks: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair of tokens that forms a token, in the order of the rank of what it forms.

    Args:
        ranks: Tokens in the order of their ranks, in the byte alphabet.
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    merges: list[tuple[str, str]] = []
    for token in ranks:
        known = [
            (left, right)
            for i in range(1, len(token))
            if (left := token[:i]) in rank_of and (right := token[i:]) in rank_of
        ]
        if len(known) > 1:
            known.sort(key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
        merges += known
    return merges


def llama3_engine(ranks: Sequence[str], names: Sequence[str]) -> tokenizers.Tokenizer:
    """Make the library's tokenizer of ranks with Llama 3's pattern and special tokens after them.

    Args:
        ranks: Tokens in the order of their ranks, in the byte alphabet.
        names: Special tokens in the order of their ids.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    vocab = {token: rank for rank, token in enumerate(ranks)}
    engine = Tokenizer(models.BPE(vocab=vocab, merges=all_merges(ranks), ignore_merges=True))
    engine.pre_tokenizer = _pre_tokenizer()
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos_id = engine.token_to_id(BOS)
    engine.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
    )
    return engine


def definition(ranks: Sequence[str], n_special: int) -> str:
    """Write the ``tokenizer.json`` of ranks with Llama 3.1's special tokens after them.

    Args:
        ranks: Tokens in the order of their ranks, in the byte alphabet.
        n_special: Number of special tokens.
    """
    return llama3_engine(ranks, special_names(n_special)).to_str(pretty=True) + "\n"


def tokenizer_config(names: Collection[str] = (BOS, EOS, PAD)) -> dict[str, Any]:
    """Return the ``tokenizer_config.json`` with which transformers uses the tokenizer.

    Args:
        names: Its special tokens; Llama 3.0's have none for padding.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        **({"pad_token": PAD} if PAD in names else {}),
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": LLAMA3_TEMPLATE,
    }


def check_enough(n_found: int, n_wanted: int, n_special: int, n_bytes: int) -> None:
    """Check that training found as many tokens as were asked for.

    Raises:
        PunaError: The corpus is too small for the vocabulary.
    """
    if n_found < n_wanted:
        raise PunaError(
            f"{n_bytes} bytes of text give only {n_found + n_special} of the "
            f"{n_wanted + n_special} ids of `tokens.train.vocab_size`",
            f"set `tokens.train.vocab_size` to {n_found + n_special} or less, lower "
            "`tokens.train.min_frequency`, or bring more text",
        )


def _pre_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
