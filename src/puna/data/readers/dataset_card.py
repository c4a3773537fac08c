"""The card of a Hugging Face dataset: which files make which split, and the licence.

Rules: https://huggingface.co/docs/hub/datasets-manual-configuration and
https://huggingface.co/docs/hub/datasets-file-names-and-splits, written anew from that text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from puna.core.errors import PunaError

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_KEYWORD = re.compile(
    rf"(?:^|[-._ 0-9/])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?:[-._ 0-9/]|$)"
)
_SHARD = re.compile(r"^(?P<stem>.*?)-(?P<index>\d{5})-of-(?P<total>\d{5})(?=[.-])")
_DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class DatasetCard:
    """What the card says.

    Attributes:
        configs: Name of a configuration -> split -> path patterns; empty when the card has none.
        default: The configuration to take when none is named; None when the card names none.
        licence: The licence identifiers, joined by a comma; None when the card has none.
        languages: Language codes.
    """

    configs: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    default: str | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()


def read_card(text: str, place: str) -> DatasetCard:
    """Read the YAML in front of a ``README.md``.

    Args:
        text: The whole file.
        place: Its path, for messages.

    Raises:
        PunaError: The YAML is damaged, or ``configs`` has another form than documented.
    """
    found = _FRONT_MATTER.search(text)
    if found is None:
        return DatasetCard()
    import yaml  # here, as every command would wait for it

    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise PunaError(f"{place}: the YAML at its top is damaged: {what}", "repair it") from error
    if not isinstance(front, dict):
        return DatasetCard()
    configs: dict[str, dict[str, list[str]]] = {}
    default = None
    for entry in _as_list(front.get("configs")):
        if not isinstance(entry, dict) or not isinstance(entry.get("config_name"), str):
            raise PunaError(
                f"{place}: an entry of `configs` has no `config_name`: {entry!r}", "add it"
            )
        name = entry["config_name"]
        configs[name] = _data_files(entry, place)
        if entry.get("default") is True:
            default = name
    if default is None and configs:
        default = "default" if "default" in configs else None
        default = next(iter(configs)) if default is None and len(configs) == 1 else default
    licence = front.get("license")
    if licence == "other":
        licence = front.get("license_name") or front.get("license_link") or licence
    return DatasetCard(
        configs, default, ", ".join(map(str, _as_list(licence))) or None,
        tuple(str(code) for code in _as_list(front.get("language"))),
    )  # fmt: skip


def _data_files(entry: Mapping[str, Any], place: str) -> dict[str, list[str]]:
    """Bring the forms of ``data_files`` to one: split -> patterns."""
    folder = str(entry.get("data_dir") or "").strip("/")
    value = entry.get("data_files")
    if value is None:
        return {"": [f"{folder}/**" if folder else "**"]}  # splits by the names of the files
    splits: dict[str, list[str]] = {}
    if isinstance(value, dict):
        value = [{"split": split, "path": paths} for split, paths in value.items()]
    for item in _as_list(value):
        if isinstance(item, str):
            item = {"split": _DEFAULT_SPLIT, "path": item}  # noqa: PLW2901
        if not isinstance(item, dict) or "path" not in item:
            raise PunaError(
                f"{place}: config {entry['config_name']!r}: an entry of `data_files` has no "
                f"`path`: {item!r}", "add it",
            )  # fmt: skip
        paths = [str(path).removeprefix("./") for path in _as_list(item["path"])]
        if folder:
            paths = [f"{folder}/{path}" for path in paths]
        splits.setdefault(str(item.get("split", _DEFAULT_SPLIT)), []).extend(paths)
    return splits


def legacy_licence(dataset_infos: str) -> str | None:
    """Return the licence in an old ``dataset_infos.json``; None when it has none or is damaged."""
    try:
        infos = json.loads(dataset_infos)
    except ValueError:
        return None
    for info in infos.values() if isinstance(infos, dict) else ():
        if isinstance(info, dict) and isinstance(info.get("license"), str) and info["license"]:
            return info["license"]
    return None


def split_of(path: str) -> str:
    """Tell the split of a file from its name, then its folders, as the Hub does; else ``train``."""
    parts = path.lower().split("/")
    shard = _SHARD.match(parts[-1])
    if shard and parts[:-1] in (["data"], []):
        # data/<any name>-00000-of-00010.parquet names its split itself
        stem = shard["stem"]
        if stem in _SPLITS or not _KEYWORD.search(stem):
            return _SPLITS.get(stem, stem)
    for part in reversed(parts):
        if found := _KEYWORD.search(part):
            return _SPLITS[found[1]]
    return _DEFAULT_SPLIT


def missing_shards(paths: Iterable[str]) -> list[str]:
    """Return the names of shards ``-00003-of-00010`` that ought to be there and are not."""
    families: dict[tuple[str, str, int], set[int]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if shard := _SHARD.match(name):
            stem = f"{folder}/{shard['stem']}" if folder else shard["stem"]
            key = (stem, _ending(name[shard.end() :]), int(shard["total"]))
            families.setdefault(key, set()).add(int(shard["index"]))
    return [
        f"{stem}-{index:05d}-of-{total:05d}{ending}"
        for (stem, ending, total), found in sorted(families.items())
        for index in range(total)
        if index not in found
    ]


def _ending(rest: str) -> str:
    """Return the file name extension, without a hash that some writers put before it."""
    return rest[rest.index(".") :] if "." in rest else rest


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
