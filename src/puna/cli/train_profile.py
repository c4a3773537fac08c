"""``puna train profile``: where the time of a step goes, down to the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.cli.model_tables import new_console, new_table

if TYPE_CHECKING:
    from puna.model.config import LlamaConfig
    from puna.train.config import PretrainConfig
    from puna.train.spec import SourceSpec

_STAGE = "train.pretrain"


@click.command()
@click.argument("what", metavar="RECIPE|RUN", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--steps", type=click.IntRange(1, 100), default=3, show_default=True,
              help="Steps in the traces; two more come before them.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="Folder for traces and page.  [default: profile-NAME]")  # fmt: skip
@click.option("--random", "is_random", is_flag=True,
              help="Random tokens instead of the run's shards.")  # fmt: skip
@click.option("--document-tokens", type=click.IntRange(2), default=600, show_default=True,
              help="Mean length of a document of --random.")  # fmt: skip
def profile(
    what: Path, overrides: tuple[str, ...], steps: int, out: Path | None, is_random: bool,
    document_tokens: int,
) -> None:  # fmt: skip
    """Profile some steps of a training and draw where their time goes.

    Runs [train.pretrain] of RECIPE, or as the finished RUN had it, for a few steps from random
    weights on all its ranks, in a folder of its own: nothing of the run is touched. Writes a trace
    per rank (opens in Perfetto) and a page. KEY=VALUE overrides a key of the recipe.
    """
    from puna.core.progress import say
    from puna.train.profile import profile_training, random_source
    from puna.ui.profile_page import write_page

    cfg, model, source, name = _open(what, overrides, is_random)
    if source is None:
        source = random_source(cfg, model, document_tokens)
    folder = out or Path(f"profile-{name}")
    found = profile_training(cfg, model, source, folder, steps)
    page = write_page(found, folder, name)
    _print(found)
    say("page ", (str(page), "bold"), f"; traces for ui.perfetto.dev beside it in {folder}")


def _open(
    what: Path, overrides: tuple[str, ...], is_random: bool
) -> tuple[PretrainConfig, LlamaConfig, SourceSpec | None, str]:
    """Return the training, its model, its batches (None: random ones) and a name."""
    from puna.cli.common import load_stages
    from puna.core.errors import PunaError

    load_stages()
    if what.is_dir():
        if overrides:
            raise PunaError(f"{what} is a run, whose configuration is fixed",
                            "give the recipe to override its keys")  # fmt: skip
        return _open_run(what, is_random)
    from puna.core.recipe import load_recipe
    from puna.train.config import PretrainConfig

    recipe = load_recipe(what, overrides)
    configs = recipe.stage_configs()
    cfg = configs[_STAGE][1] if _STAGE in configs else None
    if not isinstance(cfg, PretrainConfig):
        raise PunaError(f"{what} has no [{_STAGE}]", "a profile is made of that section")
    if cfg.init is not None:
        raise PunaError(
            f"{what} goes on from a checkpoint, whose shape is not known before it is read",
            f"profile with {_STAGE}.model, the shape of the checkpoint, instead of init",
        )
    name = recipe.settings.name
    if is_random:
        return cfg, cfg.model.resolve(), None, name
    source, vocab_size = _shards(cfg, recipe.run_dir)
    return cfg, cfg.model.resolve(vocab_size), source, name


def _open_run(
    run_dir: Path, is_random: bool
) -> tuple[PretrainConfig, LlamaConfig, SourceSpec | None, str]:
    from puna.core.artifact import Artifact
    from puna.lm.load import MODEL_DIR
    from puna.model.formats.hf_config import read_hf_config
    from puna.train.config import PretrainConfig
    from puna.train.spec import SourceSpec
    from puna.train.stage import LOADER_FILE

    artifact = Artifact(run_dir / _STAGE)
    cfg = PretrainConfig.model_validate(artifact.config)
    model = read_hf_config(artifact.file(MODEL_DIR))
    source = None
    if not is_random:
        loader = artifact.read_json(LOADER_FILE)
        source = SourceSpec(loader["factory"], loader["kwargs"])
        source.open()
    return cfg, model, source, run_dir.resolve().name


def _shards(cfg: PretrainConfig, run_dir: Path) -> tuple[SourceSpec, int]:
    """Return the batches of a recipe whose tokens are encoded, and their vocabulary."""
    from puna.core.artifact import ARTIFACT_FILE
    from puna.core.errors import PunaError
    from puna.tokens.loader import PackedLoader
    from puna.tokens.shards import is_remote
    from puna.train.spec import SourceSpec

    folders = [run_dir / stage for stage in ("tokens.encode", "tokens.import")]
    done = [str(folder) for folder in folders if (folder / ARTIFACT_FILE).is_file()]
    shards = cfg.shards or (done[0] if done else "")
    if not shards:
        raise PunaError(
            f"{run_dir} has no token shards yet",
            "run the recipe up to tokens.encode, or profile with --random",
        )
    loader = PackedLoader(
        shards, "train", dict(cfg.weights) or None, cfg.seq_len, cfg.global_batch, cfg.seed,
        cache=cfg.cache.open() if is_remote(shards) else None,
    )  # fmt: skip
    return SourceSpec(**loader.spec()), loader.vocab_size


def _print(found: Mapping[str, Any]) -> None:
    from puna.core.units import format_duration

    console = new_console()
    step_s = sum(found["parts"].values())
    parts = new_table(None, "part of a step", "time", "share")
    for name, seconds in found["parts"].items():
        parts.add_row(name, format_duration(seconds), f"{seconds / step_s:.1%}")
    console.print(parts)
    gap = new_table(None, "from the peak to the step", "time", "share")
    for name, seconds in found["gap"]:
        sign = "-" if seconds < 0 else ""
        gap.add_row(name, sign + format_duration(abs(seconds)), f"{seconds / step_s:.1%}")
    console.print(gap)
    kernels = new_table(None, "kernel", "calls", "time", "GFLOP/s", "of the peak")
    for kernel in found["kernels"][:10]:
        rate = kernel["flops"] / max(kernel["seconds"], 1e-12)
        shown = (f"{rate / 1e9:,.0f}", f"{rate / found['peak_flops']:.0%}") if rate else ("", "")
        kernels.add_row(
            kernel["name"][:60], f"{kernel['n_calls']:.1f}", format_duration(kernel["seconds"]),
            *shown,
        )  # fmt: skip
    console.print(kernels)
