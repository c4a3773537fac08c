"""Megatron-LM's arguments: a script, a list of arguments, or YAML.

Names and defaults are those of its ``megatron/training/arguments.py`` of 2025 and its functional
tests' ``model_config.yaml``; the experimental ``--yaml-cfg`` has the same names with underscores.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.plan.importers.found import Imported, Settings

_ASSIGNED = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=([^\s()]*|\"[^\"]*\")\s*(?:#.*)?$")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*|\d)(?::-([^}]*))?\}?")
_PRODUCT = re.compile(r"\$\(\(\s*(\$?\w+)\s*\*\s*(\$?\w+)\s*\)\)")
_ARRAY = re.compile(r"\b\w+\+?=\(")
_OPTION = re.compile(r"--[A-Za-z]")


def read_megatron(text: str, path: Path) -> Imported:
    """Read arguments of Megatron-LM.

    Args:
        text: Content of the file.
        path: Its name, for messages; YAML ends in ``.yaml``.

    Raises:
        PunaError: It cannot be read, or describes no Llama.
    """
    values = _of_yaml(text, path) if path.suffix in (".yaml", ".yml") else _of_script(text)
    if not values:
        raise PunaError(
            f"{path}: no setting of Megatron-LM found", "it has lines like --num-layers 32"
        )
    settings = Settings(values)
    found = Imported("Megatron-LM", None)
    try:
        found.model = _model(settings, found.notes)
        found.values = _job(settings, found)
    except ValueError as error:
        raise PunaError(f"{path}: {error}", "mend the file, or give it as an option") from error
    found.unknown = [f"--{name}" for name in settings.unused()]
    return found


def _of_yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PunaError(f"{path}: not YAML: {error}", "give Megatron-LM's YAML") from error
    if not isinstance(values, dict):
        raise PunaError(f"{path}: not a table of settings", "give Megatron-LM's YAML")
    return dict(_flat(values.get("MODEL_ARGS", values)))


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield _plain(str(name)), value


def _plain(name: str) -> str:
    return name.removeprefix("--").replace("_", "-")


def _of_script(text: str) -> dict[str, Any]:
    """Return the options of a script; plain assignments of the shell are put in for variables."""
    known: dict[str, str] = {}
    words: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        assigned = _ASSIGNED.match(line)
        if assigned:
            known[assigned[1]] = _filled(assigned[2].strip("'\""), known)
            continue
        product = re.match(r"^\s*([A-Za-z_]\w*)=(\$\(\(.*\)\))", line)
        if product and (sizes := _PRODUCT.match(product[2])):
            a, b = (known.get(size.lstrip("$"), size.lstrip("$")) for size in sizes.groups())
            if a.isdigit() and b.isdigit():
                known[product[1]] = str(int(a) * int(b))
            continue
        if _OPTION.search(line):
            words += _words(_filled(line, known))
    values: dict[str, Any] = {}
    if not words:
        return values
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if _OPTION.match(word):
            name, equals, value = word.partition("=")
            is_flag = after.startswith("-") and not re.fullmatch(r"-[\d.]+.*", after)
            values[_plain(name)] = value if equals else True if is_flag else after
    return values


def _filled(text: str, known: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda m: known.get(m[1], m[2] if m[2] is not None else m[0]), text)


def _words(line: str) -> list[str]:
    line = _ARRAY.sub(" ", line)
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quotation that ends on another line
        words = line.split("#")[0].split()
    # An array's element may be one quoted option with its value; ends of arrays hold parentheses.
    return [part.strip("()") for word in words for part in word.split() if part.strip("()")]


def _model(s: Settings, notes: list[str]) -> LlamaConfig:
    if s.number("num-experts", "num-moe-experts", default=0) > 1:
        raise ValueError("num-experts: a mixture of experts is no Llama, and cannot be priced")
    layers, dim = s.number("num-layers"), s.number("hidden-size")
    heads = s.number("num-attention-heads")
    sizes = {"num-layers": layers, "hidden-size": dim, "num-attention-heads": heads}
    missing = [name for name, size in sizes.items() if not size]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    gated = s.flag("swiglu") or str(s.get("activation-func")) == "swiglu"
    if not gated:
        notes.append("no --swiglu: priced as a Llama, whose feed-forward has three matrices")
    ffn = s.number("ffn-hidden-size") or (int(4 * dim * 2 / 3) // 64 * 64 if gated else 4 * dim)
    groups = s.number("num-query-groups", default=heads)
    grouped = s.flag("group-query-attention") or s.get("group-query-attention") is None
    vocab = s.number("padded-vocab-size", "vocab-size")
    if not vocab:
        vocab = 128_256
        notes.append("no --vocab-size (the tokenizer decides it): 128,256 assumed")
    step = s.number("make-vocab-size-divisible-by", default=128)
    step *= s.number("tensor-model-parallel-size", default=1)
    s.get("kv-channels", "position-embedding-type", "normalization", "disable-bias-linear")
    return LlamaConfig(
        vocab_size=-(-vocab // step) * step, dim=dim, n_layers=layers, n_heads=heads,
        n_kv_heads=groups if grouped else heads, ffn_dim=ffn,
        max_seq_len=s.number("max-position-embeddings", "seq-length", default=8192),
        tie_embeddings=not s.flag("untie-embeddings-and-output-weights"),
    )  # fmt: skip


def _job(s: Settings, found: Imported) -> dict[str, Any]:
    model, notes = found.model, found.notes
    assert model is not None
    pp = s.number("pipeline-model-parallel-size", default=1)
    per_chunk = s.number("num-layers-per-virtual-pipeline-stage")
    chunks = s.number(
        "num-virtual-stages-per-pipeline-rank", "virtual-pipeline-model-parallel-size", default=1
    )  # fmt: skip
    chunks = model.n_layers // pp // per_chunk if per_chunk else chunks
    values: dict[str, Any] = {
        "tp": s.number("tensor-model-parallel-size", default=1), "pp": pp,
        "cp": s.number("context-parallel-size", default=1), "chunks": max(chunks, 1),
        "schedule": "interleaved_1f1b" if chunks > 1 else "1f1b",
        **_ends(s, model.n_layers, pp),
        "micro_batch": s.number("micro-batch-size", default=1),
        "recompute": _recompute(s, notes), "precision": _precision(s, notes),
        "sharding": _sharding(s, notes),
        "software": "tuned" if s.flag("tp-comm-overlap") else "plain",
    }  # fmt: skip
    is_sequence_parallel = s.flag("sequence-parallel")
    if values["tp"] > 1 and not is_sequence_parallel:
        notes.append("no --sequence-parallel: priced with it, as puna trains")
    if s.number("expert-model-parallel-size", default=1) > 1:
        notes.append("expert parallelism is not priced")
    n_gpus = s.number("nproc-per-node") * s.number("nnodes", default=1)
    n_gpus = s.number("world-size", default=n_gpus)
    known = {
        "n_gpus": n_gpus, "global_batch": s.number("global-batch-size"),
        "seq_len": s.number("seq-length", "encoder-seq-length"),
    }  # fmt: skip
    if s.get("rampup-batch-size") is not None:
        notes.append("--rampup-batch-size: priced is the batch at its end")
    return values | {name: value for name, value in known.items() if value}


def _ends(s: Settings, n_layers: int, pp: int) -> dict[str, int]:
    """Return how many layers the first and last pipeline rank have less than the others."""
    first = s.number("decoder-first-pipeline-num-layers")
    last = s.number("decoder-last-pipeline-num-layers")
    both = {
        name: s.flag(f"account-for-{part}-in-pipeline-split")
        for name, part in (("less_first", "embedding"), ("less_last", "loss"))
    }  # fmt: skip
    ends = bool(first) + bool(last)
    if pp > 1 and ends and pp > ends:
        middle = (n_layers - first - last) // (pp - ends)
        return {"less_first": max(middle - first, 0) if first else 0,
                "less_last": max(middle - last, 0) if last else 0}  # fmt: skip
    return {name: int(is_on and pp > 1) for name, is_on in both.items()}


def _recompute(s: Settings, notes: list[str]) -> str:
    kind = s.get("recompute-granularity") or (
        "selective" if s.flag("recompute-activations") else "none"
    )
    if kind == "full" and s.get("recompute-method") == "block":
        notes.append("--recompute-method block: priced as if every layer were computed again")
    s.get("recompute-num-layers")
    return str(kind) if kind in ("full", "selective") else "none"


def _precision(s: Settings, notes: list[str]) -> str:
    recipe, is_half = str(s.get("fp8-recipe")), s.flag("fp16")
    s.get("bf16")
    if s.get("fp4-format", "fp4") is not None:
        return "nvfp4"
    if s.get("fp8-format", "fp8", "fp8-hybrid", "fp8-e4m3") is not None:
        return "mxfp8" if recipe == "mxfp8" else "fp8"
    if is_half:
        notes.append("--fp16: priced as bf16, which is as fast")
    return "bf16"


def _sharding(s: Settings, notes: list[str]) -> str:
    strategy = str(s.get("data-parallel-sharding-strategy"))
    if s.flag("use-torch-fsdp2"):
        return "zero3"
    if s.flag("use-megatron-fsdp", "use-custom-fsdp"):
        return "zero3" if strategy == "optim_grads_params" else "zero2"
    if not s.flag("use-distributed-optimizer"):
        notes.append(
            "no --use-distributed-optimizer: priced with it; without it every rank holds all of "
            "the optimiser"
        )
    return "zero1"
