"""Meta checkpoints: bitwise round trips over any shards, and clear words about everything wrong."""

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.model.config import PRESETS, LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import open_checkpoint
from puna.model.formats.layout import to_interleaved, to_rotate_half
from puna.model.formats.load import load_model
from puna.model.formats.meta import MetaCheckpoint
from puna.model.formats.meta_params import params_of
from puna.model.formats.meta_pth import read_pth
from puna.model.formats.meta_save import save_meta
from puna.model.llama import Llama

BASE = {
    "vocab_size": 48, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 56,
    "max_seq_len": 8192,
}  # fmt: skip
LLAMA2 = LlamaConfig(**{**BASE, "n_kv_heads": 4}, rope_theta=10_000.0).model_copy(
    update={"max_seq_len": 4096}
)
LLAMA3 = LlamaConfig(**BASE)
LLAMA31 = LLAMA3.model_copy(update={"rope_scaling": RopeScaling(), "max_seq_len": 131072})
LLAMA32 = LLAMA31.model_copy(
    update={"rope_scaling": RopeScaling(factor=32.0), "tie_embeddings": True}
)
LONG2 = LLAMA2.model_copy(update={"rope_scaling": LinearScaling(factor=2.0), "max_seq_len": 9000})
FAMILY = {"2": LLAMA2, "3": LLAMA3, "3.1": LLAMA31, "3.2": LLAMA32, "2-long": LONG2}


@pytest.fixture(params=FAMILY.values(), ids=FAMILY.keys())
def config(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model", LLAMA3, n_shards=2)
    return tmp_path / "model"


def save(path, config, **options):
    model = Llama(config)
    save_meta(path, config, model.state_dict(), **{"dtype": torch.float32, **options})
    return model.state_dict()


def edit_params(folder, **changes):
    values = json.loads((folder / "params.json").read_text())
    values.update(changes)
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / "params.json").write_text(json.dumps(values))


def rewrite(folder, change, shards=None):
    """Apply ``change(tensors, number)`` to the shards with torch itself."""
    for number, path in enumerate(sorted(folder.glob("*.pth"))):
        tensors = torch.load(path, weights_only=True)
        if shards is None or number in shards:
            change(tensors)
        torch.save(tensors, path)


def assert_holds(checkpoint, expected):
    found = dict(checkpoint.tensors())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_round_trips_are_bitwise_for_every_family_and_number_of_shards(config, n_shards, tmp_path):
    expected = save(tmp_path, config, n_shards=n_shards)
    assert len(list(tmp_path.glob("consolidated.*.pth"))) == n_shards
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert_holds(checkpoint, expected)
    assert all(len(stored.files) == n_shards for stored in checkpoint.stored.values())
    model = load_model(checkpoint)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_what_the_writer_makes_torch_loads_without_unpickling(config, tmp_path):
    expected = save(tmp_path, config, n_shards=2)
    for mmap in (False, True):
        shards = [
            torch.load(path, weights_only=True, mmap=mmap)
            for path in sorted(tmp_path.glob("*.pth"))
        ]
        assert all(shard.keys() == shards[0].keys() for shard in shards)
        axis = 1 if config.rope_theta == 10_000 else 0  # columns in Llama 2, rows in Llama 3
        whole = torch.cat([shard["tok_embeddings.weight"] for shard in shards], dim=axis)
        assert torch.equal(whole, expected["tok_embeddings.weight"])
        head = torch.cat([shard["output.weight"] for shard in shards])
        own = "tok_embeddings.weight" if config.tie_embeddings else "output.weight"
        assert torch.equal(head, expected[own])
        wo = torch.cat([shard["layers.1.attention.wo.weight"] for shard in shards], dim=1)
        assert torch.equal(wo, expected["layers.1.attention.wo.weight"])
        for shard in shards:
            assert torch.equal(shard["norm.weight"], expected["norm.weight"])
            for name, tensor in shard.items():
                assert tensor.data_ptr() % 16 == 0, name


