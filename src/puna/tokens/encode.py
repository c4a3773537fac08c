"""Stage ``tokens.encode``: documents to memory-mapped token shards."""

from __future__ import annotations

import time
from pathlib import Path

from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.progress import progress, say
from puna.core.stage import Artifacts, Metrics, stage
from puna.core.units import MIB, format_count
from puna.data.engine import EngineConfig, open_engine

_BYTES_PER_WORKER = {True: 96 * MIB, False: 4 * MIB}
"""A worker process takes about two seconds to start, in which the compiled path (True) encodes some
80 MB and the library (False) 4 MB; with less text than this a further worker only costs."""


class EncodeConfig(EngineConfig):
    """Tokenisation of the documents; everything that decides the ids is in the tokenizer."""


@stage(
    "tokens.encode",
    needs={
        "documents": "data.compose|tokens.count|data.split",
        "tokenizer": "tokens.train|tokens.use",
    },
    resumable=True,
    schema_version=2,
)
def encode_documents(cfg: EncodeConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Tokenise all documents into shards per split and source.

    Workers encode row groups of the document shards into chunks; the end sorts the documents of
    each split and source by id and counts everything again. A document that a pass reads several
    times (column ``repeat`` of ``data.compose``) is encoded once; ``repeats.npy`` tells the loader.
    A killed attempt continues at the first row group without a chunk. The shards are the same for
    any number of workers. Memory holds one batch of text per worker and 60 bytes per document.

    Raises:
        PunaError: A document shard or the tokenizer is damaged, a document has an unknown split or
            an id that occurs twice.
    """
    from puna.data.stagework import SCRATCH_DIR
    from puna.tokens.documents import document_pieces
    from puna.tokens.encode_publish import publish
    from puna.tokens.encode_unit import WORK_DIR, Unit, encode_unit, load_state
    from puna.tokens.tokenizer import load_tokenizer

    start_s = time.monotonic()
    documents, folder = inputs["documents"].path, inputs["tokenizer"].path
    tokenizer = load_tokenizer(folder)
    units = [
        Unit(piece, folder, out / WORK_DIR / f"{index:06d}")
        for index, piece in enumerate(document_pieces(documents))
    ]
    (out / WORK_DIR).mkdir(exist_ok=True)
    states = {unit.chunk: state for unit in units if (state := load_state(unit)) is not None}
    todo = [unit for unit in units if unit.chunk not in states]
    n_resumed = len(states)
    if n_resumed:
        say(f"  {n_resumed} of {len(units)} row groups were encoded by an earlier attempt")
    total_mb = sum(unit.piece.n_bytes for unit in units) / 1e6
    todo_bytes = sum(unit.piece.n_bytes for unit in todo)
    useful = 1 + todo_bytes // _BYTES_PER_WORKER[tokenizer.is_compiled]
    n_tokens = n_new_bytes = 0
    with (
        progress("tokens.encode", total=total_mb, unit="MB",
                 initial=total_mb - todo_bytes / 1e6) as bar,
        open_engine(cfg, out / SCRATCH_DIR) as engine,
    ):  # fmt: skip
        encoded = engine.map(encode_unit, todo, useful_workers=useful)
        for unit, state in zip(todo, encoded, strict=True):
            states[unit.chunk] = state
            n_tokens, n_new_bytes = n_tokens + state["n_tokens"], n_new_bytes + state["n_bytes"]
            bar.advance(unit.piece.n_bytes / 1e6, note=f"{format_count(n_tokens)} tokens")
    encode_s = time.monotonic() - start_s
    ordered = [states[unit.chunk] for unit in units]
    totals = publish(units, ordered, tokenizer, out)
    remove_tree(out / WORK_DIR)
    seconds = time.monotonic() - start_s
    return {
        **totals,
        "seconds": seconds,
        "encode_s": encode_s,
        "worker_s": sum(state["seconds"] for state in ordered),
        "units": len(units),
        "units_resumed": n_resumed,
        "tokens_per_s": n_tokens / max(seconds, 1e-9),
        "mb_per_s": n_new_bytes / 1e6 / max(seconds, 1e-9),
        "headline": f"{format_count(totals['tokens'])} tokens, "
        f"{totals['bytes_per_token']:.2f} bytes per token",
    }
