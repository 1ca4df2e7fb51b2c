"""Stopped at any time and in any way, a stage ends with 75 and the same command goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from stages.lib.run.settings import Setting
from stages.lib.run.values import Number
from stages.train import train as train_stage
from tests.conftest import clean_environment, run_stages
from tests.forking import Forking, forking
from tests.hub_server import Answer, Hub
from tests.refusals import write_preset

# Four bins a step, four steps, each evaluated and saved.
RECIPE = {
    "MAX_LENGTH": 128, "BASE_PRECISION": "fp32", "LORA_RANK": 4, "BATCH_TOKENS": 512,
    "MICRO_BATCH_TOKENS": 128, "MAX_STEPS": 4, "VALIDATION_FRACTION": 0.1, "MAX_NEW_TOKENS": 4,
    "OPTIMIZER": "adamw_torch", "RUN_DIR": "run",
}  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STAGES = ("prepare-data", "train")


@pytest.fixture(scope="module")
def made(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """Prepared data in `prepared`, a finished run in `finished`, and what runs commands beside them."""
    folder = tmp_path_factory.mktemp("stopping")
    shutil.copytree(tiny, folder / "base")
    write_preset(folder / "tiny.env", BASE_MODEL="base", DATASET=rows, **RECIPE)
    with forking(folder) as stages:
        for stage, name in zip(STAGES, ("prepared", "finished"), strict=True):
            done = stages("--env-file", "tiny.env", stage)
            assert done.returncode == 0, done.stderr
            shutil.copytree(folder / "run", folder / name)
        shutil.rmtree(folder / "run")
        yield stages


@pytest.fixture
def run(made: Forking) -> Iterator[Path]:
    """A run directory that has data, for the commands of a test."""
    shutil.copytree(made.folder / "prepared", made.folder / "run")
    yield made.folder / "run"
    made.end()
    shutil.rmtree(made.folder / "run")


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "error.json").read_text()))


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run / "attempts").iterdir())]


def train(made: Forking, failpoint: str = "", *args: str, **env: str) -> Any:
    return made("--env-file", "tiny.env", "train", *args, env=env | {"FAILPOINTS": failpoint})


def started(made: Forking, run: Path, *args: str, until: str, **env: str) -> int:
    """A command that has come so far that a file is there; its process id."""
    pid = made.start("--env-file", "tiny.env", *args, **env)
    began = time.monotonic()
    while not list(run.glob(until)):
        assert time.monotonic() - began < 60, (made.folder / "stderr").read_text()
        time.sleep(0.01)
    return pid


@pytest.mark.case("G4", "G5", "G6")
@pytest.mark.promise("P2", "P3")
def test_a_stop_anywhere_in_training_and_the_same_command(made: Forking, run: Path) -> None:
    """In the middle of an accumulation, of an evaluation, of a checkpoint, behind a step, in turn."""
    for failpoint in ("train.bin=7", "train.evaluate", "publish.block=4", "train.step"):
        done = train(made, f"{failpoint}:term")
        assert done.returncode == 75, (failpoint, done.stderr)
        assert "stopped by SIGTERM" in done.stderr
        assert not (run / "adapter").exists()
        assert record(run)["code"] == "stopped"
    again = train(made)
    assert again.returncode == 0, again.stderr
    assert weights(run) == weights(made.folder / "finished")
    assert not (run / "error.json").exists()
    assert [attempt["end"] for attempt in attempts(run)] == [0, 75, 75, 75, 75, 0]


@pytest.mark.case("G6")
@pytest.mark.promise("P1")
@pytest.mark.parametrize(
    "failpoint",
    ["publish.begin:term", "publish.manifest:term", "publish.done:term", "lease.release:term"],
)
def test_a_stop_while_the_artifact_is_published_comes_too_late(
    made: Forking, run: Path, failpoint: str
) -> None:
    done = made("--env-file", "tiny.env", "prepare-data", "--force", env={"FAILPOINTS": failpoint})
    assert done.returncode == 0, done.stderr
    assert not (run / "holder.json").exists()
    assert "nothing changed" in made("--env-file", "tiny.env", "prepare-data", "--verify").stderr


@pytest.mark.case("G8")
@pytest.mark.promise("P9")
@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_ends_with_75(made: Forking, run: Path, number: signal.Signals) -> None:
    pid = started(made, run, "train", "--max-steps", "4000", until="holder.json")
    time.sleep(0.3)
    os.kill(pid, number)
    done = made.wait()
    assert done.returncode == 75, done.stderr
    assert f"stopped by {number.name}" in record(run)["message"]
    assert "Traceback" not in done.stderr
    assert not (run / "holder.json").exists()


@pytest.mark.case("G5")
@pytest.mark.parametrize(
    ("stage", "failpoint"),
    [
        ("evaluate", "scratch:term"),
        ("merge", "publish.file:term"),
        ("merge", "publish.block=2:term"),
    ],
)
def test_the_stages_behind_it_leave_nothing_half_done(
    made: Forking, run: Path, stage: str, failpoint: str
) -> None:
    shutil.copytree(made.folder / "finished", run, dirs_exist_ok=True)
    done = made("--env-file", "tiny.env", stage, env={"FAILPOINTS": failpoint})
    assert done.returncode == 75, done.stderr
    assert not (run / "evaluation").exists()
    assert not (run / "merged" / "manifest.json").exists()
    assert list((made.folder / "scratch").iterdir()) == []


@pytest.mark.case("G7")
def test_a_second_signal_ends_it_at_once(made: Forking, run: Path) -> None:
    saved = "checkpoints/step-00000002/manifest.json"
    pid = started(made, run, "train", until=saved, FAILPOINTS="train.bin=9:hang")
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)  # to the process and to its group
    time.sleep(3.2)
    os.kill(pid, 0)
    os.kill(pid, signal.SIGTERM)
    assert made.wait().returncode == 143


@pytest.mark.case("G4", "G7")
def test_work_that_does_not_stop_is_ended_in_time(made: Forking, run: Path) -> None:
    pid = started(
        made, run, "train", until="checkpoints/step-00000002/manifest.json",
        FAILPOINTS="train.bin=9:hang", GRACE_SECONDS="1",
    )  # fmt: skip
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    done = made.wait()
    assert 0.9 < time.monotonic() - began < 5
    assert done.returncode == 75
    assert "after 1 seconds the work had not stopped by itself (failpoints.py:" in done.stderr
    assert record(run)["code"] == "stopped"
    assert record(run)["attempt"] == attempts(run)[-1]["number"]
    assert attempts(run)[-1]["end"] == 75
    again = train(made)
    assert again.returncode == 0, again.stderr
    assert "going on from step 2" in again.stderr
    assert weights(run) == weights(made.folder / "finished")


@pytest.mark.promise("P9")
def test_it_stops_by_itself_before_the_limit(made: Forking, run: Path) -> None:
    began = time.monotonic()
    limits = ("--max-runtime", "4s", "--grace-seconds", "1.5")
    done = train(made, "", "--max-steps", "100000", *limits)
    assert 2.4 < time.monotonic() - began < 6
    assert done.returncode == 75, done.stderr
    assert "MAX_RUNTIME of 4 seconds is near" in record(run)["message"]


@pytest.mark.case("G11", "E5")
def test_a_loop_of_killed_processes_ends(made: Forking, run: Path) -> None:
    done = train(made, "train.bin=2:kill")
    assert done.returncode == -signal.SIGKILL
    left = attempts(run)[-1]
    assert left["end"] is None
    for number in range(2, 5):  # as after a quarter of an hour, three times
        path = run / "attempts" / f"{number:04d}-{left['id']}.json"
        path.write_text(json.dumps(left | {"number": number, "seconds": 900}))
    done = train(made)
    assert done.returncode == 70, done.stderr
    assert "Traceback" not in done.stderr
    assert record(run)["code"] == "no-progress"
    assert "was killed after 15 minutes at" in record(run)["message"]
    assert train(made).returncode == 0


@pytest.mark.case("G12", "A21")
def test_while_another_stage_is_at_work(made: Forking, run: Path) -> None:
    started(made, run, "train", until="holder.json", FAILPOINTS="train.bin=2:hang")
    early = run_stages(made.folder, "--env-file", "tiny.env", "evaluate")
    assert early.returncode == 66
    assert f"`train` is at work on it, process {made.pid}" in early.stderr
    second = run_stages(made.folder, "--env-file", "tiny.env", "prepare-data", "--force")
    assert second.returncode == 75, second.stderr
    assert f"in use by train, process {made.pid}" in second.stderr
    assert record(run)["stage"] == "evaluate"


# --- what is finished ------------------------------------------------------------------------------


@pytest.mark.case("G10")
@pytest.mark.promise("P10")
def test_a_finished_stage_is_done_within_two_seconds(made: Forking, run: Path) -> None:
    """Each of the five, and export; as a service that retries a finished job has it."""
    shutil.copytree(made.folder / "finished", run, dirs_exist_ok=True)
    (made.folder / "asked.txt").write_text("Hi\nWhy?\n")
    commands = [
        ("prepare-data",), ("train",), ("evaluate",), ("generate", "--prompts-file", "asked.txt"),
        ("merge",), ("export",),
    ]  # fmt: skip
    for command in commands:
        done = made("--env-file", "tiny.env", *command)
        assert done.returncode == 0, done.stderr
    records = attempts(run)
    for command in commands:
        began = time.perf_counter()
        done = run_stages(
            made.folder, "--env-file", "tiny.env", *command, env={"PYTHONPROFILEIMPORTTIME": "1"}
        )
        seconds = time.perf_counter() - began
        assert done.returncode == 0, done.stderr
        assert "finished and nothing changed" in done.stderr
        assert " torch\n" not in done.stderr
        assert seconds < 2, command
    assert attempts(run) == records
    assert not (run / "error.json").exists()


# --- what is another run ---------------------------------------------------------------------------


def another(option: Setting) -> str:
    """A value that an option of train may have, and does not have in RECIPE."""
    own = {"BASE_MODEL": "other", "LORA_TARGETS": "k_proj", "INIT_ADAPTER": "finished/adapter"}
    if isinstance(option.type, click.Choice):
        now = RECIPE.get(option.variable, option.default)
        return next(choice for choice in option.type.choices if choice != now)
    if isinstance(option.type, Number):
        low = max(option.type.low, option.type.above or 0, 0)
        return str(int(low) + 5 if option.type.kind is int else low + 0.123)
    return own[option.variable]


IDENTITY = [p for p in train_stage.params if isinstance(p, Setting) and p.identity]
HUBS_OWN = "BASE_REVISION"  # a folder has none


def test_every_setting_of_train_is_looked_at() -> None:
    assert {p.variable for p in IDENTITY} >= {*RECIPE} & {p.envvar for p in train_stage.params} - {
        "RUN_DIR"
    }
    assert len(IDENTITY) >= 20


@pytest.mark.promise("P5")
@pytest.mark.parametrize("option", [p for p in IDENTITY if p.variable != HUBS_OWN], ids=str)
def test_a_run_of_other_settings_is_refused(made: Forking, run: Path, option: Setting) -> None:
    if not (made.folder / "other").exists():
        shutil.copytree(made.folder / "base", made.folder / "other")
    shutil.copytree(made.folder / "finished", run, dirs_exist_ok=True)
    done = train(made, "", option.opts[0], another(option))
    assert done.returncode == 78, done.stderr
    assert f"{option.variable} was " in done.stderr
    assert f"is now {another(option)}" in done.stderr
    assert record(run)["code"] == "cannot-run"
    assert weights(run) == weights(made.folder / "finished")


@pytest.mark.promise("P5")
def test_checkpoints_of_other_settings_are_refused_with_every_key(made: Forking, run: Path) -> None:
    shutil.copytree(made.folder / "finished", run, dirs_exist_ok=True)
    shutil.rmtree(run / "adapter")
    kept = sorted(run.rglob("checkpoints/*/manifest.json"))
    changed = [p for p in IDENTITY if p.variable not in (HUBS_OWN, "BASE_MODEL", "INIT_ADAPTER")]
    done = train(made, "", *(word for p in changed for word in (p.opts[0], another(p))))
    assert done.returncode == 78, done.stderr
    for option in changed:
        assert f"{option.variable} was " in done.stderr
    assert sorted(run.rglob("checkpoints/*/manifest.json")) == kept


@pytest.mark.promise("P5")
def test_other_data_or_another_tokenizer_under_the_same_names_is_refused(
    made: Forking, run: Path
) -> None:
    shutil.copytree(made.folder / "finished", run, dirs_exist_ok=True)
    fewer = made("--env-file", "tiny.env", "prepare-data", "--max-rows", "20")
    assert fewer.returncode == 0, fewer.stderr
    done = train(made)
    assert done.returncode == 78, done.stderr
    assert "input data is another" in done.stderr
    path = made.folder / "base" / "tokenizer_config.json"
    content = path.read_text()
    path.write_text(content.replace("{", '{"added": 1,', 1))
    shutil.rmtree(run / "data")
    shutil.copytree(made.folder / "finished" / "data", run / "data")
    done = train(made)
    shutil.rmtree(run / "adapter")
    unfinished = train(made)
    path.write_text(content)
    for end, words in ((done, "input base is another"), (unfinished, "its input base was")):
        assert end.returncode == 78, end.stderr
        assert words in end.stderr
        print(end.stderr)


# --- processes of their own ------------------------------------------------------------------------


def alone(folder: Path, *args: str, **env: str) -> "subprocess.Popen[str]":
    """A command in a process, and a group, of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "stages", "--env-file", "tiny.env", *args],
        env=clean_environment(folder) | env, cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.case("G1")
