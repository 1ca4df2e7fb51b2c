"""The resumed run is the uninterrupted run: stopped anywhere, in any way, it ends in the same bytes."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.lib.run import artifact
from stages.lib.run.fields import FIELDS, MEASURED
from tests.forking import Forking

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
        self.cut = cli.folder / "cut"

    def begin(self, name: str) -> Path:
        folder = self.cli.folder / name
        shutil.copytree(self.prepared, folder)
        return folder

    def half(self, name: str) -> Path:
        """A run that was killed in its fourth step; it goes on from the third."""
        folder = self.cli.folder / name
        if not self.cut.exists():
            self.begin(self.cut.name)
            done = self.train(self.cut, FAILPOINTS="train.bin=11:kill", BASE_PRECISION="fp8")
            assert done.returncode == -9, done.stderr
        shutil.copytree(self.cut, folder)
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
    kept = ("best_step", "held_out_loss", "steps", "epochs", "trained_tokens")
    return hashes | {name: metrics[name] for name in kept} | {"history": without_times(metrics)}


def without_times(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A history, but for what no two runs have alike."""
    return [{n: v for n, v in entry.items() if n not in MEASURED} for entry in metrics["history"]]


@pytest.fixture(scope="module")
def runs(few: Forking, tiny: Path) -> Runs:
    return Runs(few, few.folder / "prepared", tiny)


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
    check_curves(folder)


def check_curves(folder: Path) -> None:
    """TensorBoard reads the manifest's history from the event files: each point, and each once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = json.loads((folder / "adapter" / "manifest.json").read_text())
    history = made["metrics"]["history"]
    assert {entry["attempt"] for entry in history} == {
        2,
        4,
        5,
    }  # the third one got nothing verified
    assert [entry["at"] for entry in history] == sorted(entry["at"] for entry in history)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    names = {name: field.tracked for name, field in FIELDS.items() if field.tracked}
    held_out = {entry["step"] for entry in history if "held_out_loss" in entry}
    assert held_out == {2, 3, 5, 6}
    told = {name for entry in history for name in entry} & names.keys()
    assert set(board.Tags()["scalars"]) == {names[name] for name in told}
    for name in told:
        entries = [e for e in history if name in e and (name != "rss_bytes" or "loss" in e)]
        points = board.Scalars(names[name])
        assert [point.step for point in points] == [entry["step"] for entry in entries], name
        for point, entry in zip(points, entries, strict=True):
            assert point.value == pytest.approx(entry[name], rel=1e-6)
            assert point.wall_time == pytest.approx(entry["at"], abs=0.01)


def resumed_from(folder: Path) -> Any:
    return json.loads((folder / "adapter" / "manifest.json").read_text())["metrics"][
        "resumed_from_step"
    ]


# What Trainer ignores without a word, or finds out late; see docs/decisions.md.
OTHER = {
    "T10": {"LEARNING_RATE": "5e-4"}, "T12": {"LORA_TARGETS": "q_proj"}, "E13": {"BASE_PRECISION": "bf16"},
    "P5": {"OPTIMIZER": "adamw_torch"}, "E14": {"BATCH_TOKENS": "96"},
}  # fmt: skip


@pytest.mark.promise("P5")
@pytest.mark.case("E13", "E14")
@pytest.mark.parametrize("case", OTHER)
def test_a_run_is_not_gone_on_with_under_other_settings(runs: Runs, case: str) -> None:
    folder, changed = runs.half(f"other {case}"), OTHER[case]
    before = sorted((folder / "checkpoints").rglob("*"))
    done = runs.train(folder, **{"BASE_PRECISION": "fp8"} | changed)
    assert done.returncode == 78, done.stderr
    was = {"LEARNING_RATE": "0.01", "LORA_TARGETS": "q_proj,v_proj", "BASE_PRECISION": "fp8"}
    ((name, value),) = changed.items()
    now = "0.0005" if name == "LEARNING_RATE" else value
    assert f"{name} was {(RECIPE | was)[name]}, is now {now}" in done.stderr
    assert "Loading" not in done.stderr  # of the base
    assert sorted((folder / "checkpoints").rglob("*")) == before


@pytest.mark.promise("P5")
def test_a_run_is_not_gone_on_with_on_other_rows(runs: Runs) -> None:
    folder = runs.half("other rows")
    env = {
        "DATASET": "rows.jsonl",
        "MAX_LENGTH": "64",
        "BASE_MODEL": str(runs.base),
        "RUN_DIR": str(folder),
    }
    done = runs.cli("prepare-data", env=env | {"MAX_ROWS": "9"})
    assert done.returncode == 0, done.stderr
    done = runs.train(folder, BASE_PRECISION="fp8")
    assert done.returncode == 78
    assert "input data is another" in done.stderr


@pytest.mark.promise("P3")
def test_a_run_whose_steps_are_all_done_takes_no_other(runs: Runs) -> None:
    """Only the adapter is to be made of them: Trainer would take one more step."""
    wanted = runs.whole("fp8")
    folder = runs.cli.folder / "done"
    shutil.copytree(runs.cli.folder / "whole fp8", folder)
    shutil.rmtree(folder / "adapter")
    done = runs.train(folder, BASE_PRECISION="fp8")
    assert done.returncode == 0, done.stderr
    assert left(folder) == wanted
    assert resumed_from(folder) == 6


@pytest.mark.promise("P3")
@pytest.mark.case("E13")
def test_auto_stays_what_it_was_on_another_machine(runs: Runs) -> None:
    """Here it would be bf16; the first machine was one that took fp8, with another torch."""
    folder = runs.half("elsewhere")
    for path in (folder / "checkpoints").glob("*/manifest.json"):
        made = json.loads(path.read_text())
        made["settings"]["BASE_PRECISION"]["value"] = "auto"
        made["versions"]["torch"] = "2.11.0+cu130"
        path.write_text(json.dumps(made))
    done = runs.train(folder, BASE_PRECISION="auto")
    assert done.returncode == 0, done.stderr
    assert resumed_from(folder) == 3
    assert left(folder) == runs.whole("fp8")


class Bomb:
    """What would make a file, were it unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.case("C8")
