"""Speed of the model against transformers: same weights, same inputs, in one run.

    python benchmarks/bench_model.py [--preset demo] [--batch 4] [--repeats 4]

Every repeat runs all contenders once, one after the other, and the fastest repeat counts: load from
elsewhere slows a repeat, it never makes one faster. Before timing, the logits are compared.
A training step is forward, cross-entropy and backward; the optimiser is not part of the model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table

from puna.lm.language_model import LanguageModel
from puna.model.accounting import account
from puna.model.attention import plan_attention
from puna.model.config import PRESETS
from puna.model.formats.hf import hf_name
from puna.model.formats.hf_config import config_to_hf
from puna.model.llama import Llama

Run = Callable[[], object]
Clock = Callable[[], float]
DOCUMENT_TOKENS = (350, 40, 122)  # repeated and cut to the row: long, short and middle documents


def build_peer(model: Llama, attention: str):
    """The same weights in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**config_to_hf(model.config), attn_implementation=attention)
    peer = LlamaForCausalLM(config)
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    peer.load_state_dict(state)
    return peer


def fastest(runs: dict[str, Run], repeats: int, clock: Clock) -> dict[str, float]:
    """Seconds of the fastest repeat of each contender, interleaved, after one warm-up."""
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start_s = clock()
            run()
            if repeat:
                best[name] = min(best[name], clock() - start_s)
    return best


def model_cases(model: Llama, peers: dict, batch: int, n_new: int) -> list[tuple]:
    """(name, tokens per run, contender -> run); the first contender is ours."""
    config = model.config
    seq_len = config.max_seq_len
    tokens_BT = torch.randint(config.vocab_size, (batch, seq_len))
    labels_N = tokens_BT.roll(-1, 1).flatten()
    lengths = []
    while sum(lengths) < seq_len:
        lengths.append(min(DOCUMENT_TOKENS[len(lengths) % 3], seq_len - sum(lengths)))
    doc_ids_BT = torch.repeat_interleave(torch.tensor(lengths)).expand(batch, -1)
    positions_BT = torch.cat([torch.arange(n) for n in lengths]).expand(batch, -1)

    def step(module: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Run:
        def run() -> None:
            module.zero_grad(set_to_none=True)
            F.cross_entropy(forward().flatten(0, 1), labels_N).backward()

        return run

    def ours() -> torch.Tensor:
        return model(tokens_BT)

    def ours_packed() -> torch.Tensor:
        return model(tokens_BT, positions_BT, doc_ids_BT)

    forward: dict[str, Run] = {"puna": torch.no_grad()(ours)}
    whole, packed = {"puna": step(model, ours)}, {"puna": step(model, ours_packed)}
    prompt = tokens_BT[:1, :16]
    ids, language_model = prompt[0].tolist(), LanguageModel(model)
    decode: dict[str, Run] = {
        "puna": lambda: language_model.generate_ids(ids, temperature=0, max_new_tokens=n_new)
    }
    for name, peer in peers.items():

        def theirs(peer=peer) -> torch.Tensor:
            return peer(tokens_BT, use_cache=False).logits

        def theirs_packed(peer=peer) -> torch.Tensor:
            # positions that restart make transformers build the mask of packed documents
            return peer(tokens_BT, position_ids=positions_BT, use_cache=False).logits

        def theirs_decode(peer=peer) -> None:
            peer.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                max_new_tokens=n_new, min_new_tokens=n_new,
            )  # fmt: skip

        with torch.no_grad():
            torch.testing.assert_close(theirs(), ours(), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(theirs_packed(), ours_packed(), rtol=1e-3, atol=1e-3)
        forward[name] = torch.no_grad()(theirs)
        whole[name], packed[name] = step(peer, theirs), step(peer, theirs_packed)
        decode[name] = theirs_decode
    return [
        ("forward", batch * seq_len, forward),
        ("training step, whole rows", batch * seq_len, whole),
        (f"training step, {len(lengths)} documents a row", batch * seq_len, packed),
        (f"decode {n_new} tokens, batch 1", n_new, decode),
    ]


def attend(qkv: list[torch.Tensor], seq_len: int, doc_ids_BT, kind) -> None:
    """One layer's attention, forward and backward, its plan included."""
    plan_attention(seq_len, qkv[0].device, doc_ids_BT, kind)(*qkv).sum().backward()


def attention_cases(model: Llama, batch: int) -> list[tuple]:
    """Forward and backward of one layer's attention under each plan."""
    config = model.config
    seq_len = config.max_seq_len
    shapes = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    qkv = [torch.randn(batch, seq_len, n, config.head_dim, requires_grad=True) for n in shapes]
    cases = []
    for n_documents in (1, 4, 16):
        ids_T = torch.arange(seq_len) * n_documents // seq_len
        doc_ids_BT = None if n_documents == 1 else ids_T.expand(batch, -1)
        kinds = ("pieces", "mask") if n_documents > 1 else ("pieces", "mask", "causal")
        runs: dict[str, Run] = {
            kind: partial(attend, qkv, seq_len, doc_ids_BT, kind) for kind in kinds
        }
        cases.append((f"attention, {n_documents} document(s) a row", batch * seq_len, runs))
    return cases


def print_table(
    title: str, cases: list[tuple], repeats: int, clock: Clock, console: Console
) -> None:
    """Run the cases and print tokens per second, and ours as a multiple of each other one."""
    names = list(dict.fromkeys(name for _, _, runs in cases for name in runs))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case")
    for name in [*(f"{name} tok/s" for name in names), *(f"vs {name}" for name in names[1:])]:
        table.add_column(name, justify="right")
    for case, n_tokens, runs in cases:
        best = fastest(runs, repeats, clock)
        speeds = [f"{n_tokens / best[name]:,.0f}" if name in best else "-" for name in names]
        ratios = [f"{best[n] / best[names[0]]:.2f}x" if n in best else "-" for n in names[1:]]
        table.add_row(case, *speeds, *ratios)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="on a busy machine: CPU time, with one thread"
    )
    arguments = parser.parse_args()
    n_threads = 1 if arguments.cpu_time else arguments.threads
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    import transformers

    transformers.logging.set_verbosity_error()
    model = Llama(PRESETS.get(arguments.preset))
    peers = {name: build_peer(model, name) for name in ("sdpa", "eager")}
    console = Console(width=120, highlight=False)
    cost = account(model.config)
    console.print(
        f"{arguments.preset}: {cost.n_params:,} parameters, "
        f"{cost.flops_per_token() / 1e6:.1f} MFLOP per trained token; "
        f"batch {arguments.batch} x {model.config.max_seq_len} tokens, float32, "
        f"{n_threads} threads, {'CPU' if arguments.cpu_time else 'wall'} time; "
        f"sdpa and eager: transformers {transformers.__version__}"
    )
    cases = model_cases(model, peers, arguments.batch, arguments.new_tokens)
    print_table("Model against transformers", cases, arguments.repeats, clock, console)
    cases = attention_cases(model, arguments.batch)
    print_table("Ways to compute attention", cases, arguments.repeats, clock, console)


if __name__ == "__main__":
    main()
