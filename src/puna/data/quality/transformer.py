"""Fine-tuning a transformer encoder together with its head, on a CPU or a GPU.

The head starts as the one that was fitted to the frozen encoder: a random one would distort the
encoder before it has learnt anything (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained
Features"). AdamW, linear warm-up and decay; the best state on held-out texts is kept, which may be
the first, so the result is never worse than the frozen encoder there.

One of the two modules of the data layer that use torch, when it is called.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.core.progress import progress
from puna.data.quality.heads import Head
from puna.data.semantic.embedder import copy_settings, load_embedder

if TYPE_CHECKING:
    import torch

    from puna.data.quality.settings import TrainConfig
    from puna.data.semantic.encoder import Encoder
    from puna.data.semantic.passages import Passages

_STREAM = 0xF17E


@dataclass(frozen=True)
class TuneSettings:
    """How an encoder is fine-tuned.

    Attributes:
        epochs: Passes at most.
        lr: Peak learning rate of the encoder.
        head_lr: Peak learning rate of the head.
        batch: Passages of a step.
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the learning rate rises.
        evaluations: Looks at the held-out texts per pass.
        patience: Looks without improvement after which training stops.
        device: ``auto``, ``cpu``, ``cuda``, ...
        seed: Of the order and of dropout.
    """

    epochs: int
    lr: float
    head_lr: float
    batch: int
    weight_decay: float
    warmup: float
    evaluations: int
    patience: int
    device: str
    seed: int


def settings_of(cfg: TrainConfig) -> TuneSettings:
    """Return the part of a training's configuration that concerns fine-tuning."""
    return TuneSettings(
        cfg.tune_epochs, cfg.tune_lr, cfg.head_lr, cfg.tune_batch, cfg.weight_decay, cfg.warmup,
        cfg.evaluations, cfg.patience, cfg.device, cfg.seed,
    )  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """What texts an encoder learns from.

    Attributes:
        texts: The texts.
        targets: float64 [n, n_outputs]: shares of labels, or (one column) a number.
        weights: float64 [n].
        n_held: The first so many texts are held out.
    """

    texts: list[str]
    targets: np.ndarray
    weights: np.ndarray
    n_held: int


def finetune(
    folder: Path, out: Path, tuning: Tuning, head: Head, cut: Passages, settings: TuneSettings
) -> tuple[Head, dict[str, Any]]:
    """Fine-tune an encoder and write it to a folder.

    Args:
        folder: The encoder.
        out: New folder of the fine-tuned encoder.
        tuning: Texts and targets. A text of several passages teaches with each of them.
        head: The head over the frozen encoder.
        cut: How texts are cut.
        settings: How.

    Returns:
        The new head, and a record: ``steps``, ``best_step`` (0: the frozen encoder), and the losses
        on the held-out texts.

    Raises:
        PunaError: The folder is no encoder.
    """
    import torch

    loaded = load_embedder(folder, cut, settings.device, n_threads=0)
    encoder: Any = loaded.model
    encoder.model.float()  # steps of fine-tuning are smaller than bfloat16 can hold
    ids, owners = loaded.passages.cut(encoder.tokenizer, tuning.texts, special=True)
    n_of = np.bincount(owners, minlength=len(tuning.texts))
    weights = (tuning.weights / np.maximum(n_of, 1))[owners]
    data = _Data(ids, tuning.targets[owners], weights / weights.mean())
    held, taught = np.flatnonzero(owners < tuning.n_held), np.flatnonzero(owners >= tuning.n_held)
    with _deterministic(settings.seed, encoder.model.device):
        layer = torch.nn.Linear(*reversed(head.weights.shape)).to(encoder.model.device)
        layer.load_state_dict(
            {"weight": torch.from_numpy(head.weights), "bias": torch.from_numpy(head.bias)}
        )
        record = _Tuner(encoder, layer, data, settings).run(taught, held)
    encoder.model.save_pretrained(str(out), safe_serialization=True)
    copy_settings(folder, out)
    found = (one.detach().float().cpu().numpy().copy() for one in (layer.weight, layer.bias))
    return Head(*found), record


@dataclass(frozen=True)
class _Data:
    ids: list[list[int]]
    targets: np.ndarray
    weights: np.ndarray


