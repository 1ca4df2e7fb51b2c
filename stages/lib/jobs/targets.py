"""The services that a job can be rendered for."""

from collections.abc import Callable
from dataclasses import dataclass

from stages.lib.jobs import aws_batch, docker, gcp_batch, kubernetes, skypilot, slurm
from stages.lib.jobs.order import Order
from stages.lib.run.environment import OPENER
from stages.lib.run.exits import BadData, BadSetting


@dataclass(frozen=True)
class Target:
    """A service: what a spec for it is, and how one is held to be sound.

    Attributes:
        volume: its form of VOLUME, as people read it. form: as `is_volume` takes it.
        several_hosts: its spec can start a training on each of several.
        unused: settings that something else decides there, and what.
    """

    render: Callable[[Order], str]
    broken: Callable[[str], list[str]]
    validate: Callable[[str], str]
    file: str
    volume: str
    is_volume: Callable[[str], object]
    needs_gpu: bool = False
    several_hosts: bool = False
    unused: str | None = None


TARGETS = {
    "docker": Target(
        docker.render, docker.broken, docker.validate, "job.sh",
        "a folder of the machine, from / on", lambda v: v.startswith("/") and ":" not in v,
        unused="the machine's own GPUs are used",
    ),
    "kubernetes": Target(
        kubernetes.render, kubernetes.broken, kubernetes.validate, "job.yaml",
        "the name of a PersistentVolumeClaim", lambda v: "/" not in v and ":" not in v,
    ),
    "skypilot": Target(
        skypilot.render, skypilot.broken, skypilot.validate, "job.yaml",
        "the address of a bucket, as s3://BUCKET/runs", skypilot.BUCKET.fullmatch, needs_gpu=True,
    ),
    "aws-batch": Target(
        aws_batch.render, aws_batch.broken, aws_batch.validate, "job.json",
        "an EFS file system and its access point, as fs-0123abcd:fsap-0123abcd",
        aws_batch.VOLUME.fullmatch, unused="the queue's compute environment decides that",
    ),
    "slurm": Target(
        slurm.render, slurm.broken, slurm.validate, "job.sbatch",
        "a folder that all machines share, from / on",
        lambda v: v.startswith("/") and not set(v) & set(":,"), several_hosts=True,
    ),
    "gcp-batch": Target(
        gcp_batch.render, gcp_batch.broken, gcp_batch.validate, "job.json",
        "a bucket as gs://BUCKET, or an NFS share as SERVER:/PATH",
        gcp_batch.VOLUME.fullmatch, needs_gpu=True,
    ),
}  # fmt: skip


def rendered(target: str, order: Order) -> str:
    """The spec of a job.

    Raises:
        BadSetting: a setting is not what the service takes.
    """
    service = TARGETS[target]
    if not service.is_volume(order.volume):
        raise BadSetting(f"VOLUME={order.volume} is nothing for {target}: give {service.volume}")
    if service.needs_gpu and not order.gpu:
        raise BadSetting(
            f"{target} has to know the kind of GPU; set GPU, as in GPU={_example(target)}"
        )
    if order.hosts > 1 and (order.stage != "train" or not service.several_hosts):
        able = " and ".join(name for name in TARGETS if TARGETS[name].several_hosts)
        raise BadSetting(
            f"NUM_HOSTS={order.hosts} is for --stage train, on {able}: set it to 1, or see docs/scaling.md"
        )
    machines = gcp_batch.MACHINES
    if target == "gcp-batch" and order.gpus not in machines.get(order.gpu or "", {}):
        raise BadSetting(
            f"GPU={order.gpu} with NUM_GPUS={order.gpus} is no machine of Google's that is known here: take "
            f"1, 2, 4 or 8 of {', '.join(machines)}"
        )
    for name, value in order.variables.items():
        if OPENER.search(value):
            raise BadSetting(
                f"{name} holds a password, which everybody who sees the job would read; give an address without"
            )
    spec = service.render(order)
    if wrong := service.broken(spec):
        raise BadSetting(f"that makes no sound job for {target}: {'; '.join(wrong)}")
    return spec


def _example(target: str) -> str:
    return "L4" if target == "skypilot" else "nvidia-l4"


def check(target: str, spec: str, name: str) -> str:
    """Hold a spec against the service's own model and our rules; the name of the model.

    Raises:
        BadData: it breaks one.
    """
    service = TARGETS[target]
    try:
        model = service.validate(spec)
        wrong = service.broken(spec)
    except ValueError as error:
        raise BadData(f"{name} is no spec for {target}: {error}; mend it") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadData(
            f"{name} is no job of ours for {target}: it lacks what every one has ({error!r}); render it anew"
        ) from error
    if wrong:
        raise BadData(f"{name} is no sound job for {target}: {'; '.join(wrong)}")
    return model
