"""The model against transformers, and packed against separate."""

import math

import pytest
import torch

from puna.model.attention import CausalPlan
from puna.model.config import PRESETS, LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.hf import hf_name
from puna.model.formats.hf_config import config_to_hf
from puna.model.llama import Llama, RMSNorm, init_tensor
from puna.model.names import parameter_shapes

# fp32 sums in another order: the spread between published implementations is 5e-5
PARITY = 1e-4
# the same sums, blocked differently
SAME = 2e-6

LONG = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)
CASES = {
    "mha": {"n_heads": 4, "n_kv_heads": 4},
    "gqa": {"n_heads": 6, "n_kv_heads": 2, "dim": 48},
    "mqa-tied": {"n_heads": 4, "n_kv_heads": 1, "tie_embeddings": True},
    "scaled": {"n_heads": 4, "n_kv_heads": 2, "rope_scaling": LONG, "max_seq_len": 256},
    "scaled-32": {
        "n_heads": 2, "n_kv_heads": 1, "rope_theta": 10_000.0, "max_seq_len": 256,
        "rope_scaling": RopeScaling(factor=32.0, original_max_seq_len=64), "tie_embeddings": True,
    },
    "linear": {
        "n_heads": 4, "n_kv_heads": 4, "rope_theta": 10_000.0, "max_seq_len": 256,
        "rope_scaling": LinearScaling(factor=4.0),
    },
    "eps": {"n_heads": 4, "n_kv_heads": 2, "norm_eps": 0.1, "n_layers": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other
    yield
    torch.set_num_threads(before)


def make_config(**changes):
    base = {
        "vocab_size": 97, "dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 56,
        "max_seq_len": 256,
    }  # fmt: skip
    return LlamaConfig(**{**base, **changes})


def loud(model: Llama, seed: int = 0) -> Llama:
    """Weights far from the tame initial ones, so that a wrong part shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 2 else 0.5
            shift = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + shift)
    return model


def tokens(config: LlamaConfig, batch: int, n_tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, n_tokens), generator=generator)


def peer_of(model: Llama):
    from transformers import LlamaConfig as PeerConfig
    from transformers import LlamaForCausalLM

    peer = LlamaForCausalLM(PeerConfig(**config_to_hf(model.config))).eval()
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    peer.load_state_dict(state, strict=True)
    return peer


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    model = loud(Llama(make_config(**CASES[case])))
    tokens_BT = tokens(model.config, 2, 200)
    with torch.no_grad():
        ours, theirs = model(tokens_BT), peer_of(model)(tokens_BT).logits
    assert ours.dtype == torch.float32
    assert ours.std() > 0.5  # not two constants
    torch.testing.assert_close(ours, theirs, rtol=PARITY, atol=PARITY)


def test_gradients_equal_transformers():
    model = loud(Llama(make_config()))
    peer = peer_of(model)
    tokens_BT = tokens(model.config, 2, 32)
    for logits in (model(tokens_BT), peer(tokens_BT).logits):
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()
        ).backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[hf_name(name)].grad, rtol=1e-3, atol=1e-5, msg=name
        )


def test_bfloat16_stays_near_float32_and_gives_float32_logits():
    model = Llama(make_config())
    tokens_BT = tokens(model.config, 1, 64)
    with torch.no_grad():
        wide = model(tokens_BT)
        narrow = model.to(torch.bfloat16)(tokens_BT)
    assert narrow.dtype == torch.float32
    assert (narrow - wide).abs().max() < 0.05 * wide.abs().max()


def test_a_plan_of_the_caller_is_asked_by_every_layer_and_gets_rotated_positions():
    model = loud(Llama(make_config()))
    tokens_BT = tokens(model.config, 1, 12)
    asked = []

    def plan(q_BTND, k_BSKD, v_BSKD, layer):
        asked.append(layer)
        return CausalPlan()(q_BTND, k_BSKD, v_BSKD)

    with torch.no_grad():
        own = model(tokens_BT, torch.arange(12)[None], plan=plan)
        moved = model(tokens_BT, torch.arange(7, 19)[None], plan=plan)
        usual = model(tokens_BT)
    assert asked == [0, 1, 2, 0, 1, 2]
    assert torch.equal(own, usual)
    # RoPE is relative: moving all positions changes roundings only
    torch.testing.assert_close(moved, usual, rtol=PARITY, atol=PARITY)
    with pytest.raises(ValueError, match="takes positions and no document ids"):
        model(tokens_BT, plan=plan)


@pytest.mark.parametrize("kind", ["auto", "mask", "pieces"])
def test_packed_documents_equal_separate_forwards(kind):
    model = loud(Llama(make_config()))
    model.attention_kind = kind
    lengths = [[40, 1, 160, 55], [250, 6]]  # long pieces are cut in blocks, short ones not
    tokens_BT = tokens(model.config, 2, 256)
    doc_ids_BT = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    ).int()
    positions_BT = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).int()
    with torch.no_grad():
        packed = model(tokens_BT, positions_BT, doc_ids_BT)
        for row, row_lengths in enumerate(lengths):
            start = 0
            for length in row_lengths:
                alone = model(tokens_BT[row : row + 1, start : start + length])
                torch.testing.assert_close(
                    packed[row, start : start + length], alone[0], rtol=PARITY, atol=PARITY
                )
                start += length


def test_padding_changes_no_document_and_stays_finite():
    model = loud(Llama(make_config()))
    tokens_BT = tokens(model.config, 1, 64)
    doc_ids_BT = torch.zeros(1, 64, dtype=torch.int32)
    doc_ids_BT[:, 50:] = -1
    with torch.no_grad():
        packed, alone = model(tokens_BT, None, doc_ids_BT), model(tokens_BT[:, :50])
    assert packed.isfinite().all()
    torch.testing.assert_close(packed[:, :50], alone, rtol=SAME * 50, atol=SAME * 50)


def test_a_later_token_never_changes_an_earlier_logit():
    model = loud(Llama(make_config()))
    tokens_BT = tokens(model.config, 1, 230)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 200] = (changed_BT[0, 200] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_initial_values_depend_on_seed_and_name_only():
    config = PRESETS.get("tiny")
    model = Llama(config, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights(7)
    again = Llama(config)
    again.init_weights(7)
    for (name, first), second in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name
        assert torch.equal(first, init_tensor(name, first.shape, 7, config)), name
    assert not torch.equal(model.layers[0].attention.wq.weight, model.layers[1].attention.wq.weight)
    again.init_weights(8)
    assert not torch.equal(again.tok_embeddings.weight, model.tok_embeddings.weight)
    assert model(tokens(config, 1, 8)).isfinite().all()  # no buffer was left unfilled


def test_initial_scale_is_that_of_the_recipe():
    config = make_config(dim=128, ffn_dim=256, n_layers=8, vocab_size=512)
    std = {name: init_tensor(name, shape, 0, config).std().item()
           for name, shape in parameter_shapes(config).items()}  # fmt: skip
    assert std["tok_embeddings.weight"] == pytest.approx(128**-0.5, rel=0.05)
    assert std["layers.3.feed_forward.w1.weight"] == pytest.approx(128**-0.5, rel=0.05)
    assert std["layers.3.feed_forward.w2.weight"] == pytest.approx(256**-0.5 / 4, rel=0.05)
    assert std["layers.3.attention.wo.weight"] == pytest.approx(128**-0.5 / 4, rel=0.05)
    assert std["layers.3.ffn_norm.weight"] == 0.0
    # Hidden states have unit size, so logits are standard normal: E[loss] = ln V + 1/2.
    logits = Llama(config)(tokens(config, 2, 16))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(config, 2, 16).flatten())
    assert loss.item() == pytest.approx(math.log(512) + 0.5, rel=0.1)


def test_tied_head_is_the_embedding_and_gets_both_gradients():
    model = Llama(make_config(tie_embeddings=True))
    assert "output.weight" not in model.state_dict()
    assert model.output_weight is model.tok_embeddings.weight
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert model.tok_embeddings.weight.grad[5:].abs().sum() > 0  # rows that were never looked up


def test_a_sampling_step_does_not_spoil_a_later_training_step():
    model = Llama(make_config())
    with torch.inference_mode():
        model(tokens(model.config, 1, 8))
    model(tokens(model.config, 1, 8)).sum().backward()
    assert model.norm.weight.grad.isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_table_of_names_is_that_of_the_model(tied):
    config = make_config(tie_embeddings=tied, n_kv_heads=2)
    model = Llama(config, device="meta")
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(config).items()) == list(built.items())


def test_the_norm_is_float32_inside_under_autocast_too():
    torch.manual_seed(0)
    norm, x_TC = RMSNorm(512, 1e-5), torch.randn(64, 512)
    plain = norm(x_TC)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x_TC), plain)
