"""Job files: what a shell makes of them, what the schemas say, and paths with spaces."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from puna.cli.main import cli
from puna.core.errors import PunaError
from puna.train.config import TrainingConfig
from puna.train.launch_config import LaunchConfig
from puna.train.launchers import check, files
from puna.train.launchers.job import LaunchJob

AWKWARD = 'it\'s a "test" $HOME `x` $(y) ; & * [z] # !'


def job(nodes: int = 2, name: str = "run", device: str = "cuda", **values) -> LaunchJob:
    cfg = TrainingConfig(
        steps=1, nproc=4 * nodes, global_batch=4 * nodes, device=device,  # type: ignore[arg-type]
        launch=LaunchConfig(nodes=nodes, **values),
    )  # fmt: skip
    return LaunchJob.of(
        name, cfg, Path(f"recipes/{AWKWARD}.toml"), (f"name={AWKWARD}", "train.pretrain.steps=3"),
        Path("/data/my runs"), ("/opt/my env/bin/puna",),
    )  # fmt: skip


def fake(folder: Path, name: str, script: str) -> None:
    """Put a command into a folder of commands."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def run(script: str, folder: Path, **environment: str) -> str:
    """Run a script with only the commands of a folder before the usual ones."""
    result = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=20, check=False,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def started(tmp_path: Path, script_of) -> list[str]:
    """Run what a job file starts; return the arguments that puna got, and its environment."""
    work = tmp_path / "my runs"
    work.mkdir()
    puna = tmp_path / "my env" / "puna"
    puna.parent.mkdir()
    shown = 'printf "%s\\n" "$PWD" "$PUNA_NODE_RANK" "$PUNA_RDZV_ENDPOINT" "$@"'
    fake(puna.parent, "puna", shown)
    cfg = TrainingConfig(steps=1, nproc=2, global_batch=2, launch=LaunchConfig(nodes=2))
    one = LaunchJob.of(
        "run", cfg, Path(f"{AWKWARD}.toml"), (f"name={AWKWARD}",), work, (str(puna),)
    )
    return script_of(one).splitlines()


def test_slurm_script_has_the_job(tmp_path):
    script = files.slurm_script(job(nodes=3), "1-00:00:00", {"partition": "gpu"})
    check.check_slurm(script, job(nodes=3))
    options = check.sbatch_options(script)
    assert options["nodes"] == "3"
    assert options["gpus-per-node"] == "4"
    assert options["ntasks-per-node"] == "1"
    assert options["partition"] == "gpu"
    assert "gpus-per-node" not in check.sbatch_options(
        files.slurm_script(job(device="cpu"), "1:00", {})
    )


