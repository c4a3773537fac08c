"""From the start of the process to the end of the first optimiser step of a small model.

    python benchmarks/bench_start.py [--rounds 5] [--litgpt PYTHON]

Ours is one rank as the supervisor starts it, with its ledger and checkpoints. ``--litgpt`` names an
interpreter that has litgpt: the same shape is then trained by ``litgpt.pretrain.setup`` in turn, as
it is (it compiles the model) and with compilation switched off.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from puna.core.ledger import LEDGER_FILE, read_events
from puna.model.config import LlamaConfig
from puna.train.config import TrainingConfig
from puna.train.spec import JobSpec, SourceSpec

MODEL = LlamaConfig(
    vocab_size=512, dim=64, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=128, max_seq_len=128
)
LITGPT = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
start_s, compiles = float(sys.argv[1]), sys.argv[2] == "1"
def stop(*_):
    print(time.time() - start_s, flush=True)
    os._exit(0)
register_optimizer_step_post_hook(stop)
import litgpt.pretrain
from litgpt import Config
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
@dataclass
class Random(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=64):
        pass
    def train_dataloader(self):
        return DataLoader(torch.randint(0, 512, (8, 65)), batch_size=4)
    val_dataloader = train_dataloader
if not compiles:
    torch.compile = lambda model, **_: model
config = Config(
    name="small", block_size=128, vocab_size=512, padded_vocab_size=512, n_layer=4, n_head=4,
    n_query_groups=2, n_embd=64, intermediate_size=128, norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP", bias=False, parallel_residual=False, rotary_percentage=1.0,
)
litgpt.pretrain.setup(
    "small", model_config=config, out_dir=Path(sys.argv[3]), precision="32-true", data=Random(),
    devices=1, logger_name="csv", eval=EvalArgs(interval=10**6, initial_validation=False),
    train=TrainArgs(
        save_interval=None, log_interval=1, global_batch_size=4, micro_batch_size=4,
        max_tokens=512, max_seq_length=64, max_norm=1.0, tie_embeddings=False, lr_warmup_steps=0,
    ),
)
"""


def ours(folder: Path) -> float:
    """Seconds of one rank."""
    here = str(Path(__file__).resolve().parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    source = SourceSpec("bench_train:RandomRows", {"vocab_size": 512, "seq_len": 64, "n_rows": 4})
    spec = JobSpec(
        job="start", out=folder, ledger=folder / LEDGER_FILE, common={}, source=source, model=MODEL,
        weights=None, special_ids={},
        training=TrainingConfig(steps=1, seq_len=64, global_batch=4, precision="fp32"),
    )  # fmt: skip
    spec.attempt_dir(0).mkdir(parents=True)
    path = spec.write()
    start_s = time.time()
    subprocess.run([sys.executable, "-m", "puna.train.worker", path, "0"], env=env, check=True)
    (step,) = read_events(folder / LEDGER_FILE, "train.step")
    return step["t_wall_s"] - start_s


def litgpt(python: str, folder: Path, compiles: bool) -> float:
    """Seconds of litgpt."""
    script = folder / "start.py"
    script.write_text(LITGPT)
    command = [python, str(script), str(time.time()), str(int(compiles)), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--litgpt", metavar="PYTHON")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for _ in range(options.rounds + 1):
        runs = {"puna": ours}
        if options.litgpt:
            for name, compiles in (("litgpt", True), ("litgpt, not compiled", False)):
                runs[name] = lambda f, c=compiles: litgpt(options.litgpt, f, c)
        for name, run in runs.items():
            folder = Path(tempfile.mkdtemp())
            seconds.setdefault(name, []).append(run(folder))
            shutil.rmtree(folder)
    own = statistics.median(seconds["puna"][1:])
    for name, values in seconds.items():
        median = statistics.median(values[1:])  # the first one reads the disk
        print(f"{name:24s} {median:6.2f} s   {own / median:5.2f} of it")


if __name__ == "__main__":
    main()
