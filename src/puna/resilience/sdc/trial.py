"""A tiny training on replicas that are threads, with one bit flipped at a chosen place.

The checks are those of a real training, called in the same order; only ranks and sums are stand-ins
(a thread each, the sum in the order of the ranks).

Shapes: B rows, C width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.core.ledger import Ledger
from puna.resilience.sdc.abft import RotatingCheck
from puna.resilience.sdc.digest import digest_named
from puna.resilience.sdc.guard import StateGuard
from puna.resilience.sdc.inject import flip_bit
from puna.resilience.sdc.peers import Peers
from puna.resilience.sdc.replay import ReplayCheck

Site = Literal[
    "weight", "optimiser state", "local gradient", "summed gradient", "activation",
    "product", "data",
]  # fmt: skip
SITES: tuple[Site, ...] = get_args(Site)
_VOCAB, _WIDTH, _HIDDEN, _ROWS = 64, 32, 128, 16
_WARM_STEPS = 2
_TOKEN_BITS = 6  # above, the lookup of a token fails, which is not silent


@dataclass
class Flip:
    """One flipped bit.

    Attributes:
        site: Where.
        rank: On which rank.
        where: From 0 to 1: which element, of all that the site has.
        bit: From 0 to 1: which bit of it.
        layer: Number of the layer, for ``product``.
        moved: How far the value moved, in units of the mean magnitude of its tensor.
    """

    site: Site
    rank: int
    where: float
    bit: float
    layer: int = 0
    moved: float = math.nan

    def hit(self, x: Tensor) -> None:
        """Flip it in a tensor."""
        n_bits = _TOKEN_BITS if self.site == "data" else 8 * x.element_size()
        mean = float(x.detach().float().abs().mean())
        moved = flip_bit(x, int(self.where * x.numel()), int(self.bit * n_bits))
        self.moved = moved / mean if mean else math.inf

    def hit_one_of(self, tensors: Sequence[Tensor]) -> None:
        """Flip it in one of several, each element alike."""
        at = int(self.where * sum(x.numel() for x in tensors))
        for x in tensors:
            if at < x.numel():
                self.where = (at + 0.5) / x.numel()
                return self.hit(x)
            at -= x.numel()
        raise ValueError("there are no tensors")


@dataclass
class Found:
    """What came of a step.

    Attributes:
        detectors: Those that saw something, on any rank.
        parameters: Of rank 0 after the update, by name.
        before: The same before it.
        error: Why a rank gave up; empty when the step was finished.
        named: Ranks that were named as wrong.
    """

    detectors: set[str] = field(default_factory=set)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""
    named: set[int] = field(default_factory=set)


class _Events(Ledger):
    """Keeps what the checks say."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[dict[str, Any]] = []

    def emit(self, kind: str, *, durable: bool = False, **fields: Any) -> dict[str, Any]:
        """Keep an event."""
        event = super().emit(kind, durable=durable, **fields)
        self.seen.append(event)
        return event


class Model(nn.Module):
    """Embedding, two linear layers with GELU, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCAB, _WIDTH)
        self.up = nn.Linear(_WIDTH, _HIDDEN, bias=False)
        self.down = nn.Linear(_HIDDEN, _WIDTH, bias=False)
        self.head = nn.Linear(_WIDTH, _VOCAB, bias=False)
        self.on_activation: Callable[[Tensor], None] | None = None

    def forward(self, tokens_B: Tensor) -> Tensor:
        """Return logits (B, V)."""
        x_BC = self.embedding(tokens_B)
        hidden_BC = F.gelu(self.up(x_BC))
        if self.on_activation is not None:
            self.on_activation(hidden_BC)
        return self.head(x_BC + self.down(hidden_BC))

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers."""
        return {"up": self.up, "down": self.down, "head": self.head}


