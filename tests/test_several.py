"""Two processes on the CPU are one: in what they learn, in how they end, and in who goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from stages.lib.run.fields import MEASURED
from tests.conftest import clean_environment
from tests.forking import Forking

# Packed, with dropout; three bins a step, which two processes share unevenly; two steps an epoch.
RECIPE = {
    "BASE_PRECISION": "bf16", "LORA_RANK": "4", "LORA_DROPOUT": "0.1", "LEARNING_RATE": "1e-2",
    "OPTIMIZER": "adamw_8bit", "MICRO_BATCH_TOKENS": "48", "BATCH_TOKENS": "144", "EPOCHS": "3",
}  # fmt: skip
TOLERANCE = 1e-6  # of losses in nats and of weights; sums are made in another order


class Two:
    """Runs of one recipe, in one process and in two."""

    def __init__(self, cli: Forking, base: Path) -> None:
        self.cli, self.folder = cli, cli.folder
        self.base = {"BASE_MODEL": str(base)} | RECIPE

    def begin(self, name: str) -> Path:
        return shutil.copytree(self.folder / "prepared", self.folder / name)

    def alone(self, run: Path, **changed: str) -> Any:
        return self.cli("train", env=self.base | {"RUN_DIR": str(run)} | changed)

    def start(self, run: Path, **changed: str) -> "subprocess.Popen[str]":
        env = clean_environment(self.folder) | self.base | {"RUN_DIR": str(run), "NUM_GPUS": "2"}
        return subprocess.Popen(
            [sys.executable, "-m", "stages", "train"], env=env | changed, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def train(self, run: Path, **changed: str) -> Any:
        began = time.monotonic()
        process = self.start(run, **changed)
        out, err = process.communicate(timeout=120)
        assert time.monotonic() - began < 60 + 30, "it ends within a minute of what happened"
        return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.fixture(scope="module")
def two(few: Forking, tiny: Path) -> Two:
    found = Two(few, tiny)
    done = found.alone(found.begin("whole"))
    assert done.returncode == 0, done.stderr
    return found


def metrics(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "adapter" / "manifest.json").read_text())["metrics"])


def error(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "error.json").read_text()))


def check_same(run: Path, whole: Path) -> None:
    """The same losses, and the same adapters, within tolerance."""
    one, other = metrics(run), metrics(whole)
    histories = [
        [{n: v for n, v in entry.items() if n not in MEASURED} for entry in each["history"]]
        for each in (one, other)
    ]
    for ours, theirs in zip(*histories, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE, rel=1e-4)
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        ours, theirs = (load_file(folder / "adapter" / name) for folder in (run, whole))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key] - tensor).abs().max() <= TOLERANCE, key


def test_a_killed_process_ends_all_and_the_same_command_goes_on_to_one_process_s_adapter(
    two: Two,
) -> None:
    """Whole on each before, in parts on both after: how the base lies is no part of what a run is."""
    run = two.begin("killed")
    done = two.train(run, FAILPOINTS="train.bin=8:kill@1")
    assert done.returncode == 75, done.stderr
    assert "1 of 2 processes were killed or lost" in done.stderr
    assert error(run)["exit"] == 75
    assert not (run / "holder.json").exists()
    done = two.train(run, SHARDING="full")
    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stderr
    assert metrics(run)["gpus"] == 2
    assert metrics(run)["base_bytes_here"] < 0.53 * metrics(run)["base_bytes"]
    assert not (run / "error.json").exists()
    check_same(run, two.folder / "whole")
    done = two.train(run)
    assert "nothing changed" in done.stderr
    assert "starting" not in done.stderr


@pytest.mark.sweep
def test_a_process_that_is_killed_with_its_part_of_the_base_ends_all(two: Two) -> None:
    run = two.begin("part")
    done = two.train(run, FAILPOINTS="train.bin=8:kill@1", SHARDING="full")
    assert done.returncode == 75, done.stderr
    assert error(run)["exit"] == 75
    assert "Traceback" not in done.stderr
    done = two.train(run)
    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stderr
    check_same(run, two.folder / "whole")


@pytest.mark.sweep
@pytest.mark.parametrize("precision", ["fp8", "nf4", "int8"])
def test_parts_of_a_quantised_base_train_as_the_whole(two: Two, precision: str) -> None:
    changed = {"BASE_PRECISION": precision, "RECOMPUTE": "all", "SHARDING": "full"}
    whole, parts = two.begin(f"whole {precision}"), two.begin(f"parts {precision}")
    assert two.alone(whole, **changed).returncode == 0
    done = two.train(parts, **changed)
    assert done.returncode == 0, done.stderr
    assert metrics(parts)["sharding"] == "full"
    check_same(parts, whole)


@pytest.mark.sweep
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_process_that_is_asked_to_stop_stops_all_and_one_process_goes_on(
    two: Two, sharding: str
) -> None:
    run = two.begin(f"asked {sharding}")
    done = two.train(run, FAILPOINTS="train.bin=5:term@1", SHARDING=sharding)
    assert done.returncode == 75, done.stderr
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000002"]
    done = two.alone(run)
    assert done.returncode == 0, done.stderr
    assert metrics(run)["resumed_from_step"] == 2
    check_same(run, two.folder / "whole")


@pytest.mark.sweep
def test_three_processes_go_on_where_one_was_stopped(two: Two) -> None:
    run = two.begin("grown")
    assert two.alone(run, FAILPOINTS="train.bin=7:term").returncode == 75
    done = two.train(run, NUM_GPUS="3")
    assert done.returncode == 0, done.stderr
    assert metrics(run)["resumed_from_step"] == 2
    check_same(run, two.folder / "whole")


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_one_that_was_called_stops_all(two: Two, number: int) -> None:
    run = two.begin(f"signal {number}")
    process = two.start(run, EPOCHS="500")
    until = time.monotonic() + 60
    while not (run / "attempts").is_dir() or "holder.json" not in os.listdir(run):
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(5)  # while the libraries are read, or in the first steps
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert error(run)["code"] == "stopped"
    assert not (run / "holder.json").exists()


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"MICRO_BATCH_TOKENS": "144"}, 2, "BATCH_TOKENS 144 has no pass of 144 tokens for each of 2"),
        ({"FAILPOINTS": "publish.file=1:ENOSPC"}, 73, "No space left"),
        ({"FAILPOINTS": "checkpoint.save=1:EIO"}, 75, "the volume failed"),
        ({"FAILPOINTS": "train.bin=2:ENOSPC@1"}, 73, "No space left"),
        ({"LEARNING_RATE": "1e38", "MAX_GRAD_NORM": "1e38"}, 80, "not finite"),
    ],
)  # fmt: skip
def test_what_one_process_ends_with_is_the_exit_code(
    two: Two, request: pytest.FixtureRequest, changed: dict[str, str], code: int, words: str
) -> None:
    run = two.begin(request.node.name.replace("/", "-"))
    done = two.train(run, **changed)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert error(run)["exit"] == code


@pytest.mark.sweep
def test_a_process_that_hangs_ends_all(two: Two) -> None:
    run = two.begin("hangs")
    began = time.monotonic()
    done = two.train(run, FAILPOINTS="train.bin=8:hang@1", STALL_MINUTES="0.1")
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - began < 90


@pytest.mark.sweep
def test_processes_whose_starter_was_killed_stop_by_themselves(two: Two) -> None:
    run = two.begin("orphans")
    process = two.start(run, EPOCHS="500")
    while not (run / "checkpoints").exists():
        time.sleep(0.1)
        assert process.poll() is None
    holder = json.loads((run / "holder.json").read_text())
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while (run / "holder.json").exists():
        assert time.monotonic() < until
        time.sleep(0.2)
    while Path(f"/proc/{holder['pid']}").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