class _Tuner:
    """One training."""

    def __init__(
        self, encoder: Encoder, layer: torch.nn.Linear, data: _Data, settings: TuneSettings
    ) -> None:
        self.encoder, self.layer, self.data, self.settings = encoder, layer, data, settings
        self.modules = (encoder.model, layer)

    def run(self, taught: np.ndarray, held: np.ndarray) -> dict[str, Any]:
        """Train; leave the modules in the best state."""
        cfg, best_step = self.settings, 0
        n_steps = cfg.epochs * math.ceil(len(taught) / cfg.batch)
        every = max(math.ceil(len(taught) / cfg.batch / cfg.evaluations), 1)
        optimiser, schedule = self._optimiser(n_steps)
        losses, best = [self.loss_on(held)], self._state()
        done = 0
        with progress("classifier: fine-tuning", total=n_steps, unit="steps") as bar:
            for rows in self._orders(taught):
                loss = self._loss(rows, np.float64(len(rows)))
                optimiser.zero_grad()
                loss.backward()
                for module in self.modules:
                    _clip(module)
                optimiser.step()
                schedule.step()
                done += 1
                bar.advance(1)
                if done % every and done < n_steps:
                    continue
                losses.append(self.loss_on(held))
                if losses[-1] < min(losses[:-1]):
                    best, best_step = self._state(), done
                elif done - best_step >= cfg.patience * every:
                    break
        for module, state in zip(self.modules, best, strict=True):
            module.load_state_dict(state)
        return {"steps": done, "best_step": best_step, "held_out_losses": losses}

    def loss_on(self, rows: np.ndarray) -> float:
        """Return the mean loss on passages, without dropout."""
        import torch

        self._mode(training=False)
        total, size = 0.0, 4 * self.settings.batch
        order = rows[np.argsort([len(self.data.ids[k]) for k in rows], kind="stable")]
        weight = float(self.data.weights[rows].sum())
        with torch.inference_mode():
            for start in range(0, len(order), size):
                total += float(self._loss(order[start : start + size], np.float64(weight)))
        self._mode(training=True)
        return total

    def _loss(self, rows: np.ndarray, divisor: np.float64) -> torch.Tensor:
        import torch

        device = self.encoder.model.device
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            states = self.encoder.states([self.data.ids[k] for k in rows])
        vectors = torch.nn.functional.normalize(states.float(), dim=1)
        outputs = self.layer(vectors)
        wanted = torch.from_numpy(self.data.targets[rows]).to(device, torch.float32)
        weights = torch.from_numpy(self.data.weights[rows]).to(device, torch.float32)
        if outputs.shape[1] == 1:
            each = (outputs - wanted).square()[:, 0]
        else:
            each = -(wanted * torch.log_softmax(outputs, 1)).sum(1)
        return (each * weights).sum() / float(divisor)

    def _orders(self, taught: np.ndarray) -> Iterator[np.ndarray]:
        rng = np.random.Generator(np.random.PCG64([_STREAM, self.settings.seed]))
        for _ in range(self.settings.epochs):
            order = rng.permutation(taught)
            for start in range(0, len(order), self.settings.batch):
                yield order[start : start + self.settings.batch]

    def _optimiser(self, n_steps: int) -> tuple[Any, Any]:
        import torch

        cfg = self.settings
        groups = [
            {"params": list(self.encoder.model.parameters()), "lr": cfg.lr},
            {"params": list(self.layer.parameters()), "lr": cfg.head_lr, "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
        rise = max(cfg.warmup * n_steps, 1)
        factor = lambda k: min((k + 1) / rise, max(n_steps - k, 0) / max(n_steps - rise, 1))  # noqa: E731
        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)

    def _mode(self, *, training: bool) -> None:
        for module in self.modules:
            module.train(training)

    def _state(self) -> list[dict[str, torch.Tensor]]:
        return [
            {name: one.detach().cpu().clone() for name, one in module.state_dict().items()}
            for module in self.modules
        ]


def _clip(module: torch.nn.Module) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)


@contextlib.contextmanager
def _deterministic(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch and choose deterministic algorithms; leave all as it was."""
    import torch

    devices = [device] if device.type == "cuda" else []
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        # some operations on a GPU have no deterministic variant: those only warn
        torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn)
