"""A plain elastic training for ``bench_gap.py``: gloo, a checkpoint per step, torchrun restarts it.

torchrun --nproc-per-node=2 --max-restarts=9 gap_peer.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
store = dist.PrefixStore(
    os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False),
)
dist.init_process_group("gloo", store=store, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
torch.manual_seed(0)
model = torch.nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters())
saved = folder / "last.pt"
step = 0
if saved.exists():
    state = torch.load(saved, weights_only=True)
    step = state["step"]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
while True:
    model(torch.randn(64, 256)).square().mean().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if rank == 0:
        aside = saved.with_suffix(".tmp")
        torch.save(
            {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, aside
        )
        aside.rename(saved)
    note = {"pid": os.getpid(), "step": step, "t_mono_s": time.monotonic()}
    with (folder / f"steps-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")
    time.sleep(0.02)