def test_files_of_torch_itself_are_read(tmp_path):
    expected = save(tmp_path, LLAMA3)
    state = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    state["rope.freqs"] = torch.ones(4)
    state["layers.0.attention.wo.weight"] = state["layers.0.attention.wo.weight"].t().clone().t()
    ordered = OrderedDict(state)
    ordered._metadata = OrderedDict({"": {"version": 1}})  # as a state_dict has it
    variants = {
        "plain": state,
        "ordered": ordered,
        "parameters": {name: torch.nn.Parameter(value) for name, value in state.items()},
    }
    for variant in variants.values():
        torch.save(variant, tmp_path / "consolidated.00.pth")
        assert_holds(MetaCheckpoint(tmp_path), expected)


def test_rows_of_q_and_k_are_stored_in_pairs(tmp_path):
    expected = save(tmp_path, LLAMA3)
    stored = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    ours, theirs = (state["layers.0.attention.wk.weight"] for state in (expected, stored))
    half = LLAMA3.head_dim // 2
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1], ours[half])
    assert torch.equal(theirs[LLAMA3.head_dim + 2], ours[LLAMA3.head_dim + 1])
    assert torch.equal(to_rotate_half(to_interleaved(ours, 8), 8), ours)


def test_writing_is_byte_deterministic_and_needs_no_order(tmp_path):
    state = Llama(LLAMA32).state_dict()
    save_meta(tmp_path / "a", LLAMA32, state, n_shards=2)
    save_meta(
        tmp_path / "b", LLAMA32, ((name, state[name]) for name in reversed(state)), n_shards=2
    )
    save_meta(tmp_path / "c", LLAMA32, state.items(), n_shards=2)
    for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json"):
        assert hash_file(tmp_path / "a" / name) == hash_file(tmp_path / "c" / name)
    first, second = (dict(MetaCheckpoint(tmp_path / name).tensors()) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in state)
    assert first["norm.weight"].dtype == torch.bfloat16  # the published type


def test_more_shards_than_key_heads_hold_copies_of_heads(tmp_path):
    expected = save(tmp_path, LLAMA3, n_shards=4)
    shards = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pth"))]
    for name in ("layers.0.attention.wk.weight", "layers.1.attention.wv.weight"):
        assert shards[0][name].shape == (8, 32)
        assert torch.equal(shards[0][name], shards[1][name])
        assert not torch.equal(shards[0][name], shards[2][name])
    # Meta's own resharding repeats the heads in turn instead
    for a, b in ((1, 2),):
        for name in shards[0]:
            if name.endswith(("wk.weight", "wv.weight")):
                shards[a][name], shards[b][name] = shards[b][name], shards[a][name]
    for number, shard in enumerate(shards):
        torch.save(shard, tmp_path / f"consolidated.{number:02d}.pth")
    assert_holds(MetaCheckpoint(tmp_path), expected)
    shards[3]["layers.0.attention.wk.weight"] += 1
    torch.save(shards[3], tmp_path / "consolidated.03.pth")
    with pytest.raises(PunaError, match=r"layers\.0\.attention\.wk\.weight must be the same"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("n_shards", "message"), [(3, "n_heads = 4"), (5, "n_heads"), (8, "n_heads = 4"), (0, "0 sh")]
)
def test_a_model_that_cannot_be_cut_so_is_refused_before_anything_is_written(
    n_shards, message, tmp_path
):
    with pytest.raises(PunaError, match=message):
        save(tmp_path / "new", LLAMA3, n_shards=n_shards)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_write_never_looks_finished(folder, monkeypatch):
    def fail(*_args):
        raise OSError(28, "No space left on device")

    before = hash_file(folder / "consolidated.00.pth")
    monkeypatch.setattr("puna.model.formats.meta_save._ShardWriter.put", fail)
    with pytest.raises(OSError, match="No space"):
        save(folder, LLAMA3, n_shards=2)
    assert hash_file(folder / "consolidated.00.pth") == before
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(PunaError, match=r"holds no model"):
        load_model(folder)


def test_shards_of_another_number_are_not_mixed(folder):
    with pytest.raises(PunaError, match=r"shards of another checkpoint \(consolidated\.01\.pth\)"):
        save(folder, LLAMA3, n_shards=1)
    with pytest.raises(ValueError, match="do not fit the configuration"):
        save_meta(folder, LLAMA3, Llama(LLAMA32).state_dict(), n_shards=2)
    with pytest.raises(ValueError, match="do not fit the configuration: no output"):
        save_meta(folder, LLAMA3, Llama(LLAMA32).state_dict().items(), n_shards=2)


