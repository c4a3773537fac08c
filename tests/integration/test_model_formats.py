"""Checkpoints against the peers: Meta's reference code runs our Meta folders."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import smollm2_path

from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.lm.convert import Options, convert
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import open_checkpoint
from puna.model.formats.hf import save_hf
from puna.model.formats.layout import to_interleaved, to_rotate_half
from puna.model.formats.load import load_model
from puna.model.formats.meta_save import save_meta
from puna.model.formats.probe import probe_layout
from puna.model.llama import Llama

SHAPE = {
    "vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 160,
    "max_seq_len": 8192,
}  # fmt: skip
# Meta's code for Llama 3 reads the base from the file, so it runs Llama 2's shape too
FAMILY = {
    "2": LlamaConfig(**{**SHAPE, "n_kv_heads": 4}, rope_theta=20_000.0),
    "3": LlamaConfig(**SHAPE),
    "3.1": LlamaConfig(**{**SHAPE, "max_seq_len": 131072}, rope_scaling=RopeScaling(factor=8.0)),
    "3.2-like": LlamaConfig(**SHAPE, tie_embeddings=True),
}

# One process of model parallelism; the checkpoint is read as Meta's generation.py reads it.
REFERENCE = """
import json, os, sys
from pathlib import Path
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[4])
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
initialize_model_parallel(1)
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer
folder = Path(sys.argv[1])
params = json.loads((folder / "params.json").read_text())
args = ModelArgs(max_seq_len=64, max_batch_size=1, **params)
model = Transformer(args)
if len(list(folder.glob("*.pth"))) > 1:
    from llama_models.checkpoint import maybe_reshard_state_dict
    state = maybe_reshard_state_dict(sorted(folder.glob("*.pth")), n_kv_heads=args.n_kv_heads)
    torch.set_default_dtype(torch.float32)
else:
    state = torch.load(folder / "consolidated.00.pth", weights_only=True, mmap=True)
model.load_state_dict(state, strict=True)
tokens = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model.float()(tokens, 0), sys.argv[3])
"""


def reference_logits(folder: Path, tokens_BT: torch.Tensor, work: Path, port: int) -> torch.Tensor:
    torch.save(tokens_BT, work / "tokens.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REFERENCE, folder, work / "tokens.pt",
         work / "logits.pt", str(port)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(work / "logits.pt", weights_only=True)


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(("name", "n_shards"), [("2", 1), ("3", 2), ("3.1", 1), ("3.2-like", 2)])
def test_metas_code_runs_our_meta_folders(name, n_shards, tmp_path, free_port):
    config = FAMILY[name]
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.ndim == 2 else 1)
    save_meta(tmp_path / "m", config, model.state_dict(), n_shards=n_shards, dtype=torch.float32)
    tokens_BT = torch.arange(48).reshape(1, -1)
    theirs = reference_logits(tmp_path / "m", tokens_BT, tmp_path, free_port)
    with torch.no_grad():
        ours = load_model(tmp_path / "m")(tokens_BT)
    assert ours.std() > 0.5  # the comparison means something
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.xdist_group("real_model")
def test_the_real_model_goes_round_all_formats_unchanged(tmp_path):
    """GGUF (unpacked) -> Hugging Face -> Meta in three shards -> GGUF -> Hugging Face."""
    convert(smollm2_path(), tmp_path / "hf", Options("hf"))
    convert(tmp_path / "hf", tmp_path / "meta", Options("meta", n_shards=3))
    convert(tmp_path / "meta", tmp_path / "a.gguf", Options("gguf"))
    done = convert(tmp_path / "a.gguf", tmp_path / "back", Options("hf"))
    assert done.lossless
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json"} < set(files)
    for name in files:
        assert hash_file(tmp_path / "hf" / name) == hash_file(tmp_path / "back" / name), name


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.xdist_group("real_model")
def test_the_probe_is_decisive_on_the_real_model(tmp_path):
    checkpoint = open_checkpoint(smollm2_path())
    found = {finding.what: finding.verdict for finding in probe_layout(checkpoint)}
    assert found == {"wq": "right", "wk": "right", "embedding": "undecided"}
    head_dim, rows = checkpoint.config.head_dim, ("wq.weight", "wk.weight")
    for change, message in (
        (to_interleaved, "left out the reordering"), (to_rotate_half, "reordered twice")
    ):  # fmt: skip
        wrong = (
            (name, change(tensor, head_dim) if name.endswith(rows) else tensor)
            for name, tensor in checkpoint.tensors()
        )
        save_hf(tmp_path, checkpoint.config, wrong)
        with pytest.raises(PunaError, match=message):
            load_model(tmp_path)


@pytest.mark.xdist_group("small_demo")
def test_a_hardly_trained_model_is_not_refused(small_demo):
    for stage in ("train.pretrain", "post.sft"):
        checkpoint = open_checkpoint(small_demo.run_dir / stage / "model")
        found = probe_layout(checkpoint)
        assert {finding.verdict for finding in found} == {"undecided"}, found
