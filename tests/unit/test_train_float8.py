"""Products in float8: who is refused, and what the conversion leaves as it is."""

from __future__ import annotations

import sys

import pytest
import torch

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.train.config import ParallelConfig, TrainingConfig
from puna.train.float8 import check_float8, use_float8
from puna.train.parallel.layout import check_layout

MODEL = LlamaConfig(
    vocab_size=64, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, max_seq_len=64
)


def test_a_device_without_float8_is_refused(monkeypatch):
    check_float8("off", torch.device("cpu"))
    with pytest.raises(PunaError, match=r"capability 8\.9; the device cpu"):
        check_float8("tensorwise", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_float8("tensorwise", torch.device("cuda", 0))
    with pytest.raises(PunaError, match=r"has compute capability 8\.9"):
        check_float8("rowwise", torch.device("cuda", 0))


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(PunaError) as caught:
        use_float8(Llama(MODEL).layers[0], "rowwise")
    assert "puna[float8]" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("model", "parallel", "words"),
    [({}, {"tp": 2}, "parallel.tp"), ({"ffn_dim": 120}, {}, "ffn_dim = 120")],
)
def test_what_does_not_go_with_float8_is_refused(model, parallel, words):
    cfg = TrainingConfig(
        steps=1, seq_len=64, nproc=parallel.get("tp", 1), parallel=ParallelConfig(**parallel),
        float8="rowwise",
    )  # fmt: skip
    with pytest.raises(PunaError, match="float8") as caught:
        check_layout(cfg, MODEL.model_copy(update=model))
    assert words in caught.value.message


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_names_shapes_and_head_stay(kind):
    """On the meta device, as stages are built; the products themselves need a GPU."""
    float8 = pytest.importorskip("torchao.float8.float8_linear")
    model = Llama(MODEL, device="meta")
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    for block in model.layers:
        use_float8(block, kind)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before
    converted = [m for m in model.modules() if isinstance(m, float8.Float8Linear)]
    assert len(converted) == 7 * MODEL.n_layers
    assert not isinstance(model.output, float8.Float8Linear)
    model.to_empty(device="cpu")
    model.init_weights(0)
    torch.testing.assert_close(
        model.layers[1].feed_forward.w2.weight, Llama(MODEL).layers[1].feed_forward.w2.weight
    )