# ------------------------------------------------------------------------------- params.json


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_params_of_every_preset_give_it_back(name):
    from puna.model.formats.meta_params import Measured, Params

    config = PRESETS.get(name)
    measured = Measured(config.vocab_size, config.ffn_dim, config.kv_dim, config.tie_embeddings)
    params = Params("params.json", json.loads(json.dumps(params_of(config))))
    assert params.config(measured) == config


def test_the_published_files_of_llama_2_are_complete_with_what_the_tensors_say(tmp_path):
    expected = save(tmp_path, LLAMA2)
    published = {"dim": 32, "multiple_of": 8, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-05,
                 "vocab_size": -1}  # fmt: skip
    config = LLAMA2.model_copy(update={"ffn_dim": 88})
    expected = save(tmp_path, config)
    (tmp_path / "params.json").write_text(json.dumps(published))
    checkpoint = MetaCheckpoint(tmp_path)
    assert checkpoint.config == config
    assert_holds(checkpoint, expected)
    assert any("rope_theta" in note for note in checkpoint.notes)
    assert any("4096 tokens" in note for note in checkpoint.notes)


def test_scaled_rope_without_a_factor_is_refused_until_it_is_given(tmp_path):
    save(tmp_path, LLAMA32)
    edit_params(tmp_path, rope_scaling=...)
    with pytest.raises(PunaError, match=r"ambiguous[\s\S]*--rope-factor 32 for Llama 3\.2"):
        load_model(tmp_path)
    assert open_checkpoint(tmp_path, rope_factor=32.0).config == LLAMA32
    given = MetaCheckpoint(tmp_path, rope_scaling=RopeScaling(factor=16.0)).config
    assert given.rope_scaling == RopeScaling(factor=16.0)
    edit_params(tmp_path, rope_scale_factor=8)
    assert MetaCheckpoint(tmp_path).config.rope_scaling == RopeScaling(factor=8.0)
    with pytest.raises(PunaError, match=r"says factor 8, --rope-factor says 32"):
        open_checkpoint(tmp_path, rope_factor=32.0)
    edit_params(tmp_path, rope_scale_factor=..., use_scaled_rope=False)
    with pytest.raises(PunaError, match="does not scale RoPE"):
        open_checkpoint(tmp_path, rope_factor=32.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": ...}, "dim = None is no whole number"),
        ({"n_heads": "4"}, "n_heads = '4' is no whole number"),
        ({"n_heads": 5}, "n_heads = 5 and n_layers = 2 describe no model"),
        ({"n_layers": 1}, r"tensor layers\.1\.attention\.wq\.weight does not belong .* 8 more"),
        ({"n_layers": 3}, r"tensor layers\.2\.attention\.wq\.weight is missing"),
        ({"vocab_size": 50}, "vocab_size = 50, the output head has 48 rows"),
        ({"multiple_of": 64}, "mean a feed-forward of 64, w1 has 56 rows"),
        ({"multiple_of": "x"}, "multiple_of = 'x'"),
        ({"n_kv_heads": 1}, r"wk\.weight must be the same in all shards"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"dim": 64}, "neither above each other"),
        ({"norm_eps": -1}, "norm_eps: Input should be greater than 0"),
        ({"rope_theta": "big"}, "rope_theta: Input should be a valid number"),
        ({"rope_scaling": {"kind": "yarn"}}, "'llama3', 'linear'"),
        ({"moe_args": {"num_experts": 16}}, "mixture of experts"),
        ({"quantization_args": {"group_size": 32}}, "a quantised model"),
        ({"vision_chunk_size": 448}, "a vision model"),
    ],
)
def test_wrong_params_are_named(folder, changes, message):
    edit_params(folder, **changes)
    with pytest.raises(PunaError, match=message):
        load_model(folder)


