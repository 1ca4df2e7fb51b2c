"""What the tests share: the command line as a subprocess, a tiny real model, and real rows."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.forking import Forking

pytest_plugins = ["tests.counting"]
ROOT = Path(__file__).parent.parent
REAL_ROWS = ROOT.parent / "shared" / "data" / "oasst-guanaco.jsonl"
# Two tests run at a time (see the Makefile): threads for tiny tensors would wait for each other, by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
Stages = Callable[..., "subprocess.CompletedProcess[str]"]


def clean_environment(folder: Path) -> dict[str, str]:
    """An environment without settings, its hub cache and scratch in `folder`."""
    kept = {
        name: os.environ[name]
        for name in ("PATH", "HOME", "LANG", "XDG_CACHE_HOME", "OMP_NUM_THREADS")
        if name in os.environ
    }
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return kept | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "hub"),
        "SCRATCH_DIR": str(scratch),
    }


def run_stages(
    folder: Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = "",
) -> "subprocess.CompletedProcess[str]":
    """`python -m stages ARGS` in a clean environment."""
    return subprocess.run(
        [sys.executable, "-m", "stages", *map(str, args)],
        env=clean_environment(folder) | dict(env or {}),
        cwd=cwd or folder,
        input=stdin,
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    """Run a command in this test's own folder."""
    return lambda *args, **options: run_stages(tmp_path, *args, **options)


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """The embedded model, converted into the user's cache."""
    from stages.lib.model import sample

    # The first time it takes 20 s of a core, which two workers need not both spend.
    with (Path(tempfile.gettempdir()) / "lora-stages-tests.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sample.folder()


@pytest.fixture(scope="session")
def tiny(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(sample_model).save_pretrained(folder)
    return folder


@pytest.fixture
def other_tiny(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model as a later commit would have it."""
    folder = shutil.copytree(tiny, tmp_path / "other_tiny")
    (folder / "generation_config.json").write_text('{"max_length": 7}')
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows in the guanaco shape, of varied length, some with several turns."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in range(40):
            text = f"### Human: What is {n} and {n}?### Assistant: {'It is ' * (n % 7 + 1)}{2 * n}."
            if n % 3 == 0:
                text += f"### Human: Why, ünïcode?### Assistant: Because {n} + {n} = {2 * n}."
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def few(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Forking]":
    """A server of commands whose folder holds `prepared`, of 22 short rows, two of them held out."""
    from tests.forking import forking

    folder = tmp_path_factory.mktemp("few")
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(22):
            text = f"### Human: {'And ' * (n % 5)}{n}?### Assistant:{' yes' * (n % 3 + 1)}"
            file.write(json.dumps({"text": text}) + "\n")
    with forking(folder) as cli:
        data = {"DATASET": "rows.jsonl", "MAX_LENGTH": "64", "VALIDATION_FRACTION": "0.1"}
        done = cli("prepare-data", env=data | {"BASE_MODEL": str(tiny), "RUN_DIR": "prepared"})
        assert done.returncode == 0, done.stderr
        yield cli
