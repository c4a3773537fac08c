"""``puna launch``: the files that start a training on many nodes."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from puna.train.launchers.job import LaunchJob


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--slurm", is_flag=True, help="Write a batch script for sbatch.")
@click.option("--kubernetes", is_flag=True, help="Write a JobSet manifest for kubectl.")
@click.option("--ssh", metavar="HOSTS", help="Write a script that starts HOSTS (a,b,c) over ssh.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Folder for the file.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(path_type=Path),
    help="Where the nodes start puna; relative paths of the recipe start here. Default: here.",
)  # fmt: skip
@click.option("--puna", "puna_command", default="puna", show_default=True, metavar="COMMAND",
              help="What starts puna on a node, quoted as for a shell.")  # fmt: skip
@click.option("--time", default="2-00:00:00", show_default=True, help="Slurm: limit of the job.")
@click.option("--partition", help="Slurm: where to queue.")
@click.option("--account", help="Slurm: whom to charge.")
@click.option("--image", default="", help="Kubernetes: container image with puna.")
@click.option("--volume-claim", default="", help="Kubernetes: claim that many nodes may write to.")
@click.option("--mount", default="/shared", show_default=True, help="Kubernetes: where it is seen.")
def launch(
    recipe: Path, overrides: tuple[str, ...], slurm: bool, kubernetes: bool, ssh: str | None,
    out: Path, folder: Path | None, puna_command: str, time: str, partition: str | None,
    account: str | None, image: str, volume_claim: str, mount: str,
) -> None:  # fmt: skip
    """Write the job file that runs RECIPE on as many nodes as its `launch.nodes` says, checked.

    Nothing is submitted. Every node runs `puna run RECIPE` with the same KEY=VALUE arguments.
    """
    from puna.cli.common import load_stages
    from puna.core.errors import PunaError
    from puna.core.fsio import write_text
    from puna.train.launchers import check, files

    if sum((slurm, kubernetes, ssh is not None)) != 1:
        raise PunaError(
            "puna launch needs one of --slurm, --kubernetes and --ssh HOSTS", "name one of them"
        )
    load_stages()
    job = _job(recipe, overrides, folder, puna_command)
    if slurm:
        options = {"partition": partition, "account": account}
        text = files.slurm_script(job, time, {k: v for k, v in options.items() if v})
        check.check_slurm(text, job)
        path, command = out / files.SLURM_FILE, ["sbatch"]
    elif kubernetes:
        text = files.kubernetes_manifest(job, image, volume_claim, mount)
        check.check_kubernetes(text, job)
        path, command = out / files.KUBERNETES_FILE, ["kubectl", "apply", "-f"]
    else:
        text = files.ssh_script(job, [host.strip() for host in (ssh or "").split(",")])
        check.check_shell(text)
        path, command = out / files.SSH_FILE, ["bash"]
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    click.echo(f"{job.nodes} nodes of {job.per_node} ranks; start them with:")
    click.echo(f"  {shlex.join([*command, str(path)])}")


def _job(
    recipe: Path, overrides: tuple[str, ...], folder: Path | None, puna_command: str
) -> LaunchJob:
    from puna.core.errors import PunaError
    from puna.core.recipe import load_recipe
    from puna.train.config import TrainingConfig
    from puna.train.launchers.job import LaunchJob

    loaded = load_recipe(recipe, overrides)
    trainings = [
        config
        for _, config in loaded.stage_configs().values()
        if isinstance(config, TrainingConfig)
    ]
    if not trainings:
        raise PunaError(f"{recipe} trains nothing", "add a section [train.pretrain]")
    widest = max(trainings, key=lambda config: config.launch.nodes)
    try:
        command = tuple(shlex.split(puna_command))
    except ValueError as error:
        raise PunaError(f"--puna {puna_command!r}: {error}", "quote it as for a shell") from error
    start = Path(os.path.abspath(folder or "."))
    there = recipe if recipe.is_absolute() else Path(os.path.abspath(recipe))
    # Below the folder by its place in it: the nodes may see the folder elsewhere.
    there = there.relative_to(start) if there.is_relative_to(start) else there
    return LaunchJob.of(
        loaded.settings.name, widest, there, overrides, start, command or ("puna",)
    )  # fmt: skip
