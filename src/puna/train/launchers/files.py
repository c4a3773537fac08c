"""Writing the job files of each launcher."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from puna.core.errors import PunaError
from puna.train.launchers.job import LaunchJob, render

SLURM_FILE, KUBERNETES_FILE, SSH_FILE = "job.sbatch", "jobset.yaml", "run-over-ssh.sh"
_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
_HOST = re.compile(r"([A-Za-z0-9._-]+@)?[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:+@/=-]+")
_NODE_JOB = "node"
_MOUNT = "shared"


def slurm_script(job: LaunchJob, time: str, options: Mapping[str, str] | None = None) -> str:
    """Write a batch script of Slurm: one task per node, which starts its ranks itself.

    Args:
        job: The training.
        time: Limit, ``days-hours:minutes:seconds``.
        options: More of sbatch's options: ``partition``, ``account``.

    Raises:
        PunaError: An option has characters that a line of #SBATCH cannot hold, or the time is none.
    """
    if not _TIME.fullmatch(time):
        raise PunaError(f"--time {time} is no time of Slurm", "write 2-00:00:00 for two days")
    for name, value in (options or {}).items():
        if not _PLAIN.fullmatch(value):
            raise PunaError(
                f"--{name} {value!r} has characters that an #SBATCH line cannot hold",
                "use letters, digits and . _ - , : + @ / =",
            )
    return render("job.sbatch.j2", job=job, time=time, options=options or {}, file=SLURM_FILE)


def ssh_script(job: LaunchJob, hosts: Sequence[str]) -> str:
    """Write a script that starts every node over ssh and waits for all.

    Args:
        job: The training.
        hosts: One per node, the first one leads: ``[user@]host``.

    Raises:
        PunaError: Their number is not that of the nodes, or one is no name of a host.
    """
    if len(hosts) != job.nodes:
        raise PunaError(
            f"{len(hosts)} hosts for launch.nodes = {job.nodes}", "name one host per node"
        )
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise PunaError(f"{host!r} is no name of a host", "write [user@]host")
    if len(set(hosts)) < len(hosts):
        raise PunaError("a host is named twice", "name each host once")
    endpoint = job.endpoint or f"{hosts[0].rpartition('@')[2]}:{job.port}"
    remote = f"cd -- {shlex.quote(str(job.folder))} && exec {job.shell_command}"
    return render(
        "ssh.sh.j2", job=job, hosts=hosts, endpoint=endpoint, remote=remote, file=SSH_FILE
    )


def kubernetes_manifest(job: LaunchJob, image: str, claim: str, mount: str) -> str:
    """Write a JobSet (jobset.x-k8s.io/v1alpha2): one pod per node, on a volume that all share.

    Args:
        job: The training.
        image: Container image with puna.
        claim: Persistent volume claim that many nodes may write to.
        mount: Where it is in the containers.

    Raises:
        PunaError: A value is empty, or the mount is no absolute path.
    """
    for name, value in (("--image", image), ("--volume-claim", claim), ("--mount", mount)):
        if not value.strip():
            raise PunaError(f"{name} is empty", "give a value")
    if not mount.startswith("/"):
        raise PunaError(f"--mount {mount} is no absolute path", "write /shared")
    name = job.label
    # JobSet's own scheme for the first pod: <set>-<job>-<job index>-<pod index>.<set>.
    endpoint = job.endpoint or f"{name}-{_NODE_JOB}-0-0.{name}:{job.port}"
    environment = {"PUNA_RDZV_ENDPOINT": endpoint, **job.environment}
    container: dict[str, Any] = {
        "name": "puna",
        "image": image,
        # Kubernetes would replace $(NAME).
        "command": [text.replace("$(", "$$(") for text in job.arguments],
        "workingDir": str(job.folder),
        # The number of a node is the completion index, which Kubernetes sets.
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "ports": [{"containerPort": job.port}],
        "volumeMounts": [
            {"name": _MOUNT, "mountPath": mount}, {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }  # fmt: skip
    if job.is_gpu:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.per_node}}
    pod = {
        "restartPolicy": "OnFailure",
        "subdomain": name,
        "containers": [container],
        "volumes": [
            {"name": _MOUNT, "persistentVolumeClaim": {"claimName": claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {"maxRestarts": 10},
            "replicatedJobs": [
                {
                    "name": _NODE_JOB,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "parallelism": job.nodes,
                            "completions": job.nodes,
                            "completionMode": "Indexed",
                            "backoffLimit": 10 * job.nodes,
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }
    return yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=10_000)
