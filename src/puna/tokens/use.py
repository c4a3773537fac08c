"""Stage ``tokens.use``: a tokenizer that exists already, perhaps with more special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage


class UseTokenizerConfig(Config):
    """A tokenizer to encode with, usually that of the checkpoint that training goes on from."""

    path: str
    """A model folder, tokenizer.json, tokenizer.model or .gguf file."""
    add: list[str] = Field(default_factory=list)
    """Special tokens to add behind the others; training initialises their rows."""


def _state_of_file(cfg: UseTokenizerConfig) -> Any:
    """Size and time of the file: a change is reported on a rerun."""
    path = Path(cfg.path).expanduser()
    if not path.is_file():
        return None
    return [path.stat().st_size, path.stat().st_mtime_ns]


@stage("tokens.use", external_state=_state_of_file)
def use_tokenizer(cfg: UseTokenizerConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Take a tokenizer that exists, in place of tokens.train; special tokens can be added.

    Writes ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        PunaError: There is no tokenizer, it is damaged, or a token to add is known already.
    """
    import tokenizers

    from puna.tokens.tokenizer import Tokenizer, load_tokenizer

    found = load_tokenizer(Path(cfg.path).expanduser())
    n_before = found.vocab_size
    if cfg.add:
        engine = tokenizers.Tokenizer.from_str(found.text)
        for token in cfg.add:
            if not token or engine.token_to_id(token) is not None:
                raise PunaError(f"add: {token!r} is empty, there twice or a token already",
                                "give names that the tokenizer does not have")  # fmt: skip
            engine.add_special_tokens([tokenizers.AddedToken(token, special=True)])
        found = Tokenizer(engine.to_str(pretty=True) + "\n", found.config)
    found.save(out)
    return {
        "vocab_size": found.vocab_size,
        "added": found.vocab_size - n_before,
        "digest": found.digest,
        "headline": f"{found.vocab_size} ids, {found.vocab_size - n_before} of them added",
    }
