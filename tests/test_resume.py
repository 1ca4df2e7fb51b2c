"""The resumed run is the uninterrupted run: stopped anywhere, in any way, it ends in the same bytes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forking import Forking, forking

# Packed, with dropout and the 8-bit optimizer: three bins a step, two steps an epoch, three epochs.
RECIPE = {
    "BASE_PRECISION": "nf4", "LORA_RANK": "16", "LORA_DROPOUT": "0.1", "LEARNING_RATE": "1e-2",
    "OPTIMIZER": "adamw_8bit", "MICRO_BATCH_TOKENS": "48", "BATCH_TOKENS": "144", "EPOCHS": "3",
}  # fmt: skip
# Where it is stopped, and the step from which it then goes on when it is killed, and when it is asked to stop.
# Steps 2, 3, 5 and 6 are evaluated and saved.
POINTS = {
    "before the first step": ("train.bin=1", None, None),
    "in the middle of an accumulation": ("train.bin=11", 3, 3),
    "between two steps of an epoch": ("train.step=3", 2, 2),
    "at the end of an epoch": ("train.step=4", 3, 4),
    "behind an epoch's end": ("train.bin=13", 3, 4),
    "in an evaluation": ("train.evaluate=3", 3, 3),
    "in the last step": ("train.bin=18", 5, 5),
    "behind the last step": ("train.step=6", 5, 5),
    "behind the last checkpoint": ("checkpoint.saved=4", 6, 6),
}
# What `make test` has time for; the others are left to `make test-faults`.
QUICK = {
    ("in the middle of an accumulation", "kill", "nf4"), ("at the end of an epoch", "term", "nf4"),
    ("in an evaluation", "kill", "nf4"), ("behind the last checkpoint", "term", "fp8"),
}  # fmt: skip
ADAPTER = ("adapter_model.safetensors", "last/adapter_model.safetensors")
CODES = {"kill": -9, "term": 75}


class Runs:
    """Runs of one recipe, each in a folder of its own."""

    def __init__(self, cli: Forking, prepared: Path, base: Path) -> None:
        self.cli, self.prepared, self.base = cli, prepared, base
        self.known: dict[str, dict[str, Any]] = {}

    def begin(self, name: str) -> Path:
        folder = self.cli.folder / name
        shutil.copytree(self.prepared, folder)
        return folder

    def train(self, folder: Path, **changed: str) -> Any:
        env = RECIPE | {"BASE_MODEL": str(self.base), "RUN_DIR": str(folder)} | changed
        return self.cli("train", env=env)

    def whole(self, precision: str) -> dict[str, Any]:
        """What an uninterrupted run leaves."""
        if precision not in self.known:
            folder = self.begin(f"whole {precision}")
            done = self.train(folder, BASE_PRECISION=precision)
            assert done.returncode == 0, done.stderr
            self.known[precision] = left(folder)
        return self.known[precision]


def left(folder: Path) -> dict[str, Any]:
    """The bytes of a run's adapters, and its losses."""
    made = json.loads((folder / "adapter" / "manifest.json").read_text())
    hashes = {name: made["files"][name]["sha256"] for name in ADAPTER}
    metrics = made["metrics"]
    kept = ("history", "best_step", "held_out_loss", "steps", "epochs", "trained_tokens")
    return hashes | {name: metrics[name] for name in kept}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("resume")
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(22):
            text = f"### Human: {'And ' * (n % 5)}{n}?### Assistant:{' yes' * (n % 3 + 1)}"
            file.write(json.dumps({"text": text}) + "\n")
    with forking(folder) as cli:
        data = {"DATASET": "rows.jsonl", "MAX_LENGTH": "64", "VALIDATION_FRACTION": "0.1"}
        done = cli("prepare-data", env=data | {"BASE_MODEL": str(tiny), "RUN_DIR": "prepared"})
        assert done.returncode == 0, done.stderr
        yield Runs(cli, folder / "prepared", tiny)


def cases() -> Iterator[Any]:
    for point in POINTS:
        for kind in CODES:
            for precision in ("nf4", "fp8", "bf16", "fp32"):
                case = (point, kind, precision)
                yield pytest.param(*case, marks=() if case in QUICK else pytest.mark.sweep)


@pytest.mark.promise("P2", "P3")
@pytest.mark.case("G4", "G5")
@pytest.mark.parametrize(("point", "kind", "precision"), cases())
def test_stopped_anywhere_it_ends_in_the_same_bytes(
    runs: Runs, tmp_path: Path, point: str, kind: str, precision: str
) -> None:
    where, killed, asked = POINTS[point]
    step = asked if kind == "term" else killed
    folder = runs.begin(f"{point} {kind} {precision}")
    cut = runs.train(folder, BASE_PRECISION=precision, FAILPOINTS=f"{where}:{kind}")
    assert cut.returncode == CODES[kind], cut.stderr
    done = runs.train(folder, BASE_PRECISION=precision)
    assert done.returncode == 0, done.stderr
    assert ("going on from step" in done.stderr) == (step is not None)
    assert resumed_from(folder) == step
    assert left(folder) == runs.whole(precision)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept[-2:] == ["step-00000005", "step-00000006"]
    assert len(kept) <= 3


@pytest.mark.promise("P2", "P3")
def test_stopped_twice_it_ends_in_the_same_bytes(runs: Runs) -> None:
    """The second time in the step that was begun again, and then by a signal."""
    folder = runs.begin("twice")
    for points, code in (
        ("train.bin=8:kill", -9),
        ("train.bin=2:kill", -9),
        ("train.bin=5:term", 75),
    ):
        cut = runs.train(folder, BASE_PRECISION="fp8", FAILPOINTS=points)
        assert cut.returncode == code, cut.stderr
    done = runs.train(folder, BASE_PRECISION="fp8")
    assert done.returncode == 0, done.stderr
    assert resumed_from(folder) == 3
    assert left(folder) == runs.whole("fp8")


def resumed_from(folder: Path) -> Any:
    return json.loads((folder / "adapter" / "manifest.json").read_text())["metrics"][
        "resumed_from_step"
    ]
