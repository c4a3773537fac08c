"""LlamaConfig, presets, Meta's feed-forward rule and the recipe's model section."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.model.config import PRESETS, LlamaConfig, ModelConfig, RopeScaling, meta_ffn_dim

SMALL = {
    "vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48,
    "max_seq_len": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, r"dim=32 is not a multiple of n_heads=5"),
        ({"n_kv_heads": 3}, r"n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"n_heads": 32, "n_kv_heads": 32}, r"dim / n_heads = 1 is odd"),
        ({"n_layers": 0}, r"n_layers"),
        ({"norm_eps": 0.0}, r"norm_eps"),
        ({"width": 3}, r"width"),
        ({"rope_scaling": {"low_freq_factor": 4.0}}, r"high_freq_factor=4.0 must be above"),
        ({"rope_scaling": {"kind": "linear"}}, r"rope_scaling\.linear\.factor"),
        ({"rope_scaling": {"kind": "yarn"}}, r"'llama3', 'linear'"),
    ],
)
def test_impossible_shapes_are_refused_with_the_field_and_value(change, message):
    with pytest.raises(ValidationError, match=message):
        LlamaConfig(**{**SMALL, **change})


def test_config_survives_a_json_round_trip():
    config = PRESETS.get("llama3.2-1b")
    assert LlamaConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096,), 11008),  # Llama 2 7B
        ((5120,), 13824),  # Llama 2 13B
        ((8192, 4096, 1.3), 28672),  # 70B
        ((4096, 1024, 1.3), 14336),  # Llama 3 8B
        ((16384, 4096, 1.2), 53248),  # 405B
        ((2048, 256, 1.5), 8192),  # 3.2 1B
        ((3072, 256, 1.0), 8192),  # 3.2 3B
        ((576, 256, 1.0), 1536),  # SmolLM2 135M
        ((96, 1), 256),
    ],
)
def test_meta_ffn_rule(arguments, expected):
    assert meta_ffn_dim(*arguments) == expected


def test_presets_are_the_published_shapes():
    llama3 = PRESETS.get("llama3-8b")
    assert (llama3.vocab_size, llama3.max_seq_len, llama3.rope_theta) == (128_256, 8192, 500_000.0)
    assert (llama3.head_dim, llama3.kv_dim, llama3.rope_scaling) == (128, 1024, None)
    assert PRESETS.get("llama2-7b").rope_theta == 10_000.0
    assert PRESETS.get("llama2-70b").n_kv_heads == 8
    assert PRESETS.get("llama3.1-8b").rope_scaling == RopeScaling(factor=8.0)
    assert PRESETS.get("llama3.2-3b").rope_scaling == RopeScaling(factor=32.0)
    assert PRESETS.get("llama3.2-3b").tie_embeddings


def test_model_section_with_a_preset_takes_the_tokenizers_vocabulary():
    config = ModelConfig(preset="demo", n_layers=2).resolve(vocab_size=1000)
    assert config == PRESETS.get("demo").model_copy(update={"n_layers": 2, "vocab_size": 1000})
    assert ModelConfig(preset="demo").resolve() == PRESETS.get("demo")


def test_model_section_without_a_preset_fills_heads_and_ffn():
    config = ModelConfig(dim=64, n_layers=1, n_heads=4, max_seq_len=8).resolve(vocab_size=10)
    assert (config.n_kv_heads, config.ffn_dim) == (4, meta_ffn_dim(64))


def test_a_scaling_given_in_the_section_replaces_the_presets():
    config = ModelConfig(preset="llama3-8b", rope_scaling={"factor": 2.0}).resolve()
    assert config.rope_scaling == RopeScaling(factor=2.0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"preset": "demmo"}, r"unknown model preset 'demmo'.*did you mean 'demo'"),
        ({"preset": "demo", "n_heads": 3}, r"dim=128 is not a multiple of n_heads=3"),
        ({"dim": 64}, r"without a preset the model also needs n_layers, n_heads, max_seq_len"),
        ({}, r"without a preset the model also needs dim"),
        ({"preset": "demo", "dimm": 1}, r"dimm"),
    ],
)
def test_a_wrong_section_is_refused_when_it_is_read(section, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**section)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(PunaError, match=r"vocab_size = 500 .* smaller than the tokenizer's 1000"):
        ModelConfig(preset="demo", vocab_size=500).resolve(vocab_size=1000)
    assert ModelConfig(preset="demo", vocab_size=1024).resolve(1000).vocab_size == 1024


def test_without_preset_and_vocabulary_the_fix_is_named():
    section = ModelConfig(dim=64, n_layers=1, n_heads=4, max_seq_len=8)
    with pytest.raises(PunaError, match="no vocab_size"):
        section.resolve()


def test_a_plugin_can_register_a_preset_once(monkeypatch):
    monkeypatch.setattr(PRESETS, "_entries", dict(PRESETS._entries))
    PRESETS.register("mine", LlamaConfig(**SMALL))
    assert ModelConfig(preset="mine").resolve().dim == 32
    with pytest.raises(ValueError, match="registered twice"):
        PRESETS.register("mine", LlamaConfig(**SMALL))


def test_configuration_accounting_and_sampling_import_no_torch():
    code = (
        "import sys, puna.model.config, puna.model.accounting, puna.model.sampling\n"
        "import puna.model.formats.hf_config, puna.cli.model\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