def test_a_signal_before_anybody_listens(made: Forking, run: Path) -> None:
    process = alone(made.folder, "prepare-data", "--force")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGTERM, said
    assert (run / "data" / "manifest.json").is_file()


@pytest.mark.case("G2")
def test_a_signal_while_torch_is_imported(made: Forking, run: Path) -> None:
    process = alone(made.folder, "train", PYTHONPROFILEIMPORTTIME="1")
    assert process.stderr
    for line in process.stderr:
        if "torch.torch_version" in line:
            break
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait() == 75, said
    assert "Traceback" not in said
    assert record(run)["code"] == "stopped"
    assert not list(run.glob("checkpoints/*"))


class Slow(Hub):
    """A hub that is in the middle of a file for ever."""

    def answer(self, method: str, path: str, token: str | None, sent: bytes = b"") -> Answer:
        if method == "GET" and path.endswith("/tokenizer.json"):
            (Path(self.store.name) / "asked").touch()
            time.sleep(60)
        return super().answer(method, path, token, sent)


@pytest.mark.case("G3")
def test_a_signal_during_a_download(made: Forking, run: Path, tiny: Path) -> None:
    with Slow() as hub:
        hub.push("models", "owner/tiny", tiny)
        process = alone(
            made.folder, "prepare-data", "--force", "--base-model", "owner/tiny",
            "--grace-seconds", "2", HF_ENDPOINT=hub.url,
        )  # fmt: skip
        while not (Path(hub.store.name) / "asked").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
        assert process.returncode == 75, said
        assert time.monotonic() - began < 6
    assert record(run)["code"] == "stopped"


@pytest.mark.case("G9")
def test_a_signal_to_the_whole_group_leaves_no_process(
    made: Forking, run: Path, tmp_path: Path
) -> None:
    """As `tini -g` sends it, while worker processes tokenise."""
    text = "### Human: " + "word " * 400 + "### Assistant: " + "and so on " * 100
    with (tmp_path / "many.jsonl").open("w") as file:
        for number in range(4000):
            file.write(json.dumps({"text": f"{text} {number}."}) + "\n")
    process = alone(
        made.folder, "prepare-data", "--force", "--dataset", str(tmp_path / "many.jsonl")
    )
    began = time.monotonic()
    while len(group(process.pid)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    workers, scratch = group(process.pid), list((made.folder / "scratch").iterdir())
    assert scratch
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "leaked" not in said
    assert "Traceback" not in said
    while left := group(process.pid):
        assert time.monotonic() - began < 60, left
    assert len(workers) >= 3
    assert len(list((made.folder / "scratch").iterdir())) < len(scratch)


def group(number: int) -> list[int]:
    """The processes of a group that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(own) == number and state != "Z":
            found.append(int(path.parent.name))
    return found
