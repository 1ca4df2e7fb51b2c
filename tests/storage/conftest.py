"""A preset of every stage on a tiny model, and what runs commands with it."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forking import Forking, forking
from tests.refusals import write_preset
from tests.storage.mounts import object_store

RECIPE = {
    "MAX_LENGTH": 64, "BASE_PRECISION": "fp32", "LORA_RANK": 4, "LORA_ALPHA": 8, "BATCH_TOKENS": 128,
    "MAX_STEPS": 8, "OPTIMIZER": "adamw_torch", "MAX_NEW_TOKENS": 4, "VALIDATION_FRACTION": 0.1,
}  # fmt: skip
PROMPTS = 6


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that moves the clock of a process whose environment has CLOCK_SHIFT; "" without a compiler."""
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).parent / "clock.c"
    if not shutil.which("cc"):
        return ""
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


@pytest.fixture(scope="module")
def commands(
    tiny: Path, rows: Path, clock: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Forking]:
    """What runs commands beside a preset, `tiny.env`, and prompts in `many.txt`."""
    folder = tmp_path_factory.mktemp("storage")
    write_preset(folder / "tiny.env", BASE_MODEL=tiny, DATASET=rows, **RECIPE)
    (folder / "many.txt").write_text("\n".join(f"Question {n}?" for n in range(PROMPTS)))
    with forking(folder, LD_PRELOAD=clock) as run:
        yield run


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An object store, mounted."""
    with object_store(tmp_path_factory.mktemp("store")) as mount:
        yield mount