def test_missing_key_heads_are_derived_or_asked_for(folder):
    edit_params(folder, n_kv_heads=...)
    checkpoint = MetaCheckpoint(folder)
    assert checkpoint.config == LLAMA3
    assert any("the rows of wk say 2" in note for note in checkpoint.notes)
    edit_params(folder, n_heads=2)  # heads of 16 rows: 16 rows of wk are one head
    assert MetaCheckpoint(folder).config.n_kv_heads == 1
    edit_params(folder, n_heads=1)
    with pytest.raises(PunaError, match=r"no n_kv_heads, and wk with 16 rows[\s\S]*add"):
        MetaCheckpoint(folder)


def test_lost_grouped_query_attention_is_called_by_its_name(tmp_path):
    save(tmp_path, LLAMA3.model_copy(update={"n_kv_heads": 4}))
    edit_params(tmp_path, n_kv_heads=2)
    with pytest.raises(PunaError, match="grouped-query attention was lost: 4 key/value heads inst"):
        load_model(tmp_path)


def test_unknown_keys_are_noted_and_broken_files_named(folder):
    edit_params(folder, colour="red")
    assert any("colour" in note for note in MetaCheckpoint(folder).notes)
    (folder / "params.json").write_text("{")
    with pytest.raises(PunaError, match=r"params\.json is no valid JSON"):
        load_model(folder)


# ------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize(
    ("change", "shards", "message"),
    [
        (lambda t: t.pop("norm.weight"), None, r"tensor norm\.weight is missing"),
        (lambda t: t.pop("norm.weight"), [1], r"do not hold the same tensors: norm\.weight"),
        (lambda t: t.update(extra=torch.ones(2)), None, "tensor extra does not belong"),
        (lambda t: t["norm.weight"].add_(1), [1], r"norm\.weight must be the same in all shards"),
        (
            lambda t: t.update({"norm.weight": t["norm.weight"].half()}), [1],
            r"norm\.weight is stored as HalfStorage, not as FloatStorage",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(32, dtype=torch.int8)}), None,
            r"stored as CharStorage, not as one of",
        ),
        (
            lambda t: t.update({"layers.0.feed_forward.w3.weight": torch.ones(27, 32)}), [1],
            r"w3\.weight has shape \[27, 32\], in consolidated\.00\.pth it has \[28, 32\]",
        ),
        (
            lambda t: t.update({"layers.0.feed_forward.w2.weight": torch.ones(32, 27)}), None,
            r"w2\.weight has shape \[32, 54\], params\.json asks for \[32, 56\]",
        ),
        (lambda t: t.update({"tok_embeddings.weight": torch.ones(7)}), None, "not two dimensions"),
        (lambda t: t["norm.weight"].fill_(float("nan")), None, r"norm\.weight holds 32 values th"),
        (lambda t: t["output.weight"][3].fill_(float("inf")), [1], r"first inf at \[27, 0\]"),
    ],
)  # fmt: skip
def test_wrong_shards_are_named(folder, change, shards, message):
    rewrite(folder, change, shards)
    with pytest.raises(PunaError, match=message):
        load_model(folder)


