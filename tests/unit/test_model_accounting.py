"""Accounting to the byte: against published numbers and against real (meta-device) modules."""

import json

import pytest
from click.testing import CliRunner

from puna.cli.model import model as model_command
from puna.core.errors import PunaError
from puna.model.accounting import account, compare
from puna.model.config import PRESETS, LlamaConfig
from puna.model.llama import Llama

MODULE_OF_PART = {
    "embedding": ("tok_embeddings",),
    "output_head": ("output",),
    "kv_projections": ("wk", "wv"),
    "qo_projections": ("wq", "wo"),
    "ffn": ("w1", "w2", "w3"),
    "norms": ("attention_norm", "ffn_norm", "norm"),
}


@pytest.mark.parametrize("name", list(PRESETS))
def test_parts_equal_the_parameters_of_the_module(name):
    config = PRESETS.get(name)
    counted = dict.fromkeys(MODULE_OF_PART, 0)
    for key, parameter in Llama(config, device="meta").named_parameters():
        module = key.split(".")[-2]
        part = next(part for part, names in MODULE_OF_PART.items() if module in names)
        counted[part] += parameter.numel()
    assert dict(account(config).parts.items()) == counted


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),
        ("llama3.2-1b", 1_235_814_400),
        ("demo", 1_311_872),
    ],
)
def test_totals_are_the_published_ones(name, n_params):
    assert account(PRESETS.get(name)).n_params == n_params


def test_llama2_7b_to_llama3_8b_part_by_part():
    comparison = compare(PRESETS.get("llama2-7b"), PRESETS.get("llama3-8b"))
    lines = {line.name: line for line in [*comparison.lines, comparison.total]}
    expected = {  # params before, params after, delta bytes, delta MiB
        "embedding": (131_072_000, 525_336_576, 788_529_152, 752),
        "output_head": (131_072_000, 525_336_576, 788_529_152, 752),
        "kv_projections": (1_073_741_824, 268_435_456, -1_610_612_736, -1536),
        "qo_projections": (1_073_741_824, 1_073_741_824, 0, 0),
        "ffn": (4_328_521_728, 5_637_144_576, 2_617_245_696, 2496),
        "norms": (266_240, 266_240, 0, 0),
        "total": (6_738_415_616, 8_030_261_248, 2_583_691_264, 2464),
    }
    assert {
        name: (line.a_params, line.b_params, line.delta_bytes, line.delta_mib)
        for name, line in lines.items()
    } == expected
    assert lines["total"].delta_params == 1_291_845_632
    assert round(lines["total"].delta_mb, 1) == 2583.7
    assert set(comparison.changed) == {
        "vocab_size", "n_kv_heads", "ffn_dim", "max_seq_len", "rope_theta",
    }  # fmt: skip


def test_grouped_queries_halve_the_cache_at_twice_the_context():
    old, new = account(PRESETS.get("llama2-7b")), account(PRESETS.get("llama3-8b"))
    assert (old.kv_bytes_per_token(), new.kv_bytes_per_token()) == (524_288, 131_072)
    assert (old.kv_bytes(), new.kv_bytes()) == (2048 * 2**20, 1024 * 2**20)
    assert new.kv_bytes(10, "float32") == 10 * 2 * 131_072


def test_bytes_follow_the_dtype_and_an_unknown_one_is_refused():
    cost = account(PRESETS.get("llama2-7b"))
    assert round(cost.n_bytes() / 2**20, 1) == 12_852.5
    assert cost.n_bytes("float32") == 2 * cost.n_bytes("bfloat16") == 4 * cost.n_bytes("int8")
    with pytest.raises(PunaError, match="unknown dtype 'fp4'"):
        cost.n_bytes("fp4")


def test_flops_follow_the_stated_formula():
    config = LlamaConfig(
        vocab_size=100, dim=16, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=24, max_seq_len=64
    )
    cost = account(config)
    matmul = 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) + 100 * 16
    assert cost.n_matmul_params == matmul
    assert cost.flops_per_token(32, training=False) == 2 * matmul + 4 * 3 * 16 * 32
    assert cost.flops_per_token(32) == 3 * (2 * matmul + 4 * 3 * 16 * 32)
    # causal: (1 + 2 + ... + 32) / 32 visible tokens on average
    assert cost.flops_per_token(32, training=False, causal=True) == 2 * matmul + 2 * 3 * 16 * 33
    assert cost.flops_per_token() == cost.flops_per_token(64)
    tied = account(config.model_copy(update={"tie_embeddings": True}))
    assert tied.flops_per_token(32) == cost.flops_per_token(32)
    assert tied.n_params == cost.n_params - 1600


def test_forward_flops_are_those_that_torch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = PRESETS.get("tiny")
    model = Llama(config, device="meta")
    model.attention_kind = "mask"
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 48, dtype=torch.long, device="meta"))
    expected = 2 * 48 * account(config).flops_per_token(48, training=False)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("pair", [("llama2-7b", "llama3-8b"), ("llama3.2-1b", "llama3.1-405b")])
def test_compare_prints_whole_numbers_within_100_columns(pair):
    result = CliRunner().invoke(model_command, ["compare", *pair])
    assert result.exit_code == 0
    assert max(len(line) for line in result.output.splitlines()) <= 100
    total = account(PRESETS.get(pair[1])).n_params
    assert f"{total:,}" in result.output
    assert "MiB" in result.output
    assert "…" not in result.output


def test_compare_and_list_as_json():
    result = CliRunner().invoke(model_command, ["compare", "llama2-7b", "llama3-8b", "--json"])
    values = json.loads(result.output)
    assert values["total"]["delta_mib"] == 2464.0
    assert values["b"]["kv_bytes_per_token"] == 131_072
    assert values["changed"]["n_kv_heads"] == [32, 8]
    listed = json.loads(CliRunner().invoke(model_command, ["list", "--json"]).output)
    assert set(listed) == set(PRESETS)
    assert listed["demo"]["n_params"] == 1_311_872


def test_list_shows_every_preset_in_full():
    result = CliRunner().invoke(model_command, ["list"])
    assert result.exit_code == 0
    for name in PRESETS:
        assert f"{account(PRESETS.get(name)).n_params:,}" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 100


def test_compare_names_an_unknown_model(tmp_path):
    for name, message in [("llama2-7", "did you mean"), (str(tmp_path), "holds no model")]:
        result = CliRunner().invoke(model_command, ["compare", name, "demo"])
        assert isinstance(result.exception, PunaError)
        assert message in str(result.exception)
