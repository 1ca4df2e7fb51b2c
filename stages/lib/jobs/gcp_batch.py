"""A job of Google Cloud Batch, with a bucket or an NFS share as its volume."""

import re
import shlex
from typing import Any

from stages.lib.jobs import rules, text
from stages.lib.jobs.order import (
    ATTEMPTS,
    CACHE,
    DISK_GB,
    FIXED_WAIT,
    RETRIED,
    RUNS,
    SHARED_MEMORY_GIB,
    USER,
    Facts,
    Order,
)
from stages.lib.run import extras

VOLUME = re.compile(r"gs://[^/]+(?:/.+)?|[\w.-]+:/.+")
DISK = f"/mnt/disks{RUNS}"
# Of Batch itself: the machine was taken away, did not report, restarted, or failed. 50005 is its time limit.
MACHINE = (50001, 50002, 50003, 50004, 50006)
# The GPU comes with the machine. By the number of GPUs.
MACHINES = {
    "nvidia-l4": {1: "g2-standard-16", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"},
    "nvidia-tesla-a100": {n: f"a2-highgpu-{n}g" for n in (1, 2, 4, 8)},
    "nvidia-a100-80gb": {n: f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)},
    "nvidia-h100-80gb": {n: f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)},
}  # fmt: skip


def render(order: Order) -> str:
    """The job in JSON."""
    variables: dict[str, Any] = {
        "variables": order.environment(shared_cache=not order.volume.startswith("gs://"))
    }
    if order.secret:
        variables["secretVariables"] = {"HF_TOKEN": order.secret}
    limit = {"maxRunDuration": f"{order.runtime + 60}s"} if order.runtime else {}
    task = {
        "runnables": [{"container": _container(order), "environment": variables}],
        "volumes": [_volume(order.volume)],
        "maxRetryCount": ATTEMPTS,
        "lifecyclePolicies": [
            {"action": "RETRY_TASK", "actionCondition": {"exitCodes": [*RETRIED, *MACHINE]}}
        ],
        **limit,
    }
    job = {
        "taskGroups": [{"taskCount": "1", "taskSpec": task}],
        "allocationPolicy": _machine(order),
        "labels": {"app": "lora-stages", "job": order.name},
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }
    return text.to_json(job)


def _container(order: Order) -> dict[str, Any]:
    options = [
        "--gpus=all", f"--user={USER}", "--read-only", "--tmpfs=/tmp:exec", f"--shm-size={SHARED_MEMORY_GIB}g",
        f"--stop-timeout={order.wait}", f"--volume={CACHE}",
    ]  # fmt: skip
    return {
        "imageUri": order.image,
        "commands": order.arguments,
        "volumes": [f"{DISK}:{RUNS}:rw"],
        "options": shlex.join(options),
    }


def _volume(name: str) -> dict[str, Any]:
    if name.startswith("gs://"):
        uid, _, gid = USER.partition(":")
        options = ["--implicit-dirs", f"--uid={uid}", f"--gid={gid}", "-o=allow_other"]
        return {
            "gcs": {"remotePath": name.removeprefix("gs://")},
            "mountPath": DISK,
            "mountOptions": options,
        }
    server, _, path = name.partition(":")
    return {"nfs": {"server": server, "remotePath": path}, "mountPath": DISK}


def _machine(order: Order) -> dict[str, Any]:
    assert order.gpu
    policy = {
        "machineType": MACHINES[order.gpu][order.gpus],
        "accelerators": [{"type": order.gpu, "count": str(order.gpus)}],
        "provisioningModel": "SPOT" if order.spot else "STANDARD",
        "bootDisk": {"sizeGb": str(DISK_GB)},
    }
    account = {"serviceAccount": {"email": order.role}} if order.role else {}
    return {"instances": [{"installGpuDrivers": True, "policy": policy}], **account}


def broken(spec: str) -> list[str]:
    """What is wrong with a job that the service's own messages would not tell."""
    job = text.from_json(spec)
    ((task,), (instance,)) = (
        [group["taskSpec"] for group in job["taskGroups"]],
        job["allocationPolicy"]["instances"],
    )
    (runnable,) = task["runnables"]
    container, policies = runnable["container"], task["lifecyclePolicies"]
    codes = policies[0]["actionCondition"]["exitCodes"]
    found = []
    if len(policies) != 1 or policies[0]["action"] != "RETRY_TASK":
        found.append("there has to be one lifecycle policy, RETRY_TASK: then all else fails")
    if not 1 <= task["maxRetryCount"] <= 10:
        found.append(f"maxRetryCount is {task['maxRetryCount']}; Batch allows 1 to 10 retries")
    if 50005 in codes:
        found.append("50005 is the end of maxRunDuration, which no retry helps")
    if 50001 not in codes:
        found.append("50001, a spot machine that was taken away, is not retried")
    if not instance.get("installGpuDrivers"):
        found.append("without installGpuDrivers the machine has no driver")
    (accelerator,) = instance["policy"]["accelerators"]
    gpus = int(accelerator["count"])
    known = MACHINES.get(accelerator["type"], {})
    if known and known.get(gpus) != instance["policy"]["machineType"]:
        found.append(
            f"{instance['policy']['machineType']} does not have {gpus} {accelerator['type']}"
        )
    disks = {volume["mountPath"] for volume in task["volumes"]}
    mounts = [volume.split(":") for volume in container["volumes"]]
    lost = [source for source, *_ in mounts if source not in disks]
    found += [f"{source} is mounted into the container and is no volume" for source in lost]
    options = text.words(container["options"])
    facts = Facts(
        image=container["imageUri"],
        arguments=container["commands"],
        variables=runnable["environment"]["variables"],
        mounts=[mount[1] for mount in mounts] + text.after(options, "--volume"),
        gpus=gpus if text.after(options, "--gpus") == ["all"] else 0,
        wait=min(FIXED_WAIT, int((text.after(options, "--stop-timeout") or ["10"])[0])),
        retried=[code for code in codes if code < 256],
    )
    return found + rules.broken(facts)


def validate(spec: str) -> str:
    """Hold it against the messages of the service's client; the name of what did.

    Raises:
        ValueError: it is not as they say.
    """
    extras.require("google.cloud.batch_v1", "--check", "google-cloud-batch")
    from google.cloud import batch_v1
    from google.protobuf import json_format

    try:
        json_format.ParseDict(text.from_json(spec), batch_v1.Job.pb(batch_v1.Job()))
    except json_format.ParseError as error:
        raise ValueError(str(error)) from error
    return f"the messages of google-cloud-batch {batch_v1.__version__}"
