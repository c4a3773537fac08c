"""The layout probe: what a wrong conversion does to weights, seen in the weights themselves.

A conversion that leaves out the reordering of wq and wk, or does it twice, or glues the shards of
the embedding along the wrong dimension, gives files of the right shapes and a model that talks
nonsense. Training leaves marks that show it:

- RoPE. In trained models the norm of a row of wq or wk depends on the frequency that RoPE rotates
  it by (slow pairs are used most). Averaged over heads and layers, the norms are a smooth function
  of the frequency only when the rows are assigned to the right frequencies. For SmolLM2-135M a
  cubic explains 98 to 99 % of their variance in the right order, and at most 56 % in a wrong one.
- Embedding. Rows that were cut apart and put back in another order show a period in the norms of
  rows or of columns.

Random and hardly trained weights have no such marks: then nothing is decided and nothing refused.

Shapes: N heads, D head_dim, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from puna.core.errors import PunaError
from puna.model.formats.parts import parts_of
from puna.model.names import EMBEDDING

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from puna.model.formats.checkpoint import Checkpoint

Verdict = Literal["right", "undecided", "wrong", "note"]

_BUDGET_BYTES = 256 << 20  # of wq and wk to read: the layers that fit, spread over the model
_MIN_LAYERS, _MAX_LAYERS = 2, 16
_MIN_HEAD_DIM = 32  # fewer rows, and noise can look like a function
_DEGREE = 3
_CLEAR = 0.7  # share of variance that a frequency must explain; by chance 2e-7 at 32 rows
_RATIO = 3.0  # unexplained in the present order by unexplained in the better one
_RUN_ROWS, _N_RUNS = 64, 64  # of the embedding's rows that are looked at
_QUANTISED_VALUES = 1 << 26  # a larger quantised embedding is not unpacked only to look at it
_SHARD_COUNTS = (2, 4, 8, 16)
_CLASS_RATIO = 50.0  # variance between by variance within classes of rows; 1 by chance
_PERIOD_CORRELATION = 0.8


@dataclass(frozen=True)
class Finding:
    """One result of the probe.

    Attributes:
        what: ``wq``, ``wk``, ``embedding`` or ``heads``.
        verdict: ``wrong`` only on decisive evidence; ``undecided`` when the weights carry no mark.
        message: One sentence with the numbers.
        fix: What to do; empty unless something is wrong or could be better.
    """

    what: str
    verdict: Verdict
    message: str
    fix: str = ""


def probe_layout(checkpoint: Checkpoint) -> list[Finding]:
    """Look for the marks of a wrong conversion; reads a few layers and rows.

    Args:
        checkpoint: Opened, of any format.

    Raises:
        PunaError: The file is damaged where it was read.
    """
    return [*_probe_attention(checkpoint), *_probe_embedding(checkpoint)]


def refuse_wrong_layout(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose layout is decisively wrong.

    Raises:
        PunaError: Says what is wrong and how to mend it.
    """
    for finding in probe_layout(checkpoint):
        if finding.verdict == "wrong":
            raise PunaError(f"{checkpoint.path}: {finding.message}", finding.fix)


def _probe_attention(checkpoint: Checkpoint) -> Iterator[Finding]:
    import torch

    config = checkpoint.config
    profiles: dict[str, list[Tensor]] = {"wq": [], "wk": []}
    group = config.n_kv_heads  # how many neighbouring key/value heads are the same in all layers
    for layer in _layers(checkpoint):
        prefix = f"layers.{layer}.attention"
        ((_, gain_C),) = checkpoint.tensors([f"{prefix}_norm.weight"])
        names = {f"{prefix}.{which}.weight": which for which in profiles}
        for name, w_RC in checkpoint.tensors(names):
            profiles[names[name]].append(_row_norms(w_RC, gain_C, config.head_dim))
            if names[name] == "wk":
                group = _equal_heads(w_RC, group, config.head_dim)
            del w_RC  # or it would live on while the next one is made
    if config.n_heads == config.n_kv_heads and group > 1:
        yield Finding(
            "heads", "note",
            f"groups of {group} key heads are equal: grouped-query attention was expanded to "
            f"{config.n_kv_heads} heads, which costs {group} times the KV cache",
            f"keep every {group}th head of wk and wv and set {config.n_kv_heads // group} "
            "key/value heads",
        )  # fmt: skip
    for which, parts in profiles.items():
        yield _judge(checkpoint, which, torch.cat(parts).mean(dim=0))


