"""A task of SkyPilot: any cloud's machine, on which Docker runs the image as it is."""

import re
from dataclasses import replace
from typing import Any

from stages.lib.jobs import docker, rules, text
from stages.lib.jobs.order import CPUS, DISK_GB, FIXED_WAIT, MEMORY_GIB, RETRIED, RUNS, Facts, Order
from stages.lib.run import extras

BUCKET = re.compile(r"(s3|gs|r2|cos|oci|nebius|https)://.+")
SCHEMA = "skypilot.schema.json"  # beside this: of a task in SkyPilot 0.14.1


def render(order: Order) -> str:
    """The task in YAML."""
    variables = order.environment(shared_cache=False)
    command = docker.run(replace(order, secret=None), variables, RUNS)
    task: dict[str, Any] = {
        "name": order.name,
        "resources": {
            "accelerators": {order.gpu: order.gpus},
            "cpus": f"{CPUS * order.gpus}+",
            "memory": f"{MEMORY_GIB * order.gpus}+",
            "disk_size": DISK_GB,
            "use_spot": order.spot,
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(RETRIED)},
        },
        "envs": variables,
        "secrets": {"HF_TOKEN": None},
        "file_mounts": {RUNS: {"source": order.volume, "mode": "MOUNT_CACHED"}},
        "run": f"exec {text.command(command)}\n",
    }
    return text.to_yaml(task)


def broken(spec: str) -> list[str]:
    """What is wrong with a task that SkyPilot's schema would not tell."""
    task = text.from_yaml(spec)
    resources, recovery = task["resources"], task["resources"].get("job_recovery", {})
    facts = docker.facts(task["run"], task["envs"])
    (gpus,) = resources["accelerators"].values()
    found = docker.held("\n".join([*text.exports(task["envs"]), task["run"]]))
    if recovery.get("max_restarts_on_errors"):
        found.append(
            "max_restarts_on_errors is not 0: exit codes that no retry mends would be retried"
        )
    if facts.gpus != gpus:
        found.append(f"accelerators asks for {gpus} GPUs, docker for {facts.gpus}")
    mount = task["file_mounts"].get(RUNS, {})
    if not BUCKET.fullmatch(str(mount.get("source"))):
        found.append(f"{RUNS} is no bucket, so that it would go with the machine")
    if mount.get("mode") != "MOUNT_CACHED":
        found.append(f"{RUNS} is not MOUNT_CACHED: a COPY is never written back, and MOUNT slow")
    if set(task["secrets"]) & set(task["envs"]):
        found.append("a secret is among the envs")
    if any(value is not None for value in task["secrets"].values()):
        found.append("a secret's value stands in the spec; leave it null, and give --secret NAME")
    retried = recovery.get("recover_on_exit_codes", [])
    whole = Facts(
        facts.image, facts.arguments, task["envs"], facts.mounts, facts.gpus,
        min(facts.wait, FIXED_WAIT) if resources.get("use_spot") else facts.wait, retried,
    )  # fmt: skip
    return found + rules.broken(whole)


def validate(spec: str) -> str:
    """Hold it against SkyPilot's own schema of a task; the name of what did.

    Raises:
        ValueError: it is not as that says.
    """
    extras.require("jsonschema", "--check", "jsonschema")
    import json
    from pathlib import Path

    import jsonschema

    schema = json.loads(Path(__file__).with_name(SCHEMA).read_text())
    task = text.from_yaml(spec)
    for part, value in (("task", task), ("resources", task.get("resources", {}))):
        try:
            jsonschema.validate(value, schema[part])
        except jsonschema.ValidationError as error:
            raise ValueError(f"{error.json_path}: {error.message}") from error
    for mount in task.get("file_mounts", {}).values():
        try:
            jsonschema.validate(mount, schema["storage"])
        except jsonschema.ValidationError as error:
            raise ValueError(f"file_mounts: {error.message}") from error
    return f"the schema of SkyPilot {schema['version']}"
