"""The layout probe: decisive on a trained model's marks, silent on weights that have none."""

from pathlib import Path

import pytest
import torch

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.model.formats.checkpoint import SpecialIds, StoredTensor
from puna.model.formats.hf import save_hf
from puna.model.formats.layout import to_interleaved, to_rotate_half
from puna.model.formats.load import load_model
from puna.model.formats.probe import probe_layout, refuse_wrong_layout
from puna.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=4096, dim=256, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, max_seq_len=64
)


class InMemory:
    """A checkpoint whose tensors are given."""

    kind = "hf"
    path = Path("model")
    special_ids = SpecialIds()
    notes = ()

    def __init__(self, config, state):
        self.config, self._state = config, state
        self.stored = {
            name: StoredTensor(
                name, name, tuple(t.shape), "float32", t.nbytes, (self.path,)
            )
            for name, t in state.items()
        }  # fmt: skip

    def tensors(self, names=None):
        for name in names or self._state:
            yield name, self._state[name]


def trained(config=CONFIG, seed=0):
    """Random weights with the marks of training: slow pairs large, some columns and ids large."""
    generator = torch.Generator().manual_seed(seed)
    state = Llama(config).state_dict()
    half = config.head_dim // 2
    slope = torch.linspace(-1, 1, half).repeat(2)
    for name, tensor in state.items():
        if name.endswith(("wq.weight", "wk.weight")):
            heads = tensor.shape[0] // config.head_dim
            noise = 0.3 * torch.randn(tensor.shape[0], generator=generator)
            tensor.mul_((slope.repeat(heads) + noise).exp().unsqueeze(1))
        if name == "tok_embeddings.weight":
            tensor.mul_(torch.rand(tensor.shape[1], generator=generator) + 0.5)
            tensor.mul_(torch.linspace(1.3, 0.7, tensor.shape[0]).unsqueeze(1))
    return state


def changed(state, endings, change):
    return {k: change(v) if k.endswith(endings) else v for k, v in state.items()}


def verdicts(config, state):
    return {f.what: f.verdict for f in probe_layout(InMemory(config, state))}


def test_the_right_layout_is_recognised():
    assert verdicts(CONFIG, trained()) == {"wq": "right", "wk": "right", "embedding": "undecided"}
    refuse_wrong_layout(InMemory(CONFIG, trained()))


@pytest.mark.parametrize(
    ("endings", "change", "message"),
    [
        (("wq.weight", "wk.weight"), to_interleaved, r"wq are in Meta's order .* left out"),
        (("wq.weight", "wk.weight"), to_rotate_half, r"the rows of wq were reordered twice"),
        (("wk.weight",), to_interleaved, r"the rows of wk are in Meta's order"),
        (
            ("wk.weight",),  # Meta's file, and a conversion that takes wk for n_heads heads
            lambda w, d: to_rotate_half(to_interleaved(w, d), d // 2),
            r"the rows of wk were reordered as 4 heads instead of 2",
        ),
    ],
)
def test_a_wrong_order_is_refused_and_called_by_its_name(endings, change, message):
    state = changed(trained(), endings, lambda w: change(w, CONFIG.head_dim))
    with pytest.raises(PunaError, match=message) as caught:
        refuse_wrong_layout(InMemory(CONFIG, state))
    assert "puna model convert" in caught.value.fix
    others = {"wq", "wk"} - {ending[:2] for ending in endings}
    found = verdicts(CONFIG, state)
    assert all(found[which] == "right" for which in others)


@pytest.mark.parametrize("n_shards", [2, 4, 8])
@pytest.mark.parametrize("axes", [(0, 1), (1, 0)], ids=["rows", "columns"])
def test_shards_of_the_embedding_on_the_wrong_axis_are_found(n_shards, axes):
    cut, glued = axes
    state = changed(
        trained(),
        ("tok_embeddings.weight",),
        lambda e: torch.cat(e.chunk(n_shards, cut), glued).reshape(e.shape),
    )
    with pytest.raises(PunaError, match="shards along the wrong dimension"):
        refuse_wrong_layout(InMemory(CONFIG, state))


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_random_weights_are_undecided(head_dim):
    for seed in range(60):
        config = LlamaConfig(
            vocab_size=700, dim=head_dim, n_layers=1 + seed % 2, n_heads=1, n_kv_heads=1,
            ffn_dim=4, max_seq_len=8, tie_embeddings=True,
        )  # fmt: skip
        model = Llama(config)
        model.init_weights(seed)
        found = probe_layout(InMemory(config, model.state_dict()))
        assert [finding.verdict for finding in found] == ["undecided"] * 3, (seed, found)


def test_zeros_and_tiny_heads_are_undecided():
    state = {name: torch.zeros_like(value) for name, value in trained().items()}
    assert verdicts(CONFIG, state)["wq"] == "undecided"
    small = CONFIG.model_copy(update={"n_heads": 16, "n_kv_heads": 8})
    state = changed(trained(small), ("wq.weight",), lambda w: to_interleaved(w, 16))
    assert verdicts(small, state)["wq"] == "undecided"


def test_expanded_heads_are_noted():
    config = CONFIG.model_copy(update={"n_kv_heads": 4})

    def expand(w):
        return w.view(2, 64, -1).repeat_interleave(2, dim=0).reshape(256, -1)

    state = changed(trained(), ("wk.weight", "wv.weight"), expand)
    notes = [f for f in probe_layout(InMemory(config, state)) if f.verdict == "note"]
    assert [note.what for note in notes] == ["heads"]
    assert "groups of 2 key heads are equal" in notes[0].message
    assert "set 2 key/value heads" in notes[0].fix
    assert "heads" not in verdicts(config, trained(config))


def test_loading_probes_unless_told_not_to(tmp_path):
    endings = ("wq.weight", "wk.weight")
    state = changed(trained(), endings, lambda w: to_interleaved(w, CONFIG.head_dim))
    save_hf(tmp_path, CONFIG, state)
    with pytest.raises(PunaError, match="left out the reordering"):
        load_model(tmp_path)
    model = load_model(tmp_path, probe=False)
    assert torch.equal(model.layers[0].attention.wq.weight, state["layers.0.attention.wq.weight"])
