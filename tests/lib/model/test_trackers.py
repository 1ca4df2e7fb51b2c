"""Curves reach their tracker whole, once, under one set of names; and no tracker can harm a training."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.integration_utils import rewrite_logs

from stages.lib.model import trackers
from stages.lib.model.trackers import Tracker
from stages.lib.run import tracking
from stages.lib.run.exits import CannotRun, NoPermission
from stages.lib.run.fields import FIELDS
from stages.lib.run.tracking import Curves

SETTINGS = {"LEARNING_RATE": 2e-4, "DATASET": "sample"}


def entry(step: int, **more: Any) -> dict[str, Any]:
    return {
        "loss": 3.0 / step, "learning_rate": 1e-4, "grad_norm": 0.5, "at": 1.8e9 + step, "attempt": 2,
        "tokens_per_second": 1000.0 + step, "ceiling_share": 0.5, "gpu_bytes": 2**30 + step,
    } | more  # fmt: skip


def curves(folder: Path, kind: str = "tensorboard", **changed: Any) -> Curves:
    return Curves(kind, folder, "abc", SETTINGS, **{"attempt": 2} | changed)


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(point.step, point.value) for point in board.Scalars(name)]
        for name in board.Tags()["scalars"]
    }


def test_names_are_those_of_one_table() -> None:
    told = rewrite_logs(trackers.logs(entry(1)))
    assert told.keys() == {
        "train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second",
        "train/ceiling_share", "train/gpu_bytes",
    }  # fmt: skip
    told |= rewrite_logs(trackers.logs({"held_out_loss": 1.0, "at": 1.0, "rss_bytes": 3}))
    told |= rewrite_logs(trackers.logs({"rss_bytes": 3, "gpu_bytes": None}))
    assert told.keys() == {field.tracked for field in FIELDS.values() if field.tracked}


def test_what_a_later_attempt_begins_with_a_reader_has_from_it_alone(tmp_path: Path) -> None:
    with Tracker(curves(tmp_path, attempt=1)).begin() as tracker:
        for step in (1, 2, 3, 4):
            tracker.note(step, entry(step))
        tracker.note(2, {"held_out_loss": 1.5, "at": 1.8e9})
    with Tracker(curves(tmp_path, begins=2)).begin() as tracker:
        for step in (3, 4, 5):
            tracker.note(step, entry(step, loss=float(step)))
    found = points(tmp_path)
    assert found["train/loss"] == [(1, 3.0), (2, 1.5), (3, 3.0), (4, 4.0), (5, 5.0)]
    assert found["eval/loss"] == [(2, 1.5)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert not (tmp_path / tracking.NOTE).exists()


def test_a_tracker_that_fails_is_said_once_and_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its folder should be is a file, until somebody removes it."""
    monkeypatch.setattr(trackers, "AGAIN_SECONDS", 0.0)
    (tmp_path / "tensorboard").write_text("")
    with Tracker(curves(tmp_path)).begin() as tracker:
        for step in (1, 2, 3):
            tracker.note(step, entry(step))
            tracker.catch_up()
        (tmp_path / "tensorboard").unlink()
        tracker.note(4, entry(4))
    assert [step for step, _ in points(tmp_path)["train/loss"]] == [1, 2, 3, 4]
    said = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert len(said) == 1
    assert said[0].startswith("tensorboard failed (")
    assert said[0].endswith("the training goes on, its curves may lack a piece")


def test_a_tracker_that_never_answers_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "START_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "END_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "CATCH_UP_SECONDS", 0.2)
    (tmp_path / "tensorboard").mkdir()
    began = time.monotonic()
    tracker = Tracker(curves(tmp_path))
    monkeypatch.setattr(tracker, "_open", lambda: time.sleep(5))
    with tracker.begin():
        tracker.note(1, entry(1))
        tracker.catch_up()
    assert time.monotonic() - began < 3
    assert "is not waited for" in capsys.readouterr().err


class AuthenticationError(Exception):
    """As wandb calls its own."""


def test_who_is_not_let_in_is_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise AuthenticationError("the API key is wrong")

    tracker = Tracker(curves(tmp_path, "wandb"))
    monkeypatch.setattr(tracker, "_open", refused)
    with pytest.raises(NoPermission, match=r"TRACKER=wandb was refused .the API key is wrong."):
        tracker.begin()


