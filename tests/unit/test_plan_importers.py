"""Settings of Megatron-LM and torchtitan as jobs of the planner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from puna.cli.main import cli
from puna.core.errors import PunaError
from puna.model.config import PRESETS
from puna.plan.importers import import_settings
from puna.plan.importers.found import Imported

SCRIPT = """#!/bin/bash
GPUS_PER_NODE=8
NODES=${NODES:-16}
WORLD_SIZE=$(($GPUS_PER_NODE*$NODES))
export TP=8   # tensor
LAUNCH=(--nproc_per_node $GPUS_PER_NODE --nnodes $NODES)
MODEL=(
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size=28672
    --num-attention-heads 64 --group-query-attention --num-query-groups 8
    --swiglu --untie-embeddings-and-output-weights --vocab-size 128256
    --seq-length 8192 --max-position-embeddings 8192
)
TRAIN=(
    --micro-batch-size 1 --global-batch-size 512 --lr 1.5e-4 --bf16 \\
    --tensor-model-parallel-size ${TP} --sequence-parallel
    # --context-parallel-size 4
    --pipeline-model-parallel-size 4
    --num-layers-per-virtual-pipeline-stage 5
    --use-distributed-optimizer --recompute-granularity full --recompute-method uniform
)
EIGHT+=("--fp8-format hybrid" "--split '99,1,0'")
torchrun ${LAUNCH[@]} pretrain_gpt.py ${MODEL[@]} ${TRAIN[@]} ${EIGHT[@]}
"""
YAML = """
ENV_VARS: {NCCL_IB_SL: 1}
MODEL_ARGS:
  --num-layers: 32
  --hidden-size: 4096
  --num-attention-heads: 32
  --group-query-attention: true
  --num-query-groups: 8
  --swiglu: true
  --ffn-hidden-size: 14336
  --untie-embeddings-and-output-weights: true
  --seq-length: 8192
  --micro-batch-size: 2
  --global-batch-size: 256
  --context-parallel-size: 2
  --use-megatron-fsdp: true
  --data-parallel-sharding-strategy: optim_grads_params
  --adam-beta1: 0.9
"""
NESTED = """
language_model: {num_layers: 24, hidden_size: 1024, num_attention_heads: 16,
  activation_func: swiglu, num_query_groups: null, recompute_granularity: null}
model_parallel: {tensor_model_parallel_size: 2, sequence_parallel: false}
micro_batch_size: 2
global_batch_size: 128
seq_length: 4096
vocab_size: 50000
untie_embeddings_and_output_weights: false
"""
TITAN = """
[model]
name = "llama3"
flavor = "405B"
converters = ["float8"]
[training]
local_batch_size = 16
seq_len = 8192
[parallelism]
data_parallel_shard_degree = 16
tensor_parallel_degree = 8
pipeline_parallel_degree = 4
pipeline_parallel_schedule = "Interleaved1F1B"
pipeline_parallel_layers_per_stage = 8
pipeline_parallel_microbatch_size = 2
[activation_checkpoint]
mode = "full"
[metrics]
log_freq = 10
"""
REGISTRY = """
raise RuntimeError("this file is read, not run")

def llama3_70b() -> Trainer.Config:
    spec = model_registry("70B", converters=[MXFP8LinearConverter.Config()])
    return Trainer.Config(
        model_spec=spec,
        training=TrainingConfig(
            num_tokens_per_microbatch_per_dp_rank=2 * 8192, max_context_length=8192, steps=10,
        ),
        parallelism=ParallelismConfig(tensor_parallel_degree=8),
        activation_checkpoint=FullAC.Config(),
    )

def small() -> Trainer.Config:
    config = llama3_70b()
    config.model_spec = model_registry("debugmodel")
    config.parallelism.tensor_parallel_degree = 2
    config.activation_checkpoint = SelectiveAC.Config()
    return config

def made() -> Trainer.Config:
    return build(3)[0]
