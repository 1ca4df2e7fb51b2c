"""What is learned of the GPU before torch is imported, from a driver's library and a wheel that are files."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.lib.run import exits, gpu, gpu_errors
from stages.lib.run.exits import TryAgain
from tests import drivers
from tests.conftest import ROOT

PROGRAM = """
import json, sys
from stages.lib.run import gpu
precision, promised = json.loads(sys.argv[1])
print(json.dumps([check.facts() for check in gpu.checks(precision, promised)]))
"""
Facts = dict[str, dict[str, Any]]
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="NOT TESTED: no gcc for a library")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drivers.driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for name, cuda in (("cu130", "13.0"), ("cu128", "12.8"), ("cpu", None)):
        drivers.wheel(folder / name, cuda)
    return folder


def checks(
    wheel: Path,
    driver: Path | None,
    precision: str | None = "bf16",
    promised: bool = False,
    **env: str,
) -> Facts:
    """The checks by name, made in a process that has this wheel and driver."""
    places = {"PYTHONPATH": f"{wheel}:{ROOT}", "PATH": os.environ["PATH"]}
    library = {"LD_LIBRARY_PATH": str(driver)} if driver else {}
    asked = json.dumps([precision, promised])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked], env=places | library | env, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return {facts["name"]: facts for facts in json.loads(done.stdout)}


def states(found: Facts) -> dict[str, str]:
    return {name: facts["state"] for name, facts in found.items()}


@needs_gcc
@pytest.mark.case("E1")
def test_gpu_that_fits(wheels: Path, driver: Path) -> None:
    found = checks(wheels / "cu130", driver, "fp8", True)
    assert set(states(found).values()) == {"ok"}
    assert found["GPU"]["found"].count("Fake GPU, 80 GiB, compute capability 9.0") == 2
    assert "580.65.06 serves CUDA 13.0" in found["driver"]["found"]


@needs_gcc
@pytest.mark.case("E1")
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"FAKE_COUNT": "0"}, "a driver and no GPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides every GPU, of 2; unset it"),
        ({"CUDA_VISIBLE_DEVICES": "7"}, "CUDA_VISIBLE_DEVICES='7' hides every GPU"),
        ({"FAKE_INIT": "9"}, "Driver Not Loaded"),
    ],
)
def test_no_gpu_is_told_by_its_cause(
    wheels: Path, driver: Path, env: dict[str, str], words: str
) -> None:
    found = checks(wheels / "cu130", driver, **env)["GPU"]
    assert (found["state"], found["exit"]) == ("warn", 0)
    assert words.removeprefix("a ") in f"{found['found']}; {found['remedy']}"
    promised = checks(wheels / "cu130", driver, promised=True, **env)["GPU"]
    assert promised["exit"] == 75
    assert "EXPECT_GPU" in promised["found"]


@pytest.mark.case("E1")
def test_no_driver_and_no_wheel_for_it(wheels: Path) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver")
    found = checks(wheels / "cu130", None)["GPU"]
    assert found["state"] == "warn"
    assert "--gpus all" in found["remedy"]
    assert checks(wheels / "cu130", None, promised=True)["GPU"]["exit"] == 75
    assert checks(wheels / "cpu", None)["GPU"]["state"] == "ok"
    cpu_only = checks(wheels / "cpu", None, promised=True)["GPU"]
    assert cpu_only["exit"] == 78
    assert "CPU alone" in cpu_only["found"]


@needs_gcc
@pytest.mark.case("E1")
def test_wheel_for_the_cpu_beside_a_gpu(wheels: Path, driver: Path) -> None:
    found = checks(wheels / "cpu", driver)["GPU"]
    assert found["state"] == "warn"
    assert "Fake GPU stays idle" in found["found"]


@needs_gcc
@pytest.mark.case("E2")
def test_driver_that_is_too_old(wheels: Path, driver: Path) -> None:
    old = {"FAKE_DRIVER": "550.54.15", "FAKE_CUDA": "12040"}
    found = checks(wheels / "cu130", driver, **old)["driver"]
    assert found["exit"] == 78
    for word in ("550.54.15", "CUDA 12.4", "CUDA 13.0", "580"):
        assert word in found["found"]
    remedy = checks(wheels / "cu130", driver, **old)["driver"]["remedy"]
    assert "TORCH=cu12" in remedy
    assert "torch 2.10.0" in remedy
    ancient = {"FAKE_DRIVER": "470.82.01", "FAKE_CUDA": "11040"}
    assert checks(wheels / "cu130", driver, **ancient)["driver"]["remedy"] == "update the driver"
    # A newer minor version of CUDA is served by an older driver of the same major one.
    assert checks(wheels / "cu128", driver, **old)["driver"]["state"] == "ok"


@needs_gcc
@pytest.mark.case("E3")
def test_gpu_that_cuda_no_longer_knows(wheels: Path, driver: Path) -> None:
    found = checks(wheels / "cu130", driver, "fp32", FAKE_CAPABILITY="70")["capability"]
    assert found["exit"] == 78
    assert "7.0" in found["found"]
    assert "7.5" in found["found"]
    assert "TORCH=cu12" in found["remedy"]
    older = checks(wheels / "cu130", driver, "fp32", FAKE_CAPABILITY="61")["capability"]
    assert older["remedy"] == "use a newer GPU"
    assert checks(wheels / "cu128", driver, "fp32", FAKE_CAPABILITY="70")["capability"]["exit"] == 0


@needs_gcc
@pytest.mark.case("D9")
@pytest.mark.parametrize(
    ("precision", "capability", "code"),
    [
        ("bf16", "75", 78), ("nf4", "75", 78), ("fp32", "75", 0), ("auto", "75", 0), ("bf16", "80", 0),
        ("fp8", "86", 78), ("fp8", "89", 0), (None, "75", 0),
    ],
)  # fmt: skip
def test_precision_that_the_gpu_lacks(
    wheels: Path, driver: Path, precision: str | None, capability: str, code: int
) -> None:
    found = checks(wheels / "cu130", driver, precision, FAKE_CAPABILITY=capability)
    assert found.get("precision", {"exit": 0})["exit"] == code


@needs_gcc
@pytest.mark.case("E12")
def test_others_on_the_gpu(wheels: Path, driver: Path) -> None:
    found = checks(wheels / "cu130", driver, FAKE_FREE="30")["its memory"]
    assert found["state"] == "warn"
    assert "others have 50.0 of the 80.0 GiB of GPU 0" in found["found"]


@needs_gcc
def test_chosen_gpus(wheels: Path, driver: Path) -> None:
    def chosen(said: str) -> int:
        return checks(wheels / "cu130", driver, CUDA_VISIBLE_DEVICES=said)["GPU"]["found"].count(
            "Fake"
        )

    assert [chosen(said) for said in ("0", "GPU-bbbb", "0,1", "1,9,0", "MIG-x")] == [1, 1, 2, 1, 1]


@needs_gcc
@pytest.mark.case("E9")
@pytest.mark.parametrize(("variable", "code", "exits"), [
    ("FAKE_INIT", 15, 75), ("FAKE_HANDLE", 15, 75), ("FAKE_INIT", 18, 78),
])  # fmt: skip
def test_gpu_that_is_lost_at_the_start(
    wheels: Path, driver: Path, variable: str, code: int, exits: int
) -> None:
    """Torch would compute on the CPU, and not say so."""
    found = checks(wheels / "cu130", driver, **{variable: str(code)})["GPU"]
    assert found["exit"] == exits


@needs_gcc
@pytest.mark.case("E11")
def test_no_compiler(wheels: Path, driver: Path, tmp_path: Path) -> None:
    found = checks(wheels / "cu130", driver, PATH=str(tmp_path))
    assert found["compiler"]["exit"] == 78
    assert "CC" in found["compiler"]["remedy"]
    named = checks(wheels / "cu130", driver, PATH=str(tmp_path), CC=str(shutil.which("gcc")))
    assert named["compiler"]["state"] == "ok"
    assert "compiler" not in checks(wheels / "cu130", driver, None, PATH=str(tmp_path))


class AcceleratorError(RuntimeError):
    """Named as torch's own, whose constructor needs a GPU."""


@pytest.mark.case("E9")
@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (
            AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might"),
            True,
        ),
        (AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("No CUDA GPUs are available"), True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
        (AcceleratorError("CUDA error: device-side assert triggered"), False),
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: unspecified launch failure"), False),
        (RuntimeError("unknown error"), False),
    ],
)
def test_errors_of_a_lost_gpu(error: Exception, is_lost: bool) -> None:
    assert bool(gpu_errors.lost(error)) == is_lost
    known = exits.classify(error)
    assert isinstance(known, TryAgain) == is_lost
    if is_lost:
        assert known
        assert known.exit_code == 75
        assert str(error).splitlines()[0] in known.message


@pytest.mark.case("E9")
def test_lost_gpu_below_another_error() -> None:
    error = KeyError("state")
    error.__cause__ = AcceleratorError("CUDA error: unspecified launch failure")
    assert isinstance(exits.classify(error), TryAgain)


def test_installed_wheel_is_read_as_torch_says_it() -> None:
    spec = importlib.util.find_spec("torch")
    assert spec
    assert spec.origin
    said = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    found = gpu.wheel()
    assert (gpu.dotted(found) if found else None) == said
