"""torchtitan's settings.

TOML of its ``JobConfig`` (until 2025), or a function of ``config_registry.py``, which took its
place; that one is read, never run.
"""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.model.config import PRESETS, LlamaConfig, meta_ffn_dim
from puna.plan.importers.found import Imported, Settings

_PRESETS = {
    "8b": "llama3.1-8b", "70b": "llama3.1-70b", "405b": "llama3.1-405b", "1b": "llama3.2-1b",
    "3b": "llama3.2-3b",
}  # fmt: skip
_SCHEDULES = {
    "1f1b": "1f1b", "gpipe": "1f1b", "interleaved1f1b": "interleaved_1f1b",
    "loopedbfs": "interleaved_1f1b", "interleavedzerobubble": "interleaved_zero_bubble",
    "zbvzerobubble": "interleaved_zero_bubble", "dualpipev": "interleaved_zero_bubble",
}  # fmt: skip
_DEBUG = LlamaConfig(
    vocab_size=2048, dim=256, n_layers=6, n_heads=16, n_kv_heads=16,
    ffn_dim=meta_ffn_dim(256, 256), max_seq_len=131_072,
)  # fmt: skip


def read_torchtitan(text: str, path: Path, function: str = "") -> Imported:
    """Read settings of torchtitan.

    Args:
        text: Content of the file.
        path: Its name; ``.toml``, ``.json`` (what ``debug.save_config_file`` writes) or ``.py``.
        function: Of a ``.py`` file.

    Raises:
        PunaError: It cannot be read, or describes no Llama.
    """
    values = dict(_flat(_tables(text, path, function)))
    if not any(name.partition(".")[0] in ("training", "parallelism", "model") for name in values):
        raise PunaError(
            f"{path}: no [training], [parallelism] or [model]: not torchtitan's settings",
            "give Megatron-LM's as .sh or .yaml",
        )
    settings = Settings(values)
    found = Imported("torchtitan", None)
    try:
        found.model = _model(settings, found.notes)
        found.values = _job(settings, found)
    except ValueError as error:
        raise PunaError(f"{path}: {error}", "mend the file, or give it as an option") from error
    parts = ("call", "of")  # of a call in a Python file: no settings of their own
    found.unknown = [n for n in settings.unused() if n.rpartition(".")[2] not in parts]
    return found


def _tables(text: str, path: Path, function: str) -> Mapping[str, Any]:
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            return dict(json.loads(text))
        return _of_function(ast.parse(text), path, function)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, SyntaxError, TypeError) as error:
        raise PunaError(
            f"{path}: not {path.suffix[1:]}: {error}", "give torchtitan's settings"
        ) from error


def _of_function(tree: ast.Module, path: Path, function: str) -> Mapping[str, Any]:
    """Return the keywords of the ``Trainer.Config(...)`` that a function returns."""
    functions = {one.name: one for one in tree.body if isinstance(one, ast.FunctionDef)}
    if function not in functions:
        raise PunaError(
            f"{path}: which configuration? It has {', '.join(functions) or 'none'}",
            f"write {path}:{next(iter(functions), 'llama3_8b')}",
        )
    found = _Reader(functions).returned(function)
    if not isinstance(found, dict):
        raise PunaError(
            f"{path}: {function} does not return a configuration that can be read",
            "write its settings as TOML, or give them as options",
        )
    return found


