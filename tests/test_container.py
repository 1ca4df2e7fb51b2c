"""Dockerfile, locks and Makefile agree; what runs in the image itself is `make image-test`."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from stages.lib.run import gpu
from tests.conftest import ROOT
from tests.image import __main__ as image_test
from tests.image import engine

LOCKS = ROOT / "env" / "locks"
VARIANTS = ("cu13", "cu12", "cpu")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PIN = re.compile(r"^([a-z0-9][\w.-]*)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)", re.M)


def pins(path: Path) -> dict[str, str]:
    """Version by package; in a lock each has a hash."""
    found = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[\w,]*\])?==([\w.+]+)", line):
            found[match[1].lower().replace("_", "-")] = match[2]
    return found


@pytest.mark.parametrize("extra", ["", "-eval", "-trackers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lock_has_every_requirement_and_hashes(variant: str, extra: str) -> None:
    path = LOCKS / f"{variant}{extra}.txt"
    locked, text = pins(path), path.read_text()
    hashed = {name: hashes for name, _, hashes in PIN.findall(text)}
    assert locked.keys() == hashed.keys()
    assert all(hashed.values()), [name for name, hashes in hashed.items() if not hashes]
    wanted = pins(ROOT / "requirements.txt")
    wanted |= pins(ROOT / f"requirements{extra}.txt")
    wanted |= pins(LOCKS / f"{variant}.in")
    assert len(wanted) > 15
    assert {name: locked.get(name) for name in wanted} == wanted, "run `make lock`"
    kinds = {re.sub(r".*-(cu\d+)$", r"\1", name) for name in locked if name.startswith("nvidia-")}
    assert {kind for kind in kinds if kind.startswith("cu")} == {variant} - {"cpu"}


def test_the_torch_that_an_old_driver_is_told_to_take_is_locked() -> None:
    for cuda, version in gpu.OTHERS.items():
        assert pins(LOCKS / f"cu{cuda}.txt")["torch"] == version
    assert pins(LOCKS / "cpu.txt")["torch"].partition("+")[0] == pins(LOCKS / "cu13.txt")["torch"]


def made(*words: str) -> str:
    """What make would run."""
    command = ["make", "-n", "--no-print-directory", *words]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout


def test_make_builds_and_runs_the_variants() -> None:
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
    for variant in VARIANTS:
        build = made("docker-build", f"TORCH={variant}", "BUILD_FLAGS=--progress plain")
        given = dict(re.findall(r"--build-arg (\w+)=(\S*)", build))
        assert given.keys() == arguments
        assert given["TORCH"] == variant
        assert bool(given["TORCH_INDEX_URL"]) == (variant == "cpu")
        assert "--progress plain ." in build
        stage = made("evaluate", f"TORCH={variant}", "DOCKER_FLAGS=--network none")
        assert ("--gpus all" in stage) == (variant != "cpu")
        assert "--network none lora-stages --env-file" in stage
    assert "--gpus device=1 " in made("evaluate", "GPUS=device=1")


def test_context_of_the_build_is_a_list_of_what_is_wanted() -> None:
    first, *others = (ROOT / ".dockerignore").read_text().split()
    assert first == "**"
    assert [line for line in others if line.startswith("!")] == [
        "!env/locks/*.txt",
        "!env/*.env",
        "!stages/**",
    ]
    assert others.index("env/secrets.env") > others.index("!env/*.env")


def test_dockerfile_is_clean() -> None:
    command = [ROOT / ".venv/bin/hadolint", ROOT / "Dockerfile"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "--require-hashes" in DOCKERFILE


def test_image_test_says_where_no_engine_can_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setattr(engine, "SOCKET", tmp_path / "neither.sock")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert image_test.main() == 1
    assert "image-test: NOT RUN: no engine runs" in capsys.readouterr().err
