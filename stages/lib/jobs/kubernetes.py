"""A Kubernetes Job; with a queue, one that Kueue admits."""

from typing import Any

from stages.lib.jobs import rules
from stages.lib.jobs.order import (
    ATTEMPTS,
    CACHE,
    CPUS,
    DISK_GB,
    MEMORY_GIB,
    RETRIED,
    RUNS,
    SHARED_MEMORY_GIB,
    Facts,
    Order,
)
from stages.lib.jobs.text import from_yaml, to_yaml
from stages.lib.run import extras, heartbeat

SECRET = "lora-stages"
CONTAINER = "stage"
GPU = "nvidia.com/gpu"
# What has no heartbeat, as it works on no run, or answers a single prompt: a probe would end it.
SILENT = ("doctor", "push", "generate")
# A heartbeat comes every ten seconds. Ten minutes without are more than a slow volume takes, and than
# comes before the first one.
FRESH_MINUTES, PROBE_SECONDS, PROBES = 2, 60, 10
# How clouds mark machines that may be taken away.
SPOT = {
    "cloud.google.com/gke-spot": "true",
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def render(order: Order) -> str:
    """The Job in YAML."""
    labels = {"app.kubernetes.io/name": "lora-stages"}
    if order.queue:
        labels["kueue.x-k8s.io/queue-name"] = order.queue
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": order.name, "labels": labels},
        "spec": {
            **({"suspend": True} if order.queue else {}),
            "backoffLimit": ATTEMPTS,
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _rules()},
            "template": {"metadata": {"labels": labels}, "spec": _pod(order)},
        },
    }
    return to_yaml(job)


def _rules() -> list[dict[str, Any]]:
    moved = {"type": "DisruptionTarget", "status": "True"}
    codes = {"containerName": CONTAINER, "operator": "NotIn", "values": list(RETRIED)}
    return [
        {"action": "Ignore", "onPodConditions": [moved]},
        {"action": "FailJob", "onExitCodes": codes},
    ]


def _pod(order: Order) -> dict[str, Any]:
    tolerated = [GPU, *(SPOT if order.spot else {})]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": order.wait,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 0,
            "fsGroup": 0,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_placed(order),
        "tolerations": [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in tolerated],
        "containers": [_container(order)],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": order.volume}},
            {"name": "cache", "emptyDir": {"sizeLimit": f"{DISK_GB}Gi"}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHARED_MEMORY_GIB}Gi"}},
        ],
    }  # fmt: skip


def _placed(order: Order) -> dict[str, Any]:
    """Which machines it may run on."""
    found: dict[str, Any] = {}
    if order.gpu:
        found["nodeSelector"] = {"nvidia.com/gpu.product": order.gpu}
    if order.spot:
        terms = [
            {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}
            for key, value in SPOT.items()
        ]
        required = {"nodeSelectorTerms": terms}
        found["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}
        }
    return found


def _container(order: Order) -> dict[str, Any]:
    memory, cpus = f"{MEMORY_GIB * order.gpus}Gi", str(CPUS * order.gpus)
    variables = order.environment(shared_cache=True)
    return {
        "name": CONTAINER,
        "image": order.image,
        "args": order.arguments,
        "env": [{"name": n, "value": v.replace("$", "$$")} for n, v in variables.items()],
        "envFrom": [{"secretRef": {"name": order.secret or SECRET, "optional": not order.secret}}],
        "resources": {
            "requests": {"cpu": cpus, "memory": memory},
            "limits": {GPU: order.gpus, "memory": memory},
        },
        **({} if order.stage in SILENT else {"livenessProbe": _probe()}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "runs", "mountPath": RUNS},
            {"name": "cache", "mountPath": CACHE},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _probe() -> dict[str, Any]:
    """Whether the process lives at all; that its work hangs it finds out itself, see STALL_MINUTES."""
    return {
        "exec": {"command": ["sh", "-c", heartbeat.probe(FRESH_MINUTES)]},
        "periodSeconds": PROBE_SECONDS,
        "timeoutSeconds": PROBE_SECONDS // 2,
        "failureThreshold": PROBES,
    }


def broken(text: str) -> list[str]:
    """What is wrong with a Job that Kubernetes' own schema would not tell."""
    job = from_yaml(text)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    moved, codes = spec["podFailurePolicy"]["rules"]
    found = []
    if pod["restartPolicy"] != "Never":
        found.append("restartPolicy is not Never, which podFailurePolicy asks for")
    if spec.get("podReplacementPolicy") != "Failed":
        found.append("podReplacementPolicy is not Failed: two pods could work on one run")
    if moved.get("action") != "Ignore" or "onPodConditions" not in moved:
        found.append(
            "the first rule of podFailurePolicy is not to Ignore a pod that was moved away"
        )
    on = codes.get("onExitCodes", {})
    if (codes.get("action"), on.get("operator")) != ("FailJob", "NotIn"):
        found.append("the second rule of podFailurePolicy is not to FailJob on other exit codes")
    if on.get("containerName", container["name"]) != container["name"]:
        found.append(f"podFailurePolicy is about {on['containerName']!r}, which is no container")
    if spec["backoffLimit"] < 1:
        found.append("backoffLimit 0 allows no second attempt")
    if "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"] and not spec.get("suspend"):
        found.append("with a Kueue queue the Job has to begin with suspend: true")
    probe = container.get("livenessProbe")
    if probe and probe["periodSeconds"] * probe["failureThreshold"] < PROBE_SECONDS * PROBES:
        found.append(
            f"its livenessProbe does not wait {PROBES} minutes for a heartbeat, as a slow volume may take"
        )
    if probe and container["args"][-1] in SILENT:
        found.append(
            f"{container['args'][-1]} has no heartbeat, and its livenessProbe would end it"
        )
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    runs = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == RUNS]
    if not all("persistentVolumeClaim" in volumes[name] for name in runs):
        found.append(f"{RUNS} is no persistentVolumeClaim: it would go with the pod")
    facts = Facts(
        image=container["image"],
        arguments=container["args"],
        variables={entry["name"]: entry.get("value", "") for entry in container["env"]},
        mounts=[mount["mountPath"] for mount in container["volumeMounts"]],
        gpus=int(container["resources"]["limits"].get(GPU, 0)),
        wait=pod["terminationGracePeriodSeconds"],
        retried=on.get("values", []),
    )
    return found + rules.broken(facts)


def validate(text: str) -> str:
    """Hold it against the schemas of Kubernetes; the name of what did.

    Raises:
        ValueError: it is not as they say.
    """
    extras.require("kubernetes_validate", "--check", "kubernetes-validate")
    import kubernetes_validate

    try:
        kubernetes_validate.validate(
            from_yaml(text), kubernetes_validate.latest_version(), strict=True
        )
    except kubernetes_validate.ValidationError as error:
        raise ValueError(str(error.message)) from error
    return f"the schemas of Kubernetes {kubernetes_validate.latest_version()}"