class _Reader:
    """Reads what functions of settings return, without running them: names, literals, calls.

    A call with keywords becomes a table, its name under ``call``, its first argument under ``of``;
    what is more than that stays as its text.
    """

    def __init__(self, functions: Mapping[str, ast.FunctionDef]) -> None:
        self._functions = functions

    def returned(self, function: str) -> Any:
        names: dict[str, Any] = {}
        for node in self._functions[function].body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._assign(node.targets[0], self._value(node.value, names), names)
            elif isinstance(node, ast.Return) and node.value is not None:
                return self._value(node.value, names)
        return None

    @staticmethod
    def _assign(target: ast.expr, value: Any, names: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = value
            return
        first, *path = ast.unparse(target).split(".")
        table = names.get(first)
        for part in path[:-1]:
            table = table.setdefault(part, {}) if isinstance(table, dict) else None
        if isinstance(table, dict) and path:
            table[path[-1]] = value

    def _value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in self._functions and not (node.args or node.keywords):
                return self.returned(called)
            table = {one.arg: self._value(one.value, names) for one in node.keywords if one.arg}
            words = [self._value(one, names) for one in node.args]
            return {"call": called, **table, **({"of": words[0]} if words else {})}
        if isinstance(node, ast.List | ast.Tuple):
            return [self._value(one, names) for one in node.elts]
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            a, b = self._value(node.left, names), self._value(node.right, names)
            return a * b if isinstance(a, int) and isinstance(b, int) else ast.unparse(node)
        try:
            return ast.literal_eval(node)
        except ValueError:
            return ast.unparse(node)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _model(s: Settings, notes: list[str]) -> LlamaConfig | None:
    name = str(s.get("model.name", "model_spec.name") or "llama3")
    flavor = str(s.get("model.flavor", "model_spec.of", "model_spec.flavor") or "debugmodel")
    if not name.startswith("llama3"):
        raise ValueError(f"model.name = {name!r} is no Llama 3, and cannot be priced")
    size, _, variant = flavor.lower().partition("_")
    if size == "debugmodel":
        return _DEBUG
    if size in _PRESETS:
        if variant:
            notes.append(f"flavor {flavor}: priced as {_PRESETS[size]}")
        return PRESETS.get(_PRESETS[size])
    notes.append(f"flavor {flavor} is not known: give --model")
    return None


def _job(s: Settings, found: Imported) -> dict[str, Any]:
    notes, p = found.notes, "parallelism."
    tp, pp = (s.number(f"{p}{k}_parallel_degree", default=1) for k in ("tensor", "pipeline"))
    cp = s.number(f"{p}context_parallel_degree", default=1)
    replicate = s.number(f"{p}data_parallel_replicate_degree", default=1)
    shard = s.number(f"{p}data_parallel_shard_degree", default=-1)
    seq_len = s.number("training.max_context_length", "training.seq_len", default=2048)
    local, n_micro = _local_batch(s, seq_len, notes)
    reshard = str(s.get(f"{p}fsdp_reshard_after_forward") or "default")
    is_always = reshard == "always" or (reshard == "default" and pp == 1)
    values: dict[str, Any] = {
        "tp": tp, "cp": cp, "pp": pp, "replicate": replicate,
        "micro_batch": local // n_micro if pp > 1 else local,
        "sharding": "zero3" if is_always else "zero2",
        "seq_len": seq_len,
        "recompute": _recompute(s, notes), "precision": _precision(s), "software": "plain",
        **_pipeline(s, found, pp),
    }  # fmt: skip
    if shard > 0:
        values["n_gpus"] = replicate * shard * tp * cp * pp
        if shard == 1 and replicate > 1:
            notes.append("data_parallel_shard_degree = 1: priced as copies of a sharded state")
    tokens = s.number("training.num_tokens_per_train_step", default=-1)
    whole = s.number("training.global_batch_size", default=tokens // seq_len)
    if whole > 0:
        values["global_batch"] = whole
    elif shard > 0:
        values["global_batch"] = local * replicate * shard
    else:
        values["rows_per_replica"] = local
    if s.flag(f"{p}enable_async_tensor_parallel", "compile.enable_async_tensor_parallel"):
        notes.append("enable_async_tensor_parallel: its overlap is not priced")
    if s.flag("training.enable_cpu_offload"):
        notes.append("enable_cpu_offload is not priced")
    if s.number(f"{p}expert_parallel_degree", default=1) > 1:
        notes.append("expert parallelism is not priced")
    return values


def _local_batch(s: Settings, seq_len: int, notes: list[str]) -> tuple[int, int]:
    """Return rows of a data-parallel rank and passes that a pipeline cuts them into.

    The present version counts tokens of one pass; versions before it rows of all of a rank.
    """
    per_pass = s.number("training.num_tokens_per_microbatch_per_dp_rank")
    if per_pass:
        n_micro = s.number("parallelism.num_pp_microbatches", default=1)
        return max(per_pass // seq_len, 1) * n_micro, n_micro
    local = s.number("training.local_batch_size", "training.batch_size")
    if not local:
        notes.append("no local_batch_size: 8 assumed, give --batch and --micro-batch")
        local = 8
    size = s.number("parallelism.pipeline_parallel_microbatch_size", default=1)
    return local, max(local // size, 1)


def _pipeline(s: Settings, found: Imported, pp: int) -> dict[str, Any]:
    p = "parallelism.pipeline_parallel_"
    name = str(s.get(f"{p}schedule") or "1F1B")
    per_stage = s.number(f"{p}layers_per_stage")
    first, last = (s.number(f"{p}{k}_stage_less_layers", default=1) for k in ("first", "last"))
    if pp == 1:
        return {"schedule": "1f1b", "chunks": 1}
    schedule = _SCHEDULES.get(name.lower())
    if schedule is None:
        found.notes.append(f"pipeline_parallel_schedule = {name}: priced as 1F1B")
        schedule = "1f1b"
    chunks = 1 if schedule == "1f1b" else 2
    if per_stage and found.model is not None and schedule != "1f1b":
        chunks = max(-(-(found.model.n_layers + first + last) // per_stage) // pp, 1)
    less = {"less_first": first, "less_last": last}
    return {"schedule": schedule, "chunks": chunks, **less}


def _recompute(s: Settings, notes: list[str]) -> str:
    mode = str(s.get("activation_checkpoint.mode") or "selective")
    called = str(s.get("activation_checkpoint.call") or "")
    for name, kind in (("FullAC", "full"), ("SelectiveAC", "selective"), ("Memory", "budget")):
        mode = kind if called.startswith(name) else mode
    option = str(s.get("activation_checkpoint.selective_ac_option") or "op")
    if mode == "selective" and option.isdigit():
        notes.append(f"every {option}th layer computed again: priced as op-level selective")
    if "budget" in mode:
        notes.append("activation_checkpoint by memory budget: priced as op-level selective")
    return {"none": "none", "full": "full"}.get(mode, "sac")


def _precision(s: Settings) -> str:
    names = ("model.converters", "model_spec.converters", "model_converters.converters")
    converters = str(s.get(*names) or "").lower()
    words = {"nvfp4": "nvfp4", "mx": "mxfp8", "float8": "fp8"}
    return next((kind for word, kind in words.items() if word in converters), "bf16")