@pytest.mark.parametrize(
    ("name", "vouched"),
    [
        ("optimizer.pt", False),
        ("optimizer.pt", True),
        ("rng_state.pth", True),
        ("scheduler.pt", True),
    ],
)
def test_what_is_no_plain_data_is_never_run(runs: Runs, name: str, vouched: bool) -> None:
    folder = runs.half(f"bomb {name} {vouched}")
    checkpoint, went_off = folder / "checkpoints" / "step-00000003", folder / "went-off"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(went_off)))
    if vouched:
        path = checkpoint / "manifest.json"
        made = json.loads(path.read_text())
        size = (checkpoint / name).stat().st_size
        made["files"][name] = {"bytes": size, "sha256": artifact.sha256(checkpoint / name)}
        path.write_text(json.dumps(made))
    done = runs.train(folder, BASE_PRECISION="fp8")
    assert not went_off.exists()
    if vouched:
        assert done.returncode == 65, done.stderr
        assert "the checkpoint after step 3 holds more than numbers, and was not run" in done.stderr
        assert not (folder / "adapter").exists()
    else:
        assert done.returncode == 0, done.stderr
        assert "passing over a corrupt checkpoint" in done.stderr
        assert resumed_from(folder) == 2
        assert left(folder) == runs.whole("fp8")


@pytest.mark.promise("P2")
@pytest.mark.case("E10")
def test_a_step_that_hangs_ends_with_75_and_goes_on(runs: Runs) -> None:
    folder = runs.half("hung")
    hung = runs.train(
        folder, BASE_PRECISION="fp8", STALL_MINUTES="0.1", FAILPOINTS="train.bin=7:hang"
    )
    assert hung.returncode == 75, hung.stderr
    assert "in compute_loss" in hung.stderr
    assert "in compute_loss" in (folder / "stacks.txt").read_text()
    assert json.loads((folder / "error.json").read_text())["exit"] == 75
    done = runs.train(folder, BASE_PRECISION="fp8")
    assert done.returncode == 0, done.stderr
    assert left(folder) == runs.whole("fp8")
    assert not (folder / "stacks.txt").exists()


@pytest.mark.case("E7")
def test_the_row_that_has_no_finite_loss_is_named(runs: Runs, tmp_path: Path) -> None:
    """A base with a token whose embedding is no number, and one row that has it."""
    from safetensors.torch import load_file, save_file

    base, ids = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(runs.base, base)
    tokens = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][tokens["Ġzebra"]] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    words = ["yes", "no", "maybe", "zebra", "often", "now"]
    rows = [{"text": f"### Human: {n}?### Assistant: {word}"} for n, word in enumerate(words)]
    ids.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {
        "BASE_MODEL": str(base), "DATASET": str(ids), "MAX_LENGTH": "64", "VALIDATION_FRACTION": "0",
        "RUN_DIR": str(tmp_path / "run"), "BASE_PRECISION": "fp32", "BATCH_TOKENS": "48",
    }  # fmt: skip
    assert runs.cli("prepare-data", env=env).returncode == 0
    done = runs.cli("train", env=env)
    assert done.returncode == 80, done.stderr
    told = json.loads((tmp_path / "run" / "error.json").read_text())
    assert told["message"].startswith("the loss after step")
    assert told["bins"] == [0]
    assert 4 in [row["row"] for row in told["rows"]]
    assert {row["source"] for row in told["rows"]} == {str(ids)}
    assert len(told["rows"]) < 6
