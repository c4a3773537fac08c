"""Settings of other trainers as a job: Megatron-LM and torchtitan."""

from __future__ import annotations

from pathlib import Path

from puna.core.errors import PunaError
from puna.plan.importers.found import Imported


def import_settings(text: str) -> Imported:
    """Read a file of another trainer.

    Args:
        text: Its path. ``.sh``, ``.txt``, ``.args`` and ``.yaml`` are Megatron-LM's; ``.toml``,
            ``.json`` and ``.py:function`` (torchtitan's ``config_registry.py``) torchtitan's.

    Raises:
        PunaError: The file is missing, cannot be read, or describes no Llama.
    """
    name, _, function = text.partition(".py:")
    path = Path(f"{name}.py" if function else text)
    if not path.is_file():
        raise PunaError(f"--from {text}: no such file", "give the path of a file of settings")
    kind = path.suffix
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PunaError(f"{path}: not text: {error}", "give a file of settings") from error
    if kind in (".toml", ".json", ".py"):
        from puna.plan.importers.torchtitan import read_torchtitan

        return read_torchtitan(content, path, function)
    if kind in (".yaml", ".yml", ".sh", ".txt", ".args", ""):
        from puna.plan.importers.megatron import read_megatron

        return read_megatron(content, path)
    raise PunaError(
        f"{path}: settings end in .sh, .txt, .args or .yaml (Megatron-LM), .toml, .json or .py "
        "(torchtitan)",
        "rename the file, or give the values as options",
    )
