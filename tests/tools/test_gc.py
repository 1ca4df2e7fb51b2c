"""`gc`: what it lists, what it removes, and all that it must leave."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.lib.data import shards
from stages.lib.run import artifact, debris, growing, lease, scratch
from stages.lib.run.artifact import DRAFT, MANIFEST
from tests.conftest import Stages, clean_environment
from tests.faults.ground import whole
from tests.lib.run.test_lease import began
from tests.refusals import refused
from tests.tools.leavings import (
    checkpoint,
    dead_pid,
    finished,
    held_by,
    publish,
    steps,
    trained_to,
)


def files(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder, links by where they lead."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path).encode()
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def cut_off(folder: Path, name: str = "weights.bin") -> Path:
    """An artifact that somebody was killed while he wrote it."""
    folder.mkdir(parents=True)
    (folder / DRAFT).touch()
    (folder / name).write_bytes(b"w" * 500)
    return folder


def listed(done: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return {item["path"]: item for item in json.loads(done.stdout)["listed"]}


def messy(runs: Path) -> None:
    """A finished run, one that goes on, and debris of every kind."""
    finished(runs / "done")
    cut_off(runs / "done" / "merged")
    cut_off(runs / "done" / "hub" / "model--a--b@1")
    cut_off(runs / "done" / "adapter.parts")
    publish(runs / "done", f"{debris.SHARDS}/shard-1")
    (runs / "done" / ".error.json.new").write_text("{")
    trained_to(runs / "half", 3.0, 2.0, 2.5, 2.4, 2.3)
    cut_off(runs / "half" / "checkpoints" / "step-00000006")
    held_by(runs / "half", pid=dead_pid())


GONE = {
    "done/merged", "done/hub/model--a--b@1", "done/adapter.parts", f"done/{debris.SHARDS}/shard-1",
    "done/.error.json.new", "done/checkpoints/step-00000001", "done/checkpoints/step-00000002",
    "half/checkpoints/step-00000001", "half/checkpoints/step-00000003", "half/checkpoints/step-00000006",
    "half/holder.json",
}  # fmt: skip


def test_it_lists_and_removes_nothing_unasked(stages: Stages, tmp_path: Path) -> None:
    messy(tmp_path / "runs")
    before = files(tmp_path / "runs")
    told = listed(stages("gc", "runs", "--json"))
    assert set(told) == {f"runs/{name}" for name in GONE}
    shown = stages("gc", env={"RUN_DIR": "runs/done"})  # its neighbours
    assert "nothing was removed; --delete removes it" in shown.stdout
    for path, item in told.items():
        assert f"{path}: {item['reason']}" in shown.stdout
        here = tmp_path / path
        sizes = [p.stat().st_size for p in here.rglob("*") if p.is_file()] if here.is_dir() else []
        assert item["bytes"] == (sum(sizes) or here.stat().st_size)
    assert files(tmp_path / "runs") == before


def test_it_removes_what_it_lists_and_nothing_else(stages: Stages, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    messy(runs)
    before = files(runs)
    done = stages("gc", "runs", "--delete")
    assert done.returncode == 0, done.stderr
    assert f"removed {len(GONE)} of {len(GONE)}" in done.stdout
    expected = {
        name: content
        for name, content in before.items()
        if not any(name == gone or name.startswith(f"{gone}/") for gone in GONE)
    }
    assert files(runs) == expected
    assert steps(runs / "half") == [2, 4, 5]  # the best, and the newest two
    assert whole(runs / "done" / "adapter")
    assert "there is nothing to remove" in stages("gc", "runs", "--delete").stdout


def test_shards_are_called_what_they_are() -> None:
    assert debris.SHARDS == shards.FOLDER


def test_what_a_stopped_command_goes_on_from_stays(tmp_path: Path) -> None:
    run = trained_to(tmp_path / "run", 3.0, 2.5)
    made_from = json.dumps({"inputs": {}, "settings": {}})
    for name in ("generations", "merged.parts"):
        cut_off(run / name, "lines.jsonl")
        (run / name / DRAFT).write_text(made_from)
    cut_off(run / "merged")  # its finished files are noted in merged.parts
    assert growing.begun(run / "generations")
    assert debris.in_run(run) == []
    # Shards are what prepare-data goes on from, until data/ is there.
    publish(tmp_path / "new", f"{debris.SHARDS}/shard-1")
    assert debris.in_run(tmp_path / "new") == []


def test_what_no_stage_made_stays(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    for name in ("merged", "checkpoints/step-00000009", "hub/mine", "notes"):
        (run / name).mkdir(parents=True)
        (run / name / "mine.txt").write_text("mine")
    manifest = run / "evaluation" / MANIFEST  # of a later version
    publish(run, "evaluation")
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))
    (run / "evaluation" / DRAFT).touch()
    assert {item.path.name for item in debris.in_run(run)} == {"step-00000001", "step-00000002"}


def test_a_checkpoint_goes_only_when_what_stands_for_it_is_verified(tmp_path: Path) -> None:
    run = trained_to(tmp_path / "run", 2.0, 3.0, 2.8, 2.6)
    expected = [item.path.name for item in debris.in_run(run)]
    assert expected == ["step-00000002"]
    for step in (3, 4):  # a bit has flipped: the sizes are right
        (run / f"checkpoints/step-{step:08d}/weights.bin").write_bytes(b"x" * 1000)
    gone, failed = debris.clear(run, debris.in_run(run))
    assert (gone, failed) == ([], [])
    assert steps(run) == [1, 2, 3, 4]


def test_no_checkpoint_goes_where_the_adapter_is_corrupt(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    told = debris.in_run(run)
    assert len(told) == 2
    (run / "adapter" / "weights.bin").write_bytes(b"x" * 1000)
    assert debris.clear(run, told) == ([], [])
    assert steps(run) == [1, 2]
    (run / "adapter" / "weights.bin").write_bytes(b"cut")
    assert debris.in_run(run) == []


@pytest.mark.parametrize("wrong", [{"step": "1"}, {"held_out_loss": "low"}, {}])
def test_a_strange_checkpoint_is_not_judged(tmp_path: Path, wrong: dict[str, Any]) -> None:
    run = trained_to(tmp_path / "run", 3.0, 2.9, 2.8)
    publish(run, "checkpoints/step-00000004", **wrong)
    assert [item.path.name for item in debris.in_run(run)] == ["step-00000001"]
    checkpoint(run, 5, 2.7)
    assert [item.path.name for item in debris.in_run(run)] == ["step-00000001", "step-00000002"]


def test_a_link_leads_nowhere(stages: Stages, tmp_path: Path) -> None:
    """What a hostile run may hold: links out of it at every level."""
    outside = tmp_path / "outside"
    cut_off(outside / "debris")
    finished(outside / "run")
    cut_off(outside / "run" / "merged")
    (outside / "folder").mkdir()
    (outside / "folder" / "precious.txt").write_text("precious")
    run = finished(tmp_path / "runs" / "run")
    (run / "merged").symlink_to(outside / "debris")
    (run / "gguf.parts").symlink_to(outside / "debris")
    (run / "hub").symlink_to(outside)
    (run / debris.SHARDS).symlink_to(outside / "run")
    (run / "checkpoints" / "step-00000003").symlink_to(
        outside / "run" / "checkpoints" / "step-00000002"
    )
    inside = cut_off(run / "evaluation")
    (inside / "folder").symlink_to(outside / "folder")
    (inside / "file").symlink_to(outside / "folder" / "precious.txt")
    other = tmp_path / "runs" / "other"
    trained_to(other, 3.0)
    os.rename(other / "checkpoints", outside / "checkpoints")
    for step in (2, 3, 4, 5):
        publish(outside, f"checkpoints/step-{step:08d}", step=step, held_out_loss=2.0)
    (other / "checkpoints").symlink_to(outside / "checkpoints")
    (tmp_path / "runs" / "away").symlink_to(outside / "run")
    before = files(outside)
    done = stages("gc", "runs", "--delete", "--json")
    assert done.returncode == 0, done.stderr
    names = {Path(item["path"]).name for item in json.loads(done.stdout)["removed"]}
    assert names == {"evaluation", "step-00000001", "step-00000002"}
    assert not inside.exists()
    assert files(outside) == before


def test_a_run_that_is_held_is_left_alone(stages: Stages, tmp_path: Path) -> None:
    run = trained_to(tmp_path / "runs" / "run", 3.0, 2.0, 2.5, 2.4, 2.3)
    process = began(run)
    try:
        done = stages("gc", "runs", "--delete")
        assert done.returncode == 0, done.stderr
        assert f"left alone, train is at work on it, process {process.pid}" in done.stdout
        assert steps(run) == [1, 2, 3, 4, 5]
        # It had not begun when the list was made.
        with pytest.raises(lease.InUse):
            debris.clear(run, debris.in_run(run))
        assert steps(run) == [1, 2, 3, 4, 5]
    finally:
        process.kill()
        process.communicate()
    assert stages("gc", "runs", "--delete").returncode == 0
    assert steps(run) == [2, 4, 5]


def test_a_holder_on_another_machine_is_watched_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    run = finished(tmp_path / "run")
    held_by(run, host="elsewhere")
    began_at = time.monotonic()
    gone, _ = debris.clear(run, debris.in_run(run))
    assert time.monotonic() - began_at >= 1.0
    assert len(gone) == 2


def test_what_has_become_an_artifact_since_it_was_listed_stays(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    cut_off(run / "merged")
    told = debris.in_run(run)
    assert "merged" in {item.path.name for item in told}
    publish(run, "merged")
    cut_off(run / "gguf")  # nobody has seen it in the list
    gone, _ = debris.clear(run, told)
    assert {item.path.name for item in gone} == {"step-00000001", "step-00000002"}
    assert whole(run / "merged")
    assert (run / "gguf").is_dir()


@pytest.mark.parametrize(
    "point", ["lease.take", "retire.manifest", "checkpoint.prune", "lease.release"]
)
def test_killed_at_any_point_it_has_removed_no_artifact_and_can_be_run_again(
    stages: Stages, tmp_path: Path, point: str
) -> None:
    runs = tmp_path / "runs"
    messy(runs)
    adapter = whole(runs / "done" / "adapter")
    done = stages("gc", "runs", "--delete", env={"FAILPOINTS": f"{point}=1:kill"})
    assert done.returncode == -9
    assert whole(runs / "done" / "adapter") == adapter
    assert {2, 4, 5} <= set(steps(runs / "half"))
    assert stages("gc", "runs", "--delete").returncode == 0
    assert whole(runs / "done" / "adapter") == adapter
    assert steps(runs / "half") == [2, 4, 5]
    assert steps(runs / "done") == []
    assert not list(runs.rglob("holder.json"))


def test_what_cannot_be_removed_is_told_and_the_rest_goes(stages: Stages, tmp_path: Path) -> None:
    messy(tmp_path / "runs")
    done = stages("gc", "runs", "--delete", env={"FAILPOINTS": "checkpoint.prune=1:EACCES"})
    assert done.returncode == 73
    assert "1 could not be removed" in done.stderr
    assert f"removed {len(GONE) - 1} of {len(GONE)}" in done.stdout
    refused(stages("gc", "nowhere"), 66, "there is no folder nowhere")


# --- scratch ---------------------------------------------------------------------------------------


WORK = """
import sys, time
from stages.lib.run import scratch
with scratch.folder() as folder:
    (folder / "weights.bin").write_bytes(b"w" * 100)
    print("held", flush=True)
    time.sleep(60)