def test_slurm_script_starts_puna_with_the_very_arguments(tmp_path):
    def script_of(one: LaunchJob) -> str:
        # More names than a pipe holds: a reader that leaves early would end the job.
        fake(tmp_path, "scontrol", "for ((i = 1; i < 20000; i++)); do echo n$i; done")
        # As srun does: the command of the task, without its own options.
        fake(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=1 exec "$@"')
        script = files.slurm_script(one, "1:00:00")
        check.check_slurm(script, one)
        return run(script, tmp_path, SLURM_JOB_NODELIST="n[1-2]")

    assert started(tmp_path, script_of) == [
        str(tmp_path / "my runs"), "1", "n1:29500", "run", f"{AWKWARD}.toml", f"name={AWKWARD}",
    ]  # fmt: skip


def test_ssh_script_starts_every_node(tmp_path):
    def script_of(one: LaunchJob) -> str:
        # As ssh does: the last argument goes through a shell elsewhere.
        fake(tmp_path, "ssh", 'exec bash -c "${@: -1}"')
        script = files.ssh_script(one, ["a", "me@b"])
        check.check_shell(script)
        return run(script, tmp_path)

    lines = started(tmp_path, script_of)
    for node in ("0", "1"):
        start = f"[node {node}] "
        assert [line.removeprefix(start) for line in lines if line.startswith(start)] == [
            str(tmp_path / "my runs"), node, "a:29500", "run", f"{AWKWARD}.toml",
            f"name={AWKWARD}",
        ]  # fmt: skip


def test_ssh_script_fails_when_a_node_fails(tmp_path):
    fake(tmp_path, "ssh", 'case "$*" in *RANK=1*) exit 3;; esac')
    script = files.ssh_script(job(), ["a", "b"])
    with pytest.raises(AssertionError):
        run(script, tmp_path)


@pytest.mark.parametrize(
    ("hosts", "words"),
    [(["a"], "1 hosts"), (["a", "b c"], "'b c'"), (["a", "-oX"], "'-oX'"), (["a", "a"], "twice")],
)
def test_ssh_refuses_hosts(hosts, words):
    with pytest.raises(PunaError, match=words):
        files.ssh_script(job(), hosts)


def test_manifest_has_the_job():
    text = files.kubernetes_manifest(job(nodes=5, name="Llama_3 8B!"), "i:1", "data", "/shared")
    check.check_kubernetes(text, job(nodes=5))
    found = yaml.safe_load(text)
    assert found["metadata"]["name"] == "llama-3-8b"
    (replicated,) = found["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (5, 5)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    environment = {item["name"]: item["value"] for item in container["env"]}
    assert environment["PUNA_RDZV_ENDPOINT"] == "llama-3-8b-node-0-0.llama-3-8b:29500"
    assert container["command"][:2] == ["/opt/my env/bin/puna", "run"]
    assert container["command"][3] == f"name={AWKWARD}".replace("$(", "$$(")


@pytest.mark.parametrize("name", ["3B", "---", "Ä", "x" * 100, "a.b_c-"])
def test_every_name_becomes_a_label(name):
    text = files.kubernetes_manifest(job(nodes=1000, name=name), "i", "c", "/s")
    check.check_kubernetes(text, job(nodes=1000, name=name))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("parallelism: 2", "parallelism: 3", "parallelism"),
        ("completions: 2", "completions: '2'", "completions"),
        ("replicas: 1", "replicas: true", "replicas"),
        ("completionMode: Indexed", "completionMode: NonIndexed", "completionMode"),
        ("name: run\n", "name: Run\n", "DNS label"),
        ("kind: JobSet", "kind: Job", "kind"),
        ("  network:", "  networks:", "networks"),
        ("image: i", "image: [", "no YAML"),
    ],
)
def test_a_wrong_manifest_is_found(before, after, words):
    text = files.kubernetes_manifest(job(), "i", "c", "/s")
    assert before in text
    with pytest.raises(PunaError, match=words):
        check.check_kubernetes(text.replace(before, after), job())


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("#SBATCH --nodes=2", "#SBATCH --nodes=3", "nodes"),
        ("#SBATCH --nodes=2", "#SBATCH nodes 2", "would not take"),
        ("cd --", "cd --\n#SBATCH --quiet\ncd --", "would not take"),
        ("srun", "if srun", "bash cannot read"),
    ],
)
def test_a_wrong_script_is_found(before, after, words):
    script = files.slurm_script(job(), "1:00:00")
    assert before in script
    with pytest.raises(PunaError, match=words):
        check.check_slurm(script.replace(before, after, 1), job())


@pytest.mark.parametrize(
    "call",
    [
        lambda: files.slurm_script(job(), "tomorrow"),
        lambda: files.slurm_script(job(), "1:00", {"partition": "a b"}),
        lambda: files.slurm_script(job(), "1:00", {"account": "a\n#SBATCH --x"}),
        lambda: files.kubernetes_manifest(job(), "", "c", "/s"),
        lambda: files.kubernetes_manifest(job(), "i", "c", "s"),
        lambda: LaunchJob.of(
            "run", TrainingConfig(steps=1), Path("a\nb.toml"), (), Path("/"), ("puna",)
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused(call):
    with pytest.raises(PunaError):
        call()


RECIPE = Path(__file__).resolve().parents[2] / "recipes/llama3-8b.toml"


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (["--slurm"], "job.sbatch"),
        (["--kubernetes", "--image", "i:1", "--volume-claim", "c"], "jobset.yaml"),
        (["--ssh", "a,b", "train.pretrain.launch.nodes=2"], "run-over-ssh.sh"),
    ],
)
def test_command_writes_a_file(tmp_path, options, file):
    out = tmp_path / "my jobs"
    result = CliRunner().invoke(cli, ["launch", str(RECIPE), *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert [path.name for path in out.iterdir()] == [file]
    assert f"{out / file}'" in result.output


@pytest.mark.parametrize("options", [[], ["--slurm", "--kubernetes"], ["--ssh", "a,b"]])
def test_command_refuses(tmp_path, options):
    result = CliRunner().invoke(cli, ["launch", str(RECIPE), *options, "--out", str(tmp_path)])
    assert isinstance(result.exception, PunaError)
    assert not list(tmp_path.iterdir())


def test_run_on_another_node_waits_for_node_0(tmp_path, monkeypatch):
    monkeypatch.setenv("PUNA_NODE_RANK", "1")
    arguments = [f"runs_dir={tmp_path}", "train.pretrain.launch={nodes=2, wait_s=0.2}"]
    result = CliRunner().invoke(cli, ["run", str(RECIPE), *arguments])
    assert isinstance(result.exception, PunaError)
    assert "node 0 has shown no sign of life" in str(result.exception)
