"""The Python of the model's reference page runs, in order, as it stands there."""

import re
import tomllib
from pathlib import Path

import torch

from puna.model.config import PRESETS, ModelConfig

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "model.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PRESETS, "_entries", dict(PRESETS._entries))
    names: dict = {}
    exec("\n".join(blocks("python")), names)
    assert capsys.readouterr().out.split()[0] == "131392"
    assert names["logits_BTV"].shape == (1, 3, 512)
    assert names["again"].norm.weight.dtype == torch.bfloat16


def test_the_recipe_of_the_page_is_valid():
    section = tomllib.loads(blocks("toml")[0])["train"]["pretrain"]["model"]
    assert ModelConfig(**section).resolve().n_layers == 6