"""


def test_scratch_of_a_dead_process_goes_and_that_of_a_live_one_stays(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "scratch"
    monkeypatch.setenv("SCRATCH_DIR", str(place))
    live = began(tmp_path, WORK)
    (kept,) = place.iterdir()
    killed = began(tmp_path, WORK)
    killed.kill()
    killed.communicate()
    (gone,) = set(place.iterdir()) - {kept}
    try:
        told = listed(stages("gc", ".", "--json"))
        assert set(told) == {str(gone)}
        assert told[str(gone)]["bytes"] == 100
        assert not scratch.remove(kept)
        assert stages("gc", ".", "--delete").returncode == 0
        assert set(place.iterdir()) == {kept}
        assert (kept / "weights.bin").is_file()
    finally:
        live.kill()
        live.communicate()


def test_scratch_of_another_machine_goes_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_DIR", str(tmp_path))
    old = time.time() - scratch.IDLE_SECONDS - 60
    for name in (
        "lora-stages-elsewhere-a",
        "lora-stages-b",
        "lora-stages-new",
        "lora-stages-home-7",
        "mine",
    ):
        (tmp_path / name / "deep").mkdir(parents=True)
        for path in (tmp_path / name / "deep", tmp_path / name):
            os.utime(path, (old, old))
    (tmp_path / "lora-stages-new" / "deep" / "file").touch()
    (tmp_path / "lora-stages-link").symlink_to(tmp_path / "mine")
    (tmp_path / "lora-stages-file").touch()
    gone = {path.name for path, _ in scratch.left()}
    assert gone == {"lora-stages-elsewhere-a", "lora-stages-b"}


# --- on a terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "left"), [("n", [1, 2, 3, 4, 5]), ("y", [2, 4, 5])])
def test_a_person_is_asked(tmp_path: Path, answer: str, left: list[int]) -> None:
    run = trained_to(tmp_path / "runs" / "run", 3.0, 2.0, 2.5, 2.4, 2.3)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "gc", "runs"], stdin=theirs, stdout=theirs, stderr=theirs,
        cwd=tmp_path, env=clean_environment(tmp_path),
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"Remove these" not in said:
        assert select.select([ours], [], [], 20)[0], said
        said += os.read(ours, 4096)
    os.write(ours, f"{answer}\n".encode())
    assert process.wait(20) == 0
    os.close(ours)
    assert steps(run) == left


def test_gc_never_removes_a_verified_artifact(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    names = ("evaluation", "merged", "gguf", "generations", "fetched", "hub/model--a--b@1")
    for name in names:
        publish(run, name)
        (run / name / DRAFT).touch()  # what a kill between manifest and mark leaves
    debris.clear(run, debris.in_run(run))
    for name in ("data", "adapter", *names):
        assert artifact.load(run / name, deep=True), name
