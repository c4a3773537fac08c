"""Which family a configuration belongs to, by its numbers; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from puna.model.config import PRESETS, LlamaConfig, RopeScaling

OWN_NUMBERS = "Llama architecture, own numbers"
_LLAMA2_VOCAB, _LLAMA3_VOCAB = 32_000, 128_256
_LLAMA2_THETA, _LLAMA3_THETA = 10_000.0, 500_000.0
_LLAMA2_CONTEXT = 4096


@dataclass(frozen=True)
class Family:
    """A family and the numbers that decide it.

    Attributes:
        name: ``Llama 2``, ``Llama 3``, ``Llama 3.1``, ``Llama 3.2``, or :data:`OWN_NUMBERS`.
        preset: The preset with exactly this configuration, or None.
        because: The deciding numbers in words.
    """

    name: str
    preset: str | None
    because: str

    def describe(self) -> str:
        """Return name and preset in one line."""
        exact = f" (equals preset {self.preset})" if self.preset else ""
        return f"{self.name}{exact}"


def family_of(config: LlamaConfig) -> Family:
    """Tell the family from vocabulary, RoPE and head.

    Llama 3.3 has the numbers of Llama 3.1 and is called that; a fine-tune with further tokens has
    numbers of its own.
    """
    c = config
    scaling = c.rope_scaling
    factor = scaling.factor if isinstance(scaling, RopeScaling) else None
    name = OWN_NUMBERS
    if (c.vocab_size, c.rope_theta) == (_LLAMA2_VOCAB, _LLAMA2_THETA):
        if scaling is None and not c.tie_embeddings and c.max_seq_len == _LLAMA2_CONTEXT:
            name = "Llama 2"
    elif (c.vocab_size, c.rope_theta) == (_LLAMA3_VOCAB, _LLAMA3_THETA):
        known = {
            (None, False): "Llama 3", (8.0, False): "Llama 3.1", (32.0, True): "Llama 3.2",
        }  # fmt: skip
        if factor is not None or scaling is None:
            name = known.get((factor, c.tie_embeddings), OWN_NUMBERS)
    preset = next((key for key in PRESETS if PRESETS.get(key) == config), None)
    return Family(name, preset, _because(c))


def _because(c: LlamaConfig) -> str:
    scaling = "unscaled" if c.rope_scaling is None else (
        f"{c.rope_scaling.kind} scaling x{c.rope_scaling.factor:g}"
    )  # fmt: skip
    head = "tied head" if c.tie_embeddings else "own head"
    return (
        f"vocabulary {c.vocab_size:,}, RoPE theta {c.rope_theta:,.0f}, {scaling}, {head}, "
        f"context {c.max_seq_len:,}"
    )