def test_a_tracker_that_is_not_installed_is_refused_with_what_installs_it() -> None:
    absent = [
        kind
        for kind, package in tracking.PACKAGES.items()
        if not tracking.extras._is_there(package)
    ]
    for kind in absent:
        with pytest.raises(CannotRun, match=f"TRACKER={kind} needs .*requirements-trackers.txt"):
            tracking.check(kind)
    tracking.check("tensorboard")
    tracking.check("none")


# What each package makes of two attempts, the second going on from step 2 of 4, read back with the package.
TWO = """
import json, sys
from pathlib import Path
from tests.lib.model.test_trackers import SETTINGS, entry
from stages.lib.model.trackers import Tracker
from stages.lib.run import notes, tracking
from stages.lib.run.tracking import NOTE, Curves

kind, folder = sys.argv[1], Path(sys.argv[2])
tracking.check(kind)
known = notes.read(folder / NOTE) or {"run": "abc12345", "step": 0}
first, last = (1, 4) if known["step"] == 0 else (3, 6)
made = Curves(kind, folder, known["run"], SETTINGS, first - 1, 1, known["step"])
tracker = Tracker(made).begin()
with tracker:
    for step in range(first, last + 1):
        tracker.note(step, entry(step))
    tracker.note(last, {"held_out_loss": 2.0 + last, "at": 1.0})
assert tracker.said is None, tracker.said
"""


def wandb_records(path: Path) -> Iterator[bytes]:
    """Of a `.wandb` file: LevelDB's log, whose blocks of 32 KiB hold no record across their end here."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place = 7
    while place < len(content):
        _, size, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1, "a record in pieces"
        yield content[place + 7 : place + 7 + size]
        place += 7 + size


def wandb_points(folder: Path) -> list[tuple[int, float]]:
    """From the files of an offline run, which `wandb sync` sends in this order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
                if "train/loss" in items:
                    found.append((items["train/global_step"], items["train/loss"]))
    return found


def mlflow_points(folder: Path) -> list[tuple[int, float]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lora-stages").experiment_id])
    assert run.data.params.keys() == SETTINGS.keys()
    assert "train/ceiling_share" in run.data.metrics
    assert run.data.metrics["eval/loss"] == 8.0
    assert run.info.status == "FINISHED"
    found = client.get_metric_history(run.info.run_id, "train/loss")
    return [(one.step, one.value) for one in found]


def trackio_points(folder: Path) -> list[tuple[int, float]]:
    code = """
import json
from trackio.sqlite_storage import SQLiteStorage as store
(run,) = store.get_runs("lora-stages")
name = run if isinstance(run, str) else run["name"]
logs = store.get_logs("lora-stages", name)
print(json.dumps([(e["train/global_step"], e["train/loss"]) for e in logs if "train/loss" in e]))
"""
    env = os.environ | {"TRACKIO_DIR": str(folder / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, text=True, capture_output=True, check=True
    )
    return [tuple(point) for point in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_curves_go_on_in_one_run_of_the_real_package(kind: str, tmp_path: Path) -> None:
    """`make trackers-test` installs them."""
    pytest.importorskip(tracking.PACKAGES[kind])
    secret, root = "a-key-that-nobody-may-see", str(Path(__file__).parents[3])
    kept = {n: os.environ[n] for n in ("PATH", "LANG") if n in os.environ}
    env = kept | {
        "HOME": str(tmp_path / "home"), "WANDB_API_KEY": 40 * "0", "PYTHONPATH": root,
        "HF_TOKEN": secret, "JUDGE_API_KEY": secret,
    }  # fmt: skip
    printed = ""
    if kind == "wandb":
        env["WANDB_MODE"] = "offline"
        printed = "[INFO] Running in WANDB offline mode\n"  # by transformers, when it is imported
    (tmp_path / "home").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", TWO, kind, str(run)], env=env, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == printed
    found = {"wandb": wandb_points, "mlflow": mlflow_points, "trackio": trackio_points}[kind](run)
    assert found == [(step, 3.0 / step) for step in range(1, 7)]
    assert list((tmp_path / "home").rglob("*.db")) == []
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert 40 * b"0" not in content, path
            assert root.encode() not in content, path
