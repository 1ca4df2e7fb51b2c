"""The verdict: how a run stands, whatever became of it."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from stages.lib.report.verdict import verdict
from stages.lib.run import exits, lease
from tests.lib.report import runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def told(run: Path) -> tuple[str, str, str]:
    found = verdict(runs.look(run))
    return found.state, found.kind, " ".join(found.sentences)


def failure(run: Path, stage: str, error: exits.StageError, **more: Any) -> None:
    """As a command leaves it, in the file that it writes."""
    outcome = exits.Reported()
    outcome.stage, outcome.run_dir = stage, run
    outcome._record(error, error)
    path = run / exits.ERROR
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def hold(run: Path, **other: Any) -> None:
    (run / lease.HOLDER).write_text(json.dumps(lease._own("train") | other))


def test_a_done_run_is_as_good_as_its_evaluation(run: Path) -> None:
    runs.whole(run)
    state, kind, said = told(run)
    assert (state, kind) == ("done", "good")
    assert said.startswith("The tuned model is better: held-out loss ")
    assert "passed its check" in said


def test_a_worse_model_is_not_good(run: Path) -> None:
    runs.whole(run, gain=-0.5)
    state, kind, said = told(run)
    assert (state, kind) == ("done", "bad")
    assert "worse" in said


def test_what_is_stale_or_corrupt_is_not_good_either(run: Path) -> None:
    runs.whole(run)
    made = runs.adapter(run, "0" * 64, runs.steps(20))
    assert made.digest
    (run / "merged" / "merge_report.json").write_text("{")
    state, kind, said = told(run)
    assert (state, kind) == ("done", "open")
    assert "adapter is stale" in said
    assert "merge_report.json has 1 bytes" in said


def test_an_empty_folder_is_empty(run: Path) -> None:
    assert told(run)[0] == "empty"
    assert runs.look(run).empty


def test_what_is_missing_comes_next(run: Path) -> None:
    made = runs.data(run)
    assert told(run) == (
        "unfinished",
        "open",
        "There is data, and no adapter yet. Next is `train`.",
    )
    runs.checkpoint(run, 20)
    assert "Step 20 of 60 is safe, loss 1.150, held-out loss 1.800." in told(run)[2]
    runs.adapter(run, made.digest, runs.steps())
    assert "All 60 steps are trained" in told(run)[2]
    assert "Next is `evaluate`" in told(run)[2]


def test_a_failure_says_why_and_what_to_do(run: Path) -> None:
    runs.data(run)
    runs.checkpoint(run, 20)
    failure(run, "train", exits.Diverged("the loss of step 21 is not finite"), attempt=1)
    state, kind, said = told(run)
    assert (state, kind) == ("failed", "bad")
    assert "`train` failed with exit 80 (diverged): the loss of step 21 is not finite." in said
    assert "What to do: lower LEARNING_RATE." in said
    assert "Step 20 of 60 is safe" in said


def test_a_gate_that_was_not_met_is_a_failure_beside_its_result(run: Path) -> None:
    runs.whole(run)
    failure(run, "evaluate", exits.GateFailed("GATE=loss<1 is not met"), attempt=3)
    state, kind, said = told(run)
    assert (state, kind) == ("failed", "bad")
    assert "exit 82" in said
    assert "The tuned model is better" in said


def test_a_stop_is_no_failure(run: Path) -> None:
    runs.checkpoint(run, 20)
    failure(run, "train", exits.Stopped("SIGTERM; the same command goes on"), attempt=1)
    assert told(run)[:2] == ("stopped", "open")


def test_an_option_that_was_refused_does_not_undo_a_run(run: Path) -> None:
    runs.whole(run)
    failure(run, "train", exits.BadSetting("LORA_RANK is no number"), attempt=None)
    failure(run, "report", exits.Missing("no such thing"), attempt=None)
    assert told(run)[0] == "done"


@pytest.mark.parametrize("end", [None, 137])
def test_what_was_killed_left_no_error(run: Path, end: int | None) -> None:
    runs.checkpoint(run, 40)
    runs.attempt(run, 1, "train", end, "killed")
    state, _, said = told(run)
    assert state == "stopped"
    assert "Attempt 1, `train`" in said
    assert "The same command goes on. Step 40 of 60 is safe" in said


def test_who_is_at_work_is_said(run: Path) -> None:
    runs.checkpoint(run, 20)
    runs.attempt(run, 1, "train", None)
    hold(run)
    (run / "heartbeat.json").write_text(json.dumps({"unit": "steps", "done": 33, "total": 60}))
    state, _, said = told(run)
    assert state == "going on"
    assert f"on {socket.gethostname()}: 33 of 60 steps" in said
    hold(run, host="elsewhere")
    state, _, said = told(run)
    assert state == "perhaps"
    assert "elsewhere, if that machine is still there" in said
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    hold(run, pid=pid)
    assert told(run)[0] == "stopped"
