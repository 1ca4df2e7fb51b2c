"""Where a training's curves go: TRACKER, what it needs, and what it is told of the run.

What is wrong with it is said before anything slow; `stages.lib.model.trackers` does the rest.
"""

import hashlib
import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib.run import environment, extras, notes
from stages.lib.run.exits import NoPermission
from stages.lib.run.rundir import Run

KINDS = ("tensorboard", "wandb", "mlflow", "trackio", "none")
PACKAGES = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
PROJECT = "lora-stages"
NOTE = "tracker.json"
PLACES = (
    "WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_PROJECT",
)  # fmt: skip
OFFLINE = ("offline", "disabled", "dryrun")


def check(kind: str) -> None:
    """Whether this tracker can be used here, as far as can be told without it.

    Raises:
        CannotRun: its package is not installed. NoPermission: it needs a key.
    """
    if kind != "none":
        extras.require(PACKAGES[kind], f"TRACKER={kind}", extra="trackers")
    online = environment.given("WANDB_MODE") not in OFFLINE
    if kind == "wandb" and online and not environment.knows_wandb():
        raise NoPermission(
            "TRACKER=wandb needs a key: set WANDB_API_KEY in the environment or env/secrets.env, or "
            "WANDB_MODE=offline to send the curves later"
        )


@dataclass
class Curves:
    """The curves of a run in a tracker: what they are called there, and how far they are.

    Attributes:
        kind: of `KINDS`. run_id: by which a tracker knows them, which goes on from one attempt to the next.
        step: the last that was handed to the tracker; what comes again after a resume is left out.
        begins: the step behind which this attempt goes on. settings: by name, without secrets.
    """

    kind: str
    folder: Path
    run_id: str
    settings: dict[str, Any]
    begins: int = 0
    attempt: int = 0
    step: float = 0
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """Where the tracker may keep files."""
        return self.folder / self.kind

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.folder.resolve().name}-{self.run_id[:8]}"

    def keep(self, step: float, run_id: str | None = None) -> None:
        """Remember how far they are.

        Raises:
            OSError: that cannot be written.
        """
        self.step, self.run_id = step, run_id or self.run_id
        notes.write(self.folder / NOTE, self.note | {"run": self.run_id, "step": self.step})


def curves(run: Run, kind: str, resumed: int | None) -> Curves:
    """Those of a run; they go on where it is the same run in the same place.

    Args:
        resumed: the step that it goes on from, if it does.
    """
    settings = {name: entry["value"] for name, entry in run.settings.items()}
    places = [environment.given(name) for name in PLACES]
    told = json.dumps([settings, places], sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    made = {"tracker": kind, "settings": digest}
    known = notes.read(run.folder / NOTE) or {}
    same = known.keys() >= {"run", "step"} and made.items() <= known.items()
    if not same or (run.force and resumed is None):
        known = {"run": uuid.uuid4().hex, "step": 0}
    return Curves(
        kind, run.folder, str(known["run"]), settings, resumed or 0, run.attempt.number,
        float(known["step"]), made,
    )  # fmt: skip
