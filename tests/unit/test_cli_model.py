"""``puna model``: pages that fit and say the numbers, JSON, pictures, wrong input."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from click.testing import CliRunner

from puna.cli.main import entry
from puna.cli.model import model as command
from puna.core.errors import PunaError
from puna.model.accounting import account
from puna.model.config import PRESETS
from puna.model.formats.hf import save_hf
from puna.model.llama import Llama
from puna.model.testing import overflowing_llama, small_config

KEYS = {
    "name", "kind", "path", "family", "preset", "params", "dtype", "weight_bytes",
    "kv_bytes_per_token", "parts", "stored", "context", "rope", "config", "tokenizer",
    "special_rows", "plan", "notes", "problems", "deep",
}  # fmt: skip


def run(*arguments):
    result = CliRunner().invoke(command, arguments)
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def folder(tmp_path):
    model = Llama(small_config())
    save_hf(tmp_path / "m", model.config, dict(model.named_parameters()), dtype=torch.bfloat16)
    return str(tmp_path / "m")


@pytest.mark.parametrize("name", ["tiny", "llama3-8b", "llama3.1-405b"])
def test_the_page_has_every_number_in_full(name):
    output = run("inspect", name, "--batch", "64")
    assert max(map(len, output.splitlines())) <= 100
    assert "…" not in output
    cost = account(PRESETS.get(name))
    for n in (
        cost.n_params, cost.n_bytes(), 64 * cost.kv_bytes(), cost.kv_bytes_per_token(),
        *(n for _, n in cost.parts.items()),
    ):  # fmt: skip
        assert f"{n:,}" in output


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(
    "arguments",
    [
        ("list",), ("inspect", "llama3.1-405b"), ("compare", "llama2-7b", "llama3-8b"),
        ("compare", "llama3.2-1b", "llama3.1-405b"),
    ],
)  # fmt: skip
def test_no_number_is_cut_in_a_narrow_terminal(monkeypatch, width, arguments):
    monkeypatch.setattr("puna.cli.model_tables.PLAIN_WIDTH", width)
    output = run(*arguments)
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output


def test_json_has_the_documented_keys(folder):
    for name in ("llama3-8b", folder):
        values = json.loads(run("inspect", name, "--json"))
        assert set(values) == KEYS
        assert set(values["parts"]["ffn"]) >= {"params", "bytes"}
    assert values["kind"] == "hf"
    assert values["weight_bytes"] == 2 * account(small_config()).n_params


def test_the_page_of_a_checkpoint_and_its_deep_look(tmp_path):
    model = overflowing_llama()
    save_hf(tmp_path, model.config, dict(model.named_parameters()))
    page = run("inspect", str(tmp_path))
    assert "Hugging Face, 1 file" in page
    assert "all float32" in page
    assert "float16" not in page
    deep = " ".join(run("inspect", str(tmp_path), "--deep").split())
    assert "every value is finite" in deep
    assert "not safe in float16: layers.2.feed_forward.w2 input: 66,978.95" in deep


def test_a_comparison_names_what_is_stored(folder):
    output = run("compare", folder, "tiny")
    assert re.search(r"stored as +bfloat16 +-", output)
    values = json.loads(run("compare", folder, "tiny", "--json"))
    assert values["a"]["stored"]["tensor_bytes"] == 2 * account(small_config()).n_params
    assert values["b"]["stored"] is None
    assert (values["a"]["kind"], values["b"]["kind"]) == ("hf", "preset")


def test_the_picture_shows_the_published_differences(tmp_path):
    target = tmp_path / "new" / "bytes.svg"
    output = run("compare", "llama2-7b", "llama3-8b", "--picture", str(target))
    assert f"picture: {target}" in output
    root = ET.fromstring(target.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("}text")]
    for text in ("+752", "−1,536", "+2,496", "+2,464 (+19%)", "−1,024 (−50%)", "15,317"):
        assert text in texts, text
    assert texts.count("+752") == 2
    assert "4,096 tokens of 512 KiB" in texts
    assert not re.search(r"https?://(?!www\.w3\.org)|href|@import|url\(", target.read_text())


@pytest.mark.parametrize(
    "pair",
    [
        ("llama3-8b", "llama3-8b"), ("tiny", "llama3.1-405b"), ("llama3.1-405b", "tiny"),
        ("llama3-8b", "llama3.1-8b"), ("llama3.2-1b", "llama3-8b"),
    ],
)  # fmt: skip
def test_nothing_of_a_picture_is_outside_of_it(tmp_path, pair):
    target = tmp_path / "p.svg"
    run("compare", *pair, "--picture", str(target))
    root = ET.fromstring(target.read_text())
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for element in root.iter():
        if element.tag.endswith("}rect"):
            x, y, w, h = (float(element.attrib[k]) for k in ("x", "y", "width", "height"))
            assert min(x, y, w, h) >= 0
            assert x + w <= width
            assert y + h <= height
        elif element.tag.endswith("}text"):
            x, size = float(element.attrib["x"]), 6.6 * len(element.text or "")
            anchor = element.attrib.get("text-anchor", "start")
            left = x - size if anchor == "end" else x - size / 2 if anchor == "middle" else x
            assert left >= 0, element.text
            assert left + size <= width, element.text


def test_only_svg_is_drawn(tmp_path):
    with pytest.raises(PunaError, match=r"only SVG"):
        run("compare", "tiny", "demo", "--picture", str(tmp_path / "p.png"))
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_ends_with_code_2_and_one_message(tmp_path, folder, capsys):
    (tmp_path / "empty").mkdir()
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "not.gguf").write_bytes(b"GGU")
    cases = [
        (["inspect", "llama3-8"], "did you mean 'llama3-8b'"),
        (["inspect", str(tmp_path / "empty")], "holds no model"),
        (["inspect", str(tmp_path / "none")], "does not exist"),
        (["inspect", folder], "model.safetensors is damaged"),
        (["inspect", "tiny", "--context", "129"], "--context 128"),
        (["inspect", "tiny", "--rope-factor", "8"], "--rope-factor"),
        (["compare", "tiny", str(tmp_path / "empty")], "holds no model"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stop:
            entry(["model", *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert message in error
        assert "Traceback" not in error