class Replica:
    """One rank of the tiny training.

    Args:
        peers: The ranks.
        protect: With the checks.
        replay_every: See :class:`ReplayCheck`.
    """

    def __init__(self, peers: Peers, *, protect: bool = True, replay_every: int = 1) -> None:
        self._peers, self._protect = peers, protect
        self._n_ranks = len(peers.replicas[0])
        self.events = _Events()
        self.model = Model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.1, generator=generator)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.broken: Callable[[dict[str, Tensor]], None] | None = None
        self.detectors: set[str] = set()
        self._products = RotatingCheck(self.model.layers)
        self._guard: StateGuard | None = None
        self._replay = ReplayCheck(replay_every, peers, self._recompute, self.events)

    def tensors(self) -> dict[str, Tensor]:
        """Live parameters and optimiser state."""
        found = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"optim.{name}.{key}"] = value
        return found

    def step(self, step: int, flip: Flip | None = None, layer: int | None = None) -> None:
        """Train one step.

        Args:
            step: Its number.
            flip: What happens in it, on its rank, once.
            layer: Layer whose product is checked; the one whose turn it is when None.
        """
        if flip is not None and flip.rank != self._peers.rank:
            flip = None
        if self._protect and self._guard is None and step > 0:
            self._guard = StateGuard(
                self.tensors(), self._peers, self.events, gradients=self._summed
            )
            self._guard.after_update(step - 1)
        if flip is not None and flip.site in ("weight", "optimiser state"):
            kind = "model." if flip.site == "weight" else "optim."
            flip.hit_one_of(
                [x for name, x in self.tensors().items() if name.startswith(kind) and x.ndim]
            )
        left = 3
        while self._is_wrong(step, flip, layer):
            flip, left = None, left - 1
            if not left:
                raise RuntimeError(f"step {step} stays wrong")
        self.optimizer.step()
        if self._guard is not None:
            self._guard.after_update(step)

    def _is_wrong(self, step: int, flip: Flip | None, layer: int | None) -> bool:
        if self._protect:
            self._products.arm(step if layer is None else layer)
        local = self._gradients(step, self._peers.rank, flip)
        own = digest_named(local) if self._protect and self._replay.is_due(step) else 0
        summed = self._sum(local)
        if flip is not None and flip.site == "summed gradient":
            flip.hit_one_of(list(summed.values()))
        for name, parameter in self.model.named_parameters():
            parameter.grad = summed[name]
        if not self._protect:
            return False
        wrong = self._products.take()
        # First of all: damaged parameters look like a rank that computes wrongly.
        if self._guard is not None and self._guard.before_update(step):
            self.detectors.add("state")
            return True
        is_wrong = any(n for (n,) in self._peers.gather([len(wrong)]))
        if is_wrong:
            self.detectors.add("products")
        if self._replay.is_due(step) and self._replay.check(step, own, self._n_ranks):
            self.detectors.add("replay")
            is_wrong = True
        return is_wrong

    def _gradients(self, step: int, rank: int, flip: Flip | None = None) -> dict[str, Tensor]:
        tokens_B, labels_B = make_batch(step, rank)
        if flip is not None and flip.site == "data":
            flip.hit(tokens_B)
        hook = self._aim(flip)
        loss = F.cross_entropy(self.model(tokens_B), labels_B)
        found = torch.autograd.grad(loss, list(self.model.parameters()))
        hook()
        named = {name: g for (name, _), g in zip(self.model.named_parameters(), found, strict=True)}
        if flip is not None and flip.site == "local gradient":
            flip.hit_one_of(list(named.values()))
        if self.broken is not None:
            self.broken(named)
        return named

    def _aim(self, flip: Flip | None) -> Callable[[], None]:
        """Let a flip happen inside the forward pass; return what undoes that."""
        if flip is not None and flip.site == "activation":
            self.model.on_activation = flip.hit
        elif flip is not None and flip.site == "product":
            layer = list(self.model.layers.values())[flip.layer]

            def strike(module: nn.Module, inputs: Any, output: Tensor) -> None:
                flip.hit(output)

            # Before the checksum looks: prepended hooks are called first.
            return layer.register_forward_hook(strike, prepend=True).remove
        return self._calm

    def _calm(self) -> None:
        self.model.on_activation = None

    def _recompute(self, step: int, rank: int) -> int:
        return digest_named(self._gradients(step, rank))

    def _sum(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        every = self._peers.gather_any({name: g.clone() for name, g in local.items()})
        summed = {
            name: torch.stack([one[name] for one in every]).sum(0).div_(len(every))
            for name in local
        }
        self._peers.gather([0])  # nobody writes into what another still reads
        return summed

    def _summed(self) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


def make_batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels (B) of a rank, anew at each call."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens_B = torch.randint(_VOCAB, (_ROWS,), generator=generator)
    return tokens_B, (3 * tokens_B + 1) % _VOCAB


def run_trial(peers: Peers, flip: Flip | None, *, protect: bool, layer: int | None = None) -> Found:
    """Train some clean steps, then one with a flip; return what this rank saw.

    Args:
        peers: The ranks; every rank has a copy of the flip, or all have the same.
        flip: The flip; None for a clean run.
        protect: With the checks.
        layer: Layer whose product is checked.
    """
    replica = Replica(peers, protect=protect)
    found = Found()
    for step in range(_WARM_STEPS):
        replica.step(step)
    found.before = {n: p.detach().clone() for n, p in replica.model.named_parameters()}
    try:
        replica.step(_WARM_STEPS, flip, layer)
    except RuntimeError as error:
        found.error = str(error)
    found.detectors = replica.detectors
    found.named = {
        rank for event in replica.events.seen if "ranks" in event for rank in event["ranks"]
    }
    if any(event.get("where") == "update" for event in replica.events.seen):
        found.detectors.add("state")
    found.parameters = {n: p.detach().clone() for n, p in replica.model.named_parameters()}
    return found
