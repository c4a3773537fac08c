"""Looking at job files before anyone submits them: what a cluster would refuse, or start wrongly.

Raises a :class:`PunaError` that names what is wrong. What is checked is what can be without a
cluster: that a shell reads the script, that a manifest has the fields of its schema and that
numbers agree with the job.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from puna.core.errors import PunaError
from puna.train.launchers.job import LaunchJob

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_LABEL_LENGTH = 63
_OPTION = re.compile(r"#SBATCH --([a-z][a-z-]*)(?:=(\S+))?")
_FIX = "this is a fault of puna, please report it with the job file"


def check_shell(script: str) -> None:
    """Let bash read a script without running it.

    Raises:
        PunaError: It is no valid script.
    """
    bash = shutil.which("bash")
    if bash is None:
        return
    result = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PunaError(f"bash cannot read the script: {result.stderr.strip()}", _FIX)


def sbatch_options(script: str) -> dict[str, str]:
    """Return the options of a batch script's #SBATCH lines.

    Raises:
        PunaError: A line is malformed, repeated, or stands after a command, where Slurm no longer
            reads it.
    """
    found: dict[str, str] = {}
    is_over = False
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            match = _OPTION.fullmatch(line)
            if match is None or is_over or match[1] in found:
                raise PunaError(f"Slurm would not take the line {line!r}", _FIX)
            found[match[1]] = match[2] or ""
        elif line.strip() and not line.startswith("#"):
            is_over = True
    return found


def check_slurm(script: str, job: LaunchJob) -> None:
    """Check a batch script of Slurm.

    Raises:
        PunaError: See :func:`check_shell` and :func:`sbatch_options`; or the numbers do not agree.
    """
    if not script.startswith("#!/"):
        raise PunaError("the script does not begin with #!", _FIX)
    check_shell(script)
    options = sbatch_options(script)
    wanted = {"nodes": str(job.nodes), "ntasks-per-node": "1"}
    if job.is_gpu:
        wanted["gpus-per-node"] = str(job.per_node)
    _agree(options, wanted.items())


def check_kubernetes(manifest: str, job: LaunchJob) -> None:
    """Check a manifest against the schema of JobSet, as far as it is used.

    Raises:
        PunaError: It is no YAML, a field is missing or of the wrong type, a name is no DNS label,
            or the numbers do not agree with the job.
    """
    try:
        found = yaml.safe_load(manifest)
    except yaml.YAMLError as error:
        raise PunaError(f"the manifest is no YAML: {error}", _FIX) from error
    _match(found, _SCHEMA, "")
    name, (replicated,) = found["metadata"]["name"], found["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    # The longest name is a pod's: <set>-<job>-<job index>-<pod index>-<five characters>.
    longest = f"{name}-{replicated['name']}-{replicated['replicas'] - 1}-{job.nodes - 1}-xxxxx"
    labels = (name, longest, replicated["name"], pod["subdomain"], pod["containers"][0]["name"],
              *(volume["name"] for volume in pod["volumes"]))  # fmt: skip
    for label in labels:
        if not _LABEL.fullmatch(label) or len(label) > _LABEL_LENGTH:
            raise PunaError(f"{label!r} is no DNS label", "choose another `name` of the run")
    _agree(
        {**spec, "replicas": replicated["replicas"], "subdomain": pod["subdomain"]},
        {"parallelism": job.nodes, "completions": job.nodes, "completionMode": "Indexed",
         "replicas": 1, "subdomain": found["spec"]["network"]["subdomain"]}.items(),
    )  # fmt: skip
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    if mounts != {volume["name"] for volume in pod["volumes"]}:
        raise PunaError("mounts and volumes of the manifest differ", _FIX)


def _agree(got: Mapping[str, Any], wanted: Iterable[tuple[str, Any]]) -> None:
    for name, value in wanted:
        if got.get(name) != value:
            raise PunaError(f"{name} is {got.get(name)!r} and must be {value!r}", _FIX)


_POD: dict[str, Any] = {
    "restartPolicy": str,
    "subdomain": str,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "workingDir": str,
            "env": [{"name": str, "value": str}],
            "ports": [{"containerPort": int}],
            "volumeMounts": [{"name": str, "mountPath": str}],
            "resources?": {"limits": {"nvidia.com/gpu": int}},
        }
    ],
    "volumes": [
        {"name": str, "persistentVolumeClaim?": {"claimName": str}, "emptyDir?": {"medium": str}}
    ],
}
_SCHEMA: dict[str, Any] = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "successPolicy": {"operator": str},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": str,
                        "backoffLimit": int,
                        "template": {"spec": _POD},
                    }
                },
            }
        ],
    },
}
"""The fields of JobSet, Job and Pod that a manifest has; a question mark: it may be absent."""


def _match(value: Any, schema: Any, path: str) -> None:
    if isinstance(schema, dict):
        _is(isinstance(value, dict), path, "a mapping")
        names = {name.rstrip("?") for name in schema}
        for unknown in set(value) - names:
            raise PunaError(f"the manifest has an unknown field {path}.{unknown}", _FIX)
        for name, inner in schema.items():
            key = name.rstrip("?")
            if key in value:
                _match(value[key], inner, f"{path}.{key}")
            else:
                _is(name.endswith("?"), f"{path}.{key}", "there")
    elif isinstance(schema, list):
        _is(isinstance(value, list) and bool(value), path, "a list with something in it")
        for number, item in enumerate(value):
            _match(item, schema[0], f"{path}[{number}]")
    elif isinstance(schema, type):
        is_type = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
        _is(is_type, path, f"of type {schema.__name__}")
    else:
        _is(value == schema, path, repr(schema))


def _is(condition: bool, path: str, what: str) -> None:
    if not condition:
        raise PunaError(f"{path.lstrip('.') or 'the manifest'} is not {what}", _FIX)