def test_a_missing_shard_is_noticed_by_name_or_by_shape(tmp_path):
    save(tmp_path, LLAMA3, n_shards=4)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(PunaError, match=r"consolidated\.01\.pth is missing"):
        load_model(tmp_path)
    (tmp_path / "consolidated.02.pth").unlink()
    (tmp_path / "consolidated.03.pth").unlink()
    with pytest.raises(PunaError, match="a missing shard also gives this"):
        load_model(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(PunaError, match=r"consolidated\.00\.pth is missing"):
        load_model(tmp_path)
    (tmp_path / "consolidated.x.pth").touch()
    with pytest.raises(PunaError, match="no shard of this checkpoint by its name"):
        load_model(tmp_path)


def test_a_head_that_differs_in_one_value_is_not_tied(tmp_path):
    for at in (0, 20, 47):
        for n_shards in (1, 2):
            path = tmp_path / f"{at}-{n_shards}"
            save(path, LLAMA32, n_shards=n_shards)
            assert MetaCheckpoint(path).config.tie_embeddings
            row, shard = at % (48 // n_shards), at // (48 // n_shards)

            def change(tensors, row=row):
                tensors["output.weight"] = tensors["output.weight"].clone()
                tensors["output.weight"][row, 5] += 1

            rewrite(path, change, [shard])
            assert not MetaCheckpoint(path).config.tie_embeddings


# --------------------------------------------------------------------------- malformed files


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def replace_table(path, table):
    """Give a file of torch another pickle, the storages as they are."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, table if name.endswith("data.pkl") else content)


def test_a_pickle_bomb_does_nothing(folder, tmp_path):
    path = folder / "consolidated.00.pth"
    torch.save({"norm.weight": Bomb(tmp_path / "boom")}, path)
    with pytest.raises(PunaError, match=r"the name posix\.mkdir does not belong .* was not run"):
        load_model(folder)
    plain = pickle.dumps(Bomb(tmp_path / "boom"))
    path.write_bytes(plain)
    with pytest.raises(PunaError, match="no zip archive"):
        load_model(folder)
    torch.save({"a": Bomb(tmp_path / "boom")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(PunaError, match=r"before 1\.6"):
        load_model(folder)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"\x80\x02c__builtin__\neval\n(X\x05\x00\x00\x001 + 1tR.", "the name __builtin__.eval"),
        (b"\x80\x02ccollections\nCounter\n)R.", "the name collections.Counter"),
        (b"\x80\x02(i__main__\nX\n.", "the pickle instruction INST"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.", "a call of OrderedDict"),
        (b"\x80\x02c__main__\nX\n)\x81.", r"the name __main__\.X"),
        (b"\x80\x02]}b.", "setting the state of an object"),
        (b"\x80\x02}K\x01K\x02s.", "a key of its table is no name"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x02s.", "entry a is a int, not a tensor"),
        (b"\x80\x02K\x01.", "it holds a int"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged"),  # into an empty memo
        (b"\x80\x02" + b")" + b"\x86" * 3 + b".", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),  # a name of 2 GiB
        (b"", "damaged"),
    ],
)  # fmt: skip
def test_tables_that_are_none_are_refused(folder, table, message):
    replace_table(folder / "consolidated.00.pth", table)
    with pytest.raises(PunaError, match=message):
        MetaCheckpoint(folder)


def test_a_table_that_grows_without_end_is_refused_at_once(folder):
    laughs = b"\x80\x02)" + b"2\x86" * 200 + b"Ns."  # 2 to the 200 empty tuples as a key
    replace_table(folder / "consolidated.00.pth", laughs)
    with pytest.raises(PunaError, match="the pickle instruction DUP"):
        MetaCheckpoint(folder)
    shared = b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(1, 100))
    replace_table(folder / "consolidated.00.pth", b"\x80\x02})" + shared + b"Ns.")
    with pytest.raises(PunaError, match="damaged"):
        MetaCheckpoint(folder)


def test_tensors_outside_their_storage_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(4, 4)}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        table = archive.read(name)
    assert table.count(b"K\x04K\x04") == 1
    replace_table(path, table.replace(b"K\x04K\x04", b"K\x05K\x04"))
    with pytest.raises(PunaError, match=r"tensor a of shape \[5, 4\] exceeds its storage"):
        read_pth(path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "directory", "big-endian"])
def test_damaged_files_are_one_clear_error(folder, damage):
    path = folder / "consolidated.01.pth"
    content = path.read_bytes()
    if damage == "big-endian":
        path.write_bytes(content.replace(b"little", b"big   "))
    else:
        path.write_bytes(
            {
                "truncated": content[: len(content) // 2],
                "empty": b"",
                "garbage": b"not a checkpoint at all" * 20,
                "directory": content[:-40] + b"\xff" * 40,
            }[damage]
        )
    with pytest.raises(PunaError, match=r"consolidated\.01\.pth is damaged"):
        load_model(folder)


def test_a_storage_elsewhere_than_the_archive_says_is_refused(folder):
    path = folder / "consolidated.00.pth"
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")  # the last entry's place in the directory
    struct.pack_into("<I", content, at + 42, 5)
    path.write_bytes(content)
    with pytest.raises(PunaError, match=r"consolidated\.00\.pth is damaged"):
        load_model(folder)
