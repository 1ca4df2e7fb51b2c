"""A job as it is asked for, whatever the service, and what a spec turns out to hold."""

import re
from dataclasses import dataclass, field

from stages.lib.run.endings import ENDINGS

CHAIN = ("prepare-data", "train", "evaluate", "merge")
RETRIED = tuple(sorted({row.code for row in ENDINGS if row.retry}))
ATTEMPTS = 10  # the most that AWS Batch and Google Cloud Batch allow
# Where they are in the image. The second is a disk of the machine: scratch, and caches of compiled code.
RUNS, CACHE = "/runs", "/cache"
USER = "10001:0"  # the image's own
# For each GPU. Merging Llama 2 7B takes 15 GB of memory.
CPUS, MEMORY_GIB = 8, 60
SHARED_MEMORY_GIB = 8
DISK_GB = 200
MARGIN = 5  # seconds that a service waits longer than GRACE_SECONDS
FIXED_WAIT = 30  # seconds: of AWS Batch, of Google's and most spot machines, whatever is asked
GUARANTEED = ("RUN_DIR", "SCRATCH_DIR", "GRACE_SECONDS", "EXPECT_GPU", "NUM_GPUS")


@dataclass(frozen=True)
class Order:
    """What is wanted.

    Attributes:
        run: name of its folder on the volume. stage: one, or `chain`.
        variables: settings for the stages. gpu: its kind, as the service names it.
        hosts: how many train together, each with `gpus`. grace, runtime: seconds.
        secret, queue, role: as the service names them.
    """

    preset: str
    run: str
    stage: str
    image: str
    volume: str
    variables: dict[str, str] = field(default_factory=dict)
    gpus: int = 1
    hosts: int = 1
    gpu: str | None = None
    spot: bool = False
    grace: int = 25
    runtime: int | None = None
    secret: str | None = None
    queue: str | None = None
    role: str | None = None

    @property
    def name(self) -> str:
        """Of the job: a DNS label, which every service takes."""
        words = ["lora-stages", self.run, *([] if self.stage == "chain" else [self.stage])]
        return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower())[:63].strip("-")

    @property
    def arguments(self) -> list[str]:
        """What the image's entry point is given."""
        return ["--env-file", f"env/{self.preset}.env", self.stage]

    @property
    def wait(self) -> int:
        """Seconds from the signal until the service kills."""
        return self.grace + MARGIN

    def environment(self, shared_cache: bool) -> dict[str, str]:
        """All variables of the container.

        Args:
            shared_cache: the volume takes the locks and links of the hub's cache, so that the next attempt, on
                another machine, finds the base there; buckets do not.
        """
        ours = {"RUN_DIR": f"{RUNS}/{self.run}", "SCRATCH_DIR": CACHE, "EXPECT_GPU": "1"}
        if shared_cache:
            ours["HF_HOME"] = f"{RUNS}/cache/huggingface"
        ours |= {"NUM_GPUS": str(self.gpus), "GRACE_SECONDS": str(self.grace)}
        if self.runtime:
            ours["MAX_RUNTIME"] = str(self.runtime)
        return self.variables | ours


@dataclass(frozen=True)
class Facts:
    """What a spec says, read back.

    Attributes:
        mounts: where the container finds its volumes. wait: seconds from the signal until it is killed.
        retried: exit codes after which the same job runs again.
    """

    image: str
    arguments: list[str]
    variables: dict[str, str]
    mounts: list[str]
    gpus: int
    wait: int
    retried: list[int]
