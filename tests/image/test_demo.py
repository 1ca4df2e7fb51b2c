"""The demo in the container, by the targets that a user types: another user, read-only, no network."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.image.conftest import HARD, OTHER_UID, UID, Checkout, docker
from tests.lib.jobs.orders import ODD

PRESET = os.environ.get(
    "IMAGE_TEST_PRESET", "sample"
)  # `smoke` takes a fifth of the time, and learns nothing
GRACE = 30  # seconds, as the batch services have it
NAME = "lora-stages-test-train"

pytestmark = pytest.mark.usefixtures("image")


@pytest.fixture(scope="module")
def run_dir(checkout: Checkout) -> Path:
    return checkout.folder / "runs" / PRESET


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def steps(log: Path) -> int:
    """How many the log tells of."""
    lines = [line for line in log.read_text().splitlines() if '"unit": "steps"' in line]
    return int(json.loads(lines[-1])["done"]) if lines else 0


def test_prepare_data(checkout: Checkout, run_dir: Path) -> None:
    done = checkout.make("prepare-data", f"PRESET={PRESET}")
    assert done.returncode == 0, done.stderr
    assert manifest(run_dir / "data")["metrics"]


def test_train_is_stopped_and_goes_on(checkout: Checkout, run_dir: Path, tmp_path: Path) -> None:
    """`docker stop`, as batch services do: 75 within the grace; the same command goes on from a checkpoint."""
    asked = ("train", f"PRESET={PRESET}", *(["MAX_STEPS=12"] if PRESET == "smoke" else []))
    words = checkout.words(*asked, flags=f"{HARD} --name {NAME}")
    log = tmp_path / "train.log"
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, **checkout.as_user(UID))  # type: ignore[call-overload]
        until = time.monotonic() + 600
        while not list(run_dir.glob("checkpoints/step-*/manifest.json")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        code = subprocess.Popen(["docker", "wait", NAME], stdout=subprocess.PIPE, text=True)
        time.sleep(1)
        began = time.monotonic()
        docker("stop", "--time", GRACE, NAME)
        seconds = time.monotonic() - began
        assert process.wait(GRACE) == 2  # make's own
    assert code.communicate()[0].strip() == "75", log.read_text()
    assert seconds < GRACE
    error = json.loads((run_dir / "error.json").read_text())
    assert (error["code"], error["retryable"]) == ("stopped", True)
    print(f"stopped after {seconds:.1f} s at step {steps(log)}")

    done = checkout.make(*asked)
    assert done.returncode == 0, done.stderr
    adapter = manifest(run_dir / "adapter")
    assert adapter["metrics"]["resumed_from_step"] >= 1
    assert not (run_dir / "error.json").exists()


def test_evaluate(checkout: Checkout, run_dir: Path) -> None:
    """With the gate that asks whether anything was learned, where the preset is for that."""
    gate = ["GATE=better"] if PRESET == "sample" else []
    done = checkout.make("evaluate", f"PRESET={PRESET}", *gate)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "evaluation" / "manifest.json").is_file()


@pytest.mark.case("D10")
def test_prompt_arrives_to_the_letter(checkout: Checkout) -> None:
    """Quotes, a command in both spellings and new lines; by another user than the one who trained."""
    odd = ODD["PROMPT"]
    assert all(part in odd for part in ("\n", "$(touch x)", "`touch y`", '"', "'"))
    given = (f"PRESET={PRESET}", f"PROMPT={odd}", "AS_JSON=1", "MAX_NEW_TOKENS=4")
    for uid in (UID, OTHER_UID):
        done = checkout.make("generate", *given, uid=uid)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["prompt"] == odd
    assert not list(checkout.folder.rglob("[xy]"))


def test_merge(checkout: Checkout, run_dir: Path) -> None:
    done = checkout.make("merge", f"PRESET={PRESET}")
    assert done.returncode == 0, done.stderr
    assert list((run_dir / "merged").glob("*.safetensors"))


def test_what_is_left_is_the_users(run_dir: Path) -> None:
    """Of whoever typed make, in group 0; nothing is root's or the image's."""
    owners = {path.stat().st_uid for path in run_dir.rglob("*")}
    assert owners == {UID if not os.getuid() else os.getuid()}


def test_read_only_run_directory_is_refused(checkout: Checkout) -> None:
    """What cannot be written is said in a sentence, by its code, out of the container too."""
    done = checkout.make(
        "prepare-data", "PRESET=smoke", "RUN_DIR=runs/other", flags=f"{HARD} --user {OTHER_UID}:7"
    )
    assert done.returncode == 2
    assert "Error 73" in done.stderr
