"""Text generation over token ids with a KV cache; shared by evaluation, serving and the terminal.

Sampling is batch-first and every row has its own generator, so that a row's tokens do not depend
on the rows beside it. Random numbers are drawn on the CPU: a seed gives the same draws anywhere.

Shapes: B batch, T tokens, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.sampling import Sampling

if TYPE_CHECKING:
    from puna.model.cache import KVCache
    from puna.model.llama import Llama

__all__ = ["Sampling", "generate", "next_tokens"]


def generate(
    model: Llama,
    prompt_ids: Sequence[int],
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield the ids that continue a prompt, one by one as they are computed.

    Ends at a stop id (which is not yielded), after ``max_new_tokens``, or when the context is full.

    Args:
        model: On any device.
        prompt_ids: At least one id, the begin-of-text id included if the model expects it.
        sampling: How to choose; the defaults when None.
        stop_ids: Any of these ends the generation.

    Raises:
        PunaError: The prompt is empty, too long for the model, or holds an id it does not know;
            before the first id is computed.
    """
    settings = sampling or Sampling()
    prompt = list(prompt_ids)
    _check_prompt(model, prompt)
    return _stream(model, prompt, settings, frozenset(stop_ids))


def next_tokens(
    logits_BV: Float[Tensor, "batch vocab"],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> Int[Tensor, " batch"]:
    """Choose one token per row.

    Temperature, then top-k, then top-p: the smallest set of most likely tokens whose probability
    reaches ``top_p`` (the token that crosses the line is kept).

    Args:
        logits_BV: Of the last position of each row.
        sampling: Temperature 0 takes the most likely token and draws nothing.
        generators: One CPU generator per row; advanced by one draw.

    Returns:
        Ids on the CPU.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).cpu()
    # float64, so that the cumulated probabilities of a large vocabulary reach 1
    scaled_BV = logits_BV.cpu().double() / sampling.temperature
    ids_BV: Tensor
    if 0 < sampling.top_k < scaled_BV.shape[-1]:
        scaled_BV, ids_BV = scaled_BV.topk(sampling.top_k, dim=-1)
    else:
        scaled_BV, ids_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = scaled_BV.softmax(-1)
    if sampling.top_p < 1.0:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    cumulated_BV = probabilities_BV.cumsum(-1)
    draws = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    # The draw lies below the total, so the first place above it has a probability above zero.
    targets_B1 = torch.stack(draws) * cumulated_BV[:, -1:]
    places_B1 = torch.searchsorted(cumulated_BV, targets_B1, right=True)
    return ids_BV.gather(-1, places_B1.clamp_(max=ids_BV.shape[-1] - 1)).squeeze(-1)


def _stream(
    model: Llama, prompt: list[int], sampling: Sampling, stop_ids: frozenset[int]
) -> Iterator[int]:
    room = model.config.max_seq_len - len(prompt)
    generators = [torch.Generator().manual_seed(sampling.seed)]
    cache = model.new_cache()
    new_ids = prompt
    # The last token needs no place in the cache: nothing follows it.
    for _ in range(min(sampling.max_new_tokens, room + 1)):
        chosen = int(_step(model, [new_ids], cache, sampling, generators)[0])
        if chosen in stop_ids:
            return
        yield chosen
        new_ids = [chosen]


@torch.inference_mode()
def _step(
    model: Llama,
    tokens: list[list[int]],
    cache: KVCache,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> Tensor:
    device = model.output_weight.device
    hidden_BTC = model.hidden(torch.tensor(tokens, device=device), cache=cache)
    logits_BV = model.logits(hidden_BTC[:, -1])
    if not bool(torch.isfinite(logits_BV).all()):
        raise PunaError(
            "the model's logits are not finite (NaN or infinity)",
            "check the checkpoint: its training diverged, or float16 overflowed (use bfloat16)",
        )
    return next_tokens(logits_BV, sampling, generators)


def _check_prompt(model: Llama, prompt: list[int]) -> None:
    limit, vocab_size = model.config.max_seq_len, model.config.vocab_size
    if not prompt:
        raise PunaError("the prompt has no tokens", "begin it with the begin-of-text token")
    if len(prompt) > limit:
        raise PunaError(
            f"the prompt has {len(prompt)} tokens, the model's context is {limit}",
            f"shorten the prompt to at most {limit} tokens",
        )
    unknown = [token for token in prompt if not 0 <= token < vocab_size]
    if unknown:
        raise PunaError(
            f"token id {unknown[0]} of the prompt is outside the model's vocabulary of "
            f"{vocab_size}",
            "use the tokenizer that the model was trained with",
        )