def _layers(checkpoint: Checkpoint) -> list[int]:
    config, stored = checkpoint.config, checkpoint.stored
    each = sum(stored[f"layers.0.attention.{name}.weight"].n_bytes for name in ("wq", "wk"))
    count = min(max(_BUDGET_BYTES // max(each, 1), _MIN_LAYERS), _MAX_LAYERS, config.n_layers)
    # From the end: the first layers use positions least.
    return sorted({config.n_layers - 1 - at * config.n_layers // count for at in range(count)})


def _row_norms(
    w_RC: Float[Tensor, "rows dim"], gain: Float[Tensor, " dim"], head_dim: int
) -> Float[Tensor, "heads head_dim"]:
    """Return the logarithm of each row's norm, as its input scales it, less its head's mean."""
    import torch

    gain = gain.float()
    squares = [(part.float() * gain).square().sum(dim=1) for part in parts_of(w_RC)]
    logs_ND = torch.cat(squares).clamp_min(1e-30).log().view(-1, head_dim)
    return logs_ND - logs_ND.mean(dim=1, keepdim=True)


def _equal_heads(w_RC: Float[Tensor, "rows dim"], group: int, head_dim: int) -> int:
    """Return the largest divisor of ``group`` by which neighbouring heads are equal."""
    import torch

    heads = w_RC.view(-1, head_dim * w_RC.shape[1])
    for size in range(group, 1, -1):
        if group % size == 0:
            firsts, others = heads[::size], heads.view(-1, size, heads.shape[1])
            if all(torch.equal(firsts, others[:, at]) for at in range(1, size)):
                return size
    return 1


@dataclass(frozen=True)
class _Order:
    """A way in which rows can be out of order.

    Attributes:
        message: What it is.
        frequency: The number of the frequency (0 the fastest) that each row of a head belongs to.
    """

    message: str
    frequency: Int[Tensor, " head_dim"]


def _orders(checkpoint: Checkpoint, which: str) -> Iterator[_Order]:
    import torch

    config = checkpoint.config
    rows_D, half = torch.arange(config.head_dim), config.head_dim // 2
    reader = " after the reader's own reordering" if checkpoint.kind != "hf" else ""
    yield _Order("", rows_D % half)
    yield _Order(
        f"are in Meta's order (pairs 2i, 2i + 1){reader}, so a conversion left out the reordering",
        rows_D // 2,
    )
    yield _Order(f"were reordered twice{reader}", _moved(rows_D, config.head_dim) % half)
    wrong_dim, rest = divmod(config.kv_dim, config.n_heads)
    if which == "wk" and wrong_dim < config.head_dim and not rest and wrong_dim % 2 == 0:
        moved_D = rows_D // wrong_dim * wrong_dim + _moved(rows_D % wrong_dim, wrong_dim)
        yield _Order(
            f"were reordered as {config.n_heads} heads instead of {config.n_kv_heads} "
            "(grouped-query attention was not considered)",
            moved_D // 2,
        )


def _moved(rows: Int[Tensor, " rows"], head_dim: int) -> Int[Tensor, " rows"]:
    """Return the row that comes to a place when pairs (2i, 2i+1) move to (i, i+D/2)."""
    half = head_dim // 2
    return rows % half * 2 + rows // half


def _judge(checkpoint: Checkpoint, which: str, norms_D: Float[Tensor, " head_dim"]) -> Finding:
    if checkpoint.config.head_dim < _MIN_HEAD_DIM:
        return Finding(
            which, "undecided",
            f"heads of {checkpoint.config.head_dim} rows are too small to tell their order",
        )  # fmt: skip
    present, *others = _orders(checkpoint, which)
    share = _explained(norms_D, present.frequency)
    shares = [(_explained(norms_D, order.frequency), order) for order in others]
    best, order = max(shares, key=lambda item: item[0])
    if best >= _CLEAR and 1 - share >= _RATIO * (1 - best):
        return Finding(
            which, "wrong",
            f"the rows of {which} {order.message}: RoPE's frequencies explain {best:.0%} of the "
            f"variance of their norms in that order, {share:.0%} in the present one",
            "convert the original checkpoint again (puna model convert), or pass probe=False "
            "(--no-probe) to load it as it is",
        )  # fmt: skip
    if share >= _CLEAR and 1 - best >= _RATIO * (1 - share):
        return Finding(
            which, "right",
            f"the rows of {which} are in order: RoPE's frequencies explain {share:.0%} of the "
            f"variance of their norms, {best:.0%} in the best wrong order",
        )  # fmt: skip
    return Finding(
        which, "undecided",
        f"the rows of {which} do not tell their order: RoPE's frequencies explain {share:.0%} of "
        f"the variance of their norms, {best:.0%} in another order (as in a model that is not "
        "trained)",
    )  # fmt: skip


def _explained(norms_D: Float[Tensor, " head_dim"], frequency_D: Int[Tensor, " head_dim"]) -> float:
    """Return the share of the variance that a cubic in the number of the frequency explains."""
    import numpy as np  # torch would wake its threads for these few numbers

    y_D = norms_D.double().numpy()
    x_D = frequency_D.double().numpy()
    powers = np.vander(x_D / x_D.max() * 2 - 1, _DEGREE + 1)
    rest_D = y_D - powers @ np.linalg.lstsq(powers, y_D, rcond=None)[0]
    total = np.square(y_D - y_D.mean()).sum()
    return float(1 - np.square(rest_D).sum() / total) if total > 0 else 0.0


def _probe_embedding(checkpoint: Checkpoint) -> Iterator[Finding]:
    stored = checkpoint.stored[EMBEDDING]
    quantised = stored.dtype not in ("float32", "bfloat16", "float16")
    if quantised and stored.n_elements > _QUANTISED_VALUES:
        yield Finding("embedding", "undecided", "the quantised embedding is too large to look at")
        return
    ((_, e_RC),) = checkpoint.tensors([EMBEDDING])
    sample_RC, n_runs = _sample_rows(e_RC)
    checks: tuple[tuple[Callable[[Tensor, int], float], float, str], ...] = (
        (_class_ratio, _CLASS_RATIO, "the norms of every {n}th row belong together: F ratio"),
        (_column_period, _PERIOD_CORRELATION, "the norms of columns repeat {n} times: correlation"),
    )
    counts = [n for n in _SHARD_COUNTS if n <= n_runs and sample_RC.shape[1] % (8 * n) == 0]
    for measure, limit, text in checks:
        for n in reversed(counts):  # from the largest: a multiple shows the marks too
            value = measure(sample_RC, n)
            if value > limit:
                yield Finding(
                    "embedding", "wrong",
                    f"{stored.stored_name} was put together from shards along the wrong dimension "
                    f"({text.format(n=n)} {value:.3g}, in order below {limit:g})",
                    "convert the original checkpoint again (puna model convert); its shards are "
                    "cut by columns in Llama 2 and by rows in Llama 3",
                )  # fmt: skip
                return
    yield Finding("embedding", "undecided", "the embedding shows no sign of mixed-up shards")


def _sample_rows(e_RC: Float[Tensor, "vocab dim"]) -> tuple[Float[Tensor, "rows dim"], int]:
    """Return runs of neighbouring rows, spread evenly, and their number (a power of two)."""
    import torch

    n_runs = _N_RUNS
    while n_runs > 1 and n_runs * _RUN_ROWS > e_RC.shape[0]:
        n_runs //= 2
    # On multiples of the length of a run, so that a row's place in it is its class.
    last = (e_RC.shape[0] - _RUN_ROWS) // _RUN_ROWS
    if last < 0:
        return e_RC[:0].float(), 0
    starts = [at * last // max(n_runs - 1, 1) * _RUN_ROWS for at in range(n_runs)]
    return torch.cat([e_RC[start : start + _RUN_ROWS].float() for start in starts]), n_runs


def _class_ratio(sample_RC: Float[Tensor, "rows dim"], n: int) -> float:
    """Return the F ratio of the rows' norms over the classes row mod n; near 1 when in order."""
    import torch

    squares = [part.square().sum(dim=1) for part in parts_of(sample_RC)]
    norms = torch.cat(squares).clamp_min(1e-30).log().view(-1, n)
    within = norms.var(dim=0).mean()
    between = norms.mean(dim=0).var() * norms.shape[0]
    return float(between / within) if within > 0 else 0.0


def _column_period(sample_RC: Float[Tensor, "rows dim"], n: int) -> float:
    """Return how alike the norms of columns are at a distance of 1/n of a row; near 0 in order."""
    import numpy as np

    blocks = sample_RC.view(n, -1, sample_RC.shape[1]).square().mean(dim=1)
    norms = blocks.clamp_min(1e-30).log().view(n, n, -1)  # block of rows, repetition, column
    if float(norms.var(dim=-1).min()) <= 0:
        return 0.0
    pairs = [float(np.corrcoef(block[:2].numpy())[0, 1]) for block in norms]
    return min(pairs)
