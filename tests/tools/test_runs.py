"""`runs`: how each run stands, told from what it left, whatever that is."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.lib.run import exits, lease, standing
from stages.lib.run.attempts import Attempt
from stages.lib.run.exits import Diverged, Reported
from stages.lib.run.standing import Standing
from tests.conftest import Stages
from tests.lib.run.test_lease import began
from tests.refusals import refused
from tests.tools.leavings import SETTINGS, dead_pid, finished, held_by, publish, trained_to

KILLED = """
import os, sys
from pathlib import Path
from stages.lib.run.attempts import Attempt
with Attempt(Path(sys.argv[1]), "train", {}):
    os.kill(os.getpid(), 9)
"""


def failed(run: Path, error: Exception, stage: str = "train", began_work: bool = True) -> None:
    """Have a command end with an error there, as the program ends one."""
    with pytest.raises(SystemExit):
        fail(run, error, stage, began_work)


def fail(run: Path, error: Exception, stage: str, began_work: bool) -> None:
    with Reported() as outcome:
        outcome.stage, outcome.run_dir = stage, run
        if not began_work:
            raise error
        outcome.attempt = Attempt(run, stage, SETTINGS)
        with outcome.attempt:
            raise error


def test_a_finished_run(tmp_path: Path) -> None:
    found = standing.standing(finished(tmp_path / "run"))
    assert (found.state, found.stage, found.why) == ("done", "train", "")
    assert (found.loss, found.held_out_loss, found.tokens_per_second) == (2.75, 2.5, 123.4)
    assert (found.step, found.artifacts) == (2, ("data", "adapter"))
    on_disk = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert found.bytes == on_disk
    assert found.changed is not None
    assert abs(found.changed - time.time()) < 60


def test_a_copied_run_without_records_is_done(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    shutil.rmtree(run / "attempts")
    assert standing.standing(run).state == "done"


def test_a_run_is_going_on_while_its_process_lives(tmp_path: Path) -> None:
    run = trained_to(tmp_path / "run", 3.0, 2.5)
    process = began(run)
    try:
        found = standing.standing(run)
        assert (found.state, found.stage) == ("going on", "train")
        assert found.why == f"process {process.pid} on {socket.gethostname()}"
        assert (found.step, found.loss, found.held_out_loss) == (2, None, 2.5)
        beat = {"unit": "steps", "done": 7, "total": 90, "eta_seconds": 4000.5, "loss": 2.25}
        (run / standing.HEARTBEAT).write_text(json.dumps(beat | {"tokens_per_second": None}))
        found = standing.standing(run)
        assert found.why.endswith("; 7 of 90 steps, 67 min left")
        assert (found.step, found.loss, found.held_out_loss) == (7, 2.25, 2.5)
        # Suspended: the process is there, and its counter stands still.
        past = time.time() - lease.STALE_SECONDS - 30
        os.utime(run / lease.HOLDER, (past, past))
        assert standing.standing(run).state == "perhaps"
    finally:
        process.kill()
        process.communicate()
    assert standing.standing(run).state != "going on"


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"space": "pid:[1]"}, {"boot": "before"}])
def test_a_holder_that_cannot_be_seen_is_perhaps_at_work(
    tmp_path: Path, other: dict[str, str]
) -> None:
    path = held_by(tmp_path / "run", **other)
    past = time.time() - 7 * 60
    os.utime(path, (past, past))
    began_at = time.monotonic()
    found = standing.standing(tmp_path / "run")
    assert found.state == "perhaps"
    assert found.why.endswith("last beat 7 min ago")
    assert other.get("host", socket.gethostname()) in found.why
    assert time.monotonic() - began_at < 5  # nobody is watched for a minute


def test_a_killed_run_is_stopped(tmp_path: Path) -> None:
    run = trained_to(tmp_path / "run", 3.0)
    done = subprocess.run([sys.executable, "-c", KILLED, str(run)], check=False)
    assert done.returncode == -9
    held_by(run, pid=dead_pid())
    found = standing.standing(run)
    assert (found.state, found.stage) == ("stopped", "train")
    assert found.why.startswith("was killed after")


def test_how_it_failed_and_why(tmp_path: Path) -> None:
    run = trained_to(tmp_path / "run", 3.0)
    failed(run, Diverged("the loss is not finite at step 2"))
    found = standing.standing(run)
    assert (found.state, found.stage) == ("failed", "train")
    assert found.why == "80 diverged: the loss is not finite at step 2"


def test_a_stop_is_no_failure(tmp_path: Path) -> None:
    run = trained_to(tmp_path / "run", 3.0)
    failed(run, exits.Stopped("stopped by SIGTERM"))
    assert standing.standing(run).state == "stopped"
    (run / exits.ERROR).unlink()  # the record of the process says the same
    assert standing.standing(run).state == "stopped"


def test_a_refused_command_does_not_undo_what_is_there(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    failed(run, exits.BadSetting("LEARNING_RATE is -1"), began_work=False)
    assert standing.standing(run).state == "done"
    # One that makes something else has not been made.
    failed(run, exits.BadSetting("PROMPT is missing"), "generate", began_work=False)
    assert standing.standing(run).state == "failed"


def broken(run: Path, how: str) -> None:
    finished(run)
    names = {
        "error": exits.ERROR, "beat": standing.HEARTBEAT, "holder": lease.HOLDER,
        "manifest": "adapter/manifest.json",
        "checkpoint": "checkpoints/step-00000002/manifest.json",
        "attempt": next((run / "attempts").iterdir()).relative_to(run),
    }  # fmt: skip
    what, _, form = how.partition(" ")
    if what == "beat":  # is looked at while somebody may be at work
        held_by(run, host="elsewhere")
        shutil.rmtree(run / "adapter")
    path = run / names[what]
    path.unlink(missing_ok=True)
    if form == "pipe":
        os.mkfifo(path)
    elif form == "link":
        path.symlink_to("/dev/zero")
    elif form == "folder":
        path.mkdir()
    elif form == "huge":
        with path.open("wb") as file:
            file.truncate(64 << 30)
    else:
        path.write_text(
            {"deep": "[" * 200_000, "list": "[1]", "cut": '{"a', "strange": STRANGE}[form]
        )


STRANGE = json.dumps(
    {
        "schema": 1, "files": {}, "code": ["x"],
        "metrics": {"loss": "low", "steps": [1], "held_out_loss": 1e400, "step": True},
        "stage": {"a": 1}, "exit": None, "message": "\x1b[2J\ud800\n", "pid": 1 << 80, "host": 7,
        "unit": "steps", "done": [], "total": 1e400, "started": 5, "seconds": "x", "end": "x", "boot": 1,
    }
)  # fmt: skip
FORMS = ("pipe", "link", "folder", "huge", "deep", "list", "cut", "strange")


def test_nothing_that_lies_in_a_run_breaks_the_table(stages: Stages, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    cases = [
        f"{what} {form}"
        for what in ("error", "beat", "holder", "manifest", "checkpoint", "attempt")
        for form in FORMS
    ]
    for case in cases:
        broken(runs / case, case)
    (runs / "link").symlink_to("/")
    (runs / "notes.txt").write_text("not a run")
    (runs / "data").mkdir()  # somebody's, not a run
    done = stages("runs", "runs", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["runs"]
    assert {Path(each["folder"]).name for each in told} == set(cases)
    states = {Path(each["folder"]).name: each["state"] for each in told}
    assert {states[f"manifest {form}"] for form in FORMS} <= {"done", "unreadable"}
    shown = stages("runs", "runs")
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
    assert sum(case in shown.stdout for case in cases) == len(cases)


def test_a_volume_that_fails_is_told_in_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path / "good")
    finished(tmp_path / "bad")
    real = os.listdir

    def listdir(path: object) -> list[str]:
        if "bad" in str(path):
            raise OSError(5, "Input/output error", str(path))
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "listdir", listdir)
    states = {Path(each.folder).name: each.state for each in standing.standings(tmp_path)}
    assert states == {"good": "done", "bad": "unreadable"}


def test_runs_lie_side_by_side_or_deeper_and_the_last_active_comes_first(
    stages: Stages, tmp_path: Path
) -> None:
    for number, name in enumerate(("first", "sweep/a", "sweep/b")):
        publish(tmp_path / "runs" / name, "data")
        os.utime(tmp_path / "runs" / name, (1000 * number + 1, 1000 * number + 1))
    done = stages("runs", env={"RUN_DIR": "runs/first"})
    assert done.returncode == 0, done.stderr
    lines = [line.split()[:3] for line in done.stdout.splitlines()[2:5]]
    assert lines == [[n, "done", "prepare-data"] for n in ("sweep/b", "sweep/a", "first")]
    assert "runs/first" not in stages("runs", "runs/sweep").stdout
    assert not (tmp_path / "runs" / "first" / "error.json").exists()
    (alone,) = json.loads(stages("runs", "runs/first", "--json").stdout)["runs"]
    assert alone["folder"] == "runs/first"


def test_a_folder_that_is_not_there(stages: Stages, tmp_path: Path) -> None:
    refused(stages("runs", "nowhere"), 66, "there is no folder nowhere")
    assert "there is no run in ." in stages("runs", ".").stdout


def test_hundreds_of_runs_take_a_second(tmp_path: Path) -> None:
    run = finished(tmp_path / "runs" / "0")
    for number in range(1, 300):
        shutil.copytree(run, tmp_path / "runs" / str(number))
    began_at = time.process_time()
    found: list[Standing] = standing.standings(tmp_path / "runs")
    assert time.process_time() - began_at < 1.5
    assert [each.state for each in found] == ["done"] * 300


def test_runs_imports_no_torch_and_hashes_nothing(stages: Stages, tmp_path: Path) -> None:
    run = finished(tmp_path / "runs" / "a")
    weights = run / "adapter" / "weights.bin"
    weights.write_bytes(b"x" * weights.stat().st_size)
    done = stages("runs", "runs", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.stdout.split("\n")[2].split()[1] == "done"
    assert " torch\n" not in done.stderr