"""


def _read(folder: Path, name: str, text: str, function: str = "") -> Imported:
    (folder / name).write_text(text)
    return import_settings(f"{folder / name}{function}")


def test_a_script_of_megatron(tmp_path: Path) -> None:
    found = _read(tmp_path, "train.sh", SCRIPT)
    assert found.model is not None
    want = PRESETS.get("llama3-70b")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "tie_embeddings"):
        assert getattr(found.model, name) == getattr(want, name)
    assert found.model.vocab_size == 129_024  # padded to a multiple of 128 * tp
    assert found.values == {
        "tp": 8, "pp": 4, "cp": 1, "chunks": 4, "schedule": "interleaved_1f1b", "micro_batch": 1,
        "less_first": 0, "less_last": 0,
        "recompute": "full", "precision": "fp8", "sharding": "zero1", "software": "plain",
        "n_gpus": 128, "global_batch": 512, "seq_len": 8192,
    }  # fmt: skip
    assert found.unknown == ["--lr", "--split"]
    assert found.notes == []


def test_yaml_of_megatron(tmp_path: Path) -> None:
    found = _read(tmp_path, "a.yaml", YAML)
    assert found.values["sharding"] == "zero3"
    assert found.values["cp"] == 2
    assert "n_gpus" not in found.values
    assert found.unknown == ["--adam-beta1"]
    assert any("128,256 assumed" in note for note in found.notes)
    nested = _read(tmp_path, "b.yaml", NESTED)
    assert nested.model is not None
    assert nested.model.tie_embeddings
    assert nested.model.ffn_dim == 2688  # two thirds of 4 * 1024, down to a multiple of 64
    assert nested.model.n_kv_heads == 16
    notes = " ".join(nested.notes)
    assert "no --sequence-parallel" in notes
    assert "no --use-distributed-optimizer" in notes


def test_toml_of_torchtitan(tmp_path: Path) -> None:
    found = _read(tmp_path, "a.toml", TITAN)
    assert found.model == PRESETS.get("llama3.1-405b")
    assert found.values == {
        "tp": 8, "cp": 1, "pp": 4, "replicate": 1, "micro_batch": 2, "sharding": "zero2",
        "seq_len": 8192, "recompute": "full", "precision": "fp8", "software": "plain",
        "schedule": "interleaved_1f1b", "chunks": 4, "n_gpus": 512, "global_batch": 256,
        "less_first": 1, "less_last": 1,
    }  # fmt: skip
    assert found.unknown == ["metrics.log_freq"]
    older = TITAN.replace("local_batch_size", "batch_size").replace('"full"', '"selective"')
    older = older.replace("pipeline_parallel_degree = 4", "").replace("16\nt", "-1\nt")
    found = _read(tmp_path, "b.toml", older)
    assert found.values["sharding"] == "zero3"  # without a pipeline weights are gathered twice
    assert found.values["recompute"] == "sac"
    assert found.values["rows_per_replica"] == found.values["micro_batch"] == 16
    assert "global_batch" not in found.values


def test_python_of_torchtitan_is_read_not_run(tmp_path: Path) -> None:
    found = _read(tmp_path, "config_registry.py", REGISTRY, ":llama3_70b")
    assert found.model == PRESETS.get("llama3.1-70b")
    assert found.values["precision"] == "mxfp8"
    assert found.values["recompute"] == "full"
    assert (found.values["micro_batch"], found.values["seq_len"]) == (2, 8192)
    assert found.unknown == ["training.steps"]
    small = import_settings(f"{tmp_path / 'config_registry.py'}:small")
    assert small.model is not None
    assert small.model.n_layers == 6
    assert (small.values["tp"], small.values["recompute"]) == (2, "sac")
    assert small.values["precision"] == "bf16"
    for words, says in (
        (":made", "does not return a configuration"),
        ("", "It has llama3_70b, small, made"),
    ):
        with pytest.raises(PunaError, match=says):
            import_settings(f"{tmp_path / 'config_registry.py'}{words}")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.sh", "echo nothing", "no setting"),
        ("a.sh", "--num-layers 2 --hidden-size 64", "num-attention-heads missing"),
        ("a.sh", "--num-layers x --hidden-size 64", "num-layers = 'x' is no whole number"),
        ("a.sh", "--num-layers 2 --num-experts 8", "mixture of experts"),
        ("a.yaml", "a: [", "not YAML"),
        ("a.yaml", "- 1", "not a table"),
        ("a.toml", "a = ", "not toml"),
        ("a.toml", "[train.pretrain]\nseq_len = 3", "not torchtitan's"),
        ("a.toml", '[model]\nname = "qwen3"', "no Llama 3"),
        ("a.ini", "", "settings end in"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(PunaError, match=says):
        _read(tmp_path, name, text)


def test_options_replace_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(SCRIPT)
    call = ["plan", "estimate", "--from", str(tmp_path / "train.sh")]
    done = CliRunner().invoke(cli, [*call, "--json"], catch_exceptions=False)
    job = json.loads(done.stdout)["job"]
    assert (job["n_gpus"], job["layout"]["tp"], job["precision"]) == (128, 8, "fp8")
    assert job["model"]["n_layers"] == 80
    done = CliRunner().invoke(
        cli, [*call, "--json", "--tp", "4", "--model", "llama3-8b", "--chunks", "2"],
        catch_exceptions=False,
    )  # fmt: skip
    job = json.loads(done.stdout)["job"]
    assert (job["n_gpus"], job["layout"]["tp"], job["layout"]["chunks"]) == (128, 4, 2)
    assert job["model"]["n_layers"] == 32
    (tmp_path / "a.yaml").write_text(YAML)
    done = CliRunner().invoke(cli, [*call[:3], str(tmp_path / "a.yaml")])
    assert "--gpus is missing" in str(done.exception)
    with pytest.raises(PunaError, match="no such file"):
        import_settings(str(tmp_path / "missing.sh"))
