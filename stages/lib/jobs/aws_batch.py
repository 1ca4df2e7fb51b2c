"""A job definition of AWS Batch, on machines with GPUs and a volume of EFS."""

import re
from typing import Any

from stages.lib.jobs import rules
from stages.lib.jobs.order import (
    ATTEMPTS,
    CACHE,
    CPUS,
    FIXED_WAIT,
    MEMORY_GIB,
    RETRIED,
    RUNS,
    SHARED_MEMORY_GIB,
    USER,
    Facts,
    Order,
)
from stages.lib.jobs.text import from_json, to_json
from stages.lib.run import extras

VOLUME = re.compile(r"(fs-[0-9a-f]+)(?::(fsap-[0-9a-f]+))?")
TAKEN = {"onStatusReason": "Host EC2*", "action": "RETRY"}  # a spot machine that was taken away


def render(order: Order) -> str:
    """The definition in JSON."""
    retried = [{"onExitCode": str(code), "action": "RETRY"} for code in RETRIED]
    limit = {"timeout": {"attemptDurationSeconds": order.runtime + 60}} if order.runtime else {}
    definition = {
        "jobDefinitionName": order.name,
        "type": "container",
        "platformCapabilities": ["EC2"],
        "containerProperties": _container(order),
        "retryStrategy": {
            "attempts": ATTEMPTS,
            "evaluateOnExit": [TAKEN, *retried, {"onReason": "*", "action": "EXIT"}],
        },
        **limit,
    }
    return to_json(definition)


def _container(order: Order) -> dict[str, Any]:
    system, _, point = order.volume.partition(":")
    volume: dict[str, Any] = {"fileSystemId": system, "transitEncryption": "ENABLED"}
    if point:
        volume["authorizationConfig"] = {"accessPointId": point}
    resources = {
        "GPU": order.gpus,
        "VCPU": CPUS * order.gpus,
        "MEMORY": MEMORY_GIB * 1000 * order.gpus,
    }
    return {
        "image": order.image,
        "command": order.arguments,
        **({"executionRoleArn": order.role} if order.role else {}),
        "resourceRequirements": [{"type": kind, "value": str(n)} for kind, n in resources.items()],
        "environment": [
            {"name": name, "value": value}
            for name, value in order.environment(shared_cache=True).items()
        ],
        **({"secrets": [{"name": "HF_TOKEN", "valueFrom": order.secret}]} if order.secret else {}),
        "user": USER,
        "readonlyRootFilesystem": True,
        "linuxParameters": {
            "sharedMemorySize": SHARED_MEMORY_GIB * 1024,
            "tmpfs": [{"containerPath": "/tmp", "size": 4096, "mountOptions": ["exec"]}],
        },
        "volumes": [
            {"name": "runs", "efsVolumeConfiguration": volume},
            {"name": "cache", "host": {}},
        ],
        "mountPoints": [
            {"sourceVolume": "runs", "containerPath": RUNS},
            {"sourceVolume": "cache", "containerPath": CACHE},
        ],
    }


def broken(spec: str) -> list[str]:
    """What is wrong with a definition that the service's own model would not tell."""
    definition = from_json(spec)
    container, strategy = definition["containerProperties"], definition["retryStrategy"]
    exits = strategy["evaluateOnExit"]
    found = []
    if not 1 <= strategy["attempts"] <= 10:
        found.append(f"{strategy['attempts']} attempts; AWS Batch allows 1 to 10")
    if len(exits) > 5:
        found.append(f"{len(exits)} rules in evaluateOnExit; AWS Batch allows 5")
    if any(rule["action"] not in ("RETRY", "EXIT") for rule in exits):
        found.append("an action in evaluateOnExit is neither RETRY nor EXIT")
    if exits[-1] != {"onReason": "*", "action": "EXIT"}:
        found.append("the last rule is not to EXIT for all else: what no rule names is retried")
    if TAKEN not in exits:
        found.append("no rule retries a spot machine that was taken away (Host EC2*)")
    if container.get("secrets") and not container.get("executionRoleArn"):
        found.append("a secret needs executionRoleArn; set ROLE")
    if definition.get("platformCapabilities") != ["EC2"]:
        found.append("GPUs are on EC2 alone")
    sources = {volume["name"]: volume for volume in container["volumes"]}
    points = {
        m["containerPath"]: sources.get(m["sourceVolume"], {}) for m in container["mountPoints"]
    }
    if "efsVolumeConfiguration" not in points.get(RUNS, {}):
        found.append(f"{RUNS} is no file system of EFS: it would go with the machine")
    facts = Facts(
        image=container["image"],
        arguments=container["command"],
        variables={entry["name"]: entry["value"] for entry in container["environment"]},
        mounts=list(points),
        gpus=int(_required(container, "GPU")),
        wait=FIXED_WAIT,
        retried=[
            int(rule["onExitCode"])
            for rule in exits
            if rule["action"] == "RETRY" and rule.get("onExitCode", "").isdigit()
        ],
    )
    return found + rules.broken(facts)


def _required(container: dict[str, Any], kind: str) -> str:
    return next((r["value"] for r in container["resourceRequirements"] if r["type"] == kind), "0")


def validate(spec: str) -> str:
    """Hold it against the model of the service in botocore; the name of what did.

    Raises:
        ValueError: it is not as that says.
    """
    extras.require("botocore", "--check", "botocore")
    import botocore
    from botocore.session import Session
    from botocore.validate import ParamValidator

    shape = (
        Session().get_service_model("batch").operation_model("RegisterJobDefinition").input_shape
    )
    report = ParamValidator().validate(from_json(spec), shape)
    if report.has_errors():
        raise ValueError(" ".join(report.generate_report().split()))
    return f"the model of AWS Batch in botocore {botocore.__version__}"
