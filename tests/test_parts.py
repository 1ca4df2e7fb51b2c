"""evaluate and merge, killed: what was finished is not done again, and the end is the uninterrupted one's."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forking import Forking, forking, lines
from tests.judge_server import KEY, Endpoint
from tests.refusals import debris, write_preset

RECIPE = {
    "MAX_LENGTH": 64, "BASE_PRECISION": "bf16", "LORA_RANK": 4, "LORA_ALPHA": 8, "BATCH_TOKENS": 128,
    "MAX_STEPS": 2, "OPTIMIZER": "adamw_torch", "VALIDATION_FRACTION": 0.1, "MAX_NEW_TOKENS": 4,
    "EVALUATION_PROMPTS": 2, "LEARNING_RATE": 1, "WARMUP": 0, "RUN_DIR": "run",
}  # fmt: skip
FOLDERS = {"evaluate": "evaluation", "merge": "merged"}


@pytest.fixture(scope="module")
def made(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """A trained run with its evaluation and merged model, and what runs commands beside it."""
    folder = tmp_path_factory.mktemp("parts")
    write_preset(folder / "tiny.env", BASE_MODEL=tiny, DATASET=rows, **RECIPE)
    with forking(folder) as stages:
        for stage in ("prepare-data", "train", *FOLDERS):
            done = stages("--env-file", "tiny.env", stage)
            assert done.returncode == 0, done.stderr
        yield stages


def content(folder: Path) -> dict[str, Any]:
    """What an artifact says, without when and how long."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {key: manifest[key] for key in ("inputs", "settings", "metrics", "files")}


@pytest.mark.case("A2")
@pytest.mark.promise("P2")
@pytest.mark.parametrize("how", ["kill", "term"])
@pytest.mark.parametrize("stage", list(FOLDERS))
def test_a_stopped_one_goes_on_to_the_same_end(made: Forking, stage: str, how: str) -> None:
    target = made.folder / "run" / FOLDERS[stage]
    whole = content(target)
    shutil.rmtree(target)
    finished = 0
    for _ in range(3):
        stopped = made("--env-file", "tiny.env", stage, env={"FAILPOINTS": f"grow.line=2:{how}"})
        if stopped.returncode == 0:
            break
        assert stopped.returncode == (-signal.SIGKILL if how == "kill" else 75), stopped.stderr
        assert not (target / "manifest.json").exists()
        before, finished = finished, len(lines(target.with_suffix(".parts") / "parts.jsonl"))
        assert finished > before
        assert before == 0 or f"going on behind {before} finished parts" in stopped.stderr
    assert finished >= 2
    done = made("--env-file", "tiny.env", stage)
    assert done.returncode == 0, done.stderr
    assert content(target) == whole
    assert debris(made.folder / "run") == []
    assert not list((made.folder / "run").glob("*.parts"))


@pytest.mark.promise("P5")
def test_what_was_finished_with_other_settings_is_not_used(made: Forking) -> None:
    target = made.folder / "run" / "evaluation"
    whole = content(target)
    shutil.rmtree(target)
    args = ("--env-file", "tiny.env", "evaluate")
    stopped = made(*args, "--seed", "5", env={"FAILPOINTS": "grow.line=3:kill"})
    assert stopped.returncode == -signal.SIGKILL
    done = made(*args)
    assert done.returncode == 0, done.stderr
    assert "SEED was 5, is now 0" in done.stderr
    assert content(target) == whole


def test_a_damaged_shard_of_a_stopped_merge_is_made_and_proven_again(made: Forking) -> None:
    target = made.folder / "run" / "merged"
    whole = content(target)
    shutil.rmtree(target)
    args = ("--env-file", "tiny.env", "merge")
    assert made(*args, env={"FAILPOINTS": "grow.line=4:kill"}).returncode == -signal.SIGKILL
    with (target / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\0" * 8)
    done = made(*args)
    assert done.returncode == 0, done.stderr
    assert content(target) == whole


def test_a_gate_that_fails_leaves_nothing_behind(made: Forking) -> None:
    args = ("--env-file", "tiny.env", "merge", "--merge-most-kl", "1e-12", "--run-dir", "other")
    for name in ("data", "adapter"):
        shutil.copytree(made.folder / "run" / name, made.folder / "other" / name)
    done = made(*args)
    assert done.returncode == 82, done.stderr
    left = {path.name for path in (made.folder / "other").iterdir()}
    assert left == {"adapter", "data", "error.json", "attempts"}


def test_a_judge_that_went_away_is_asked_only_what_it_was_not(made: Forking) -> None:
    run = made.folder / "run"
    shutil.rmtree(run / "evaluation")
    env = {"JUDGE_API_KEY": KEY, "FAILPOINTS": "grow.line=6:kill"}
    args = ("--env-file", "tiny.env", "evaluate", "--judge-model", "wise", "--judge-url")
    with Endpoint("first") as server:
        assert made(*args, server.url, env=env).returncode == -signal.SIGKILL
        asked = len(server.asked)
        done = made(*args, server.url, env=env | {"FAILPOINTS": ""})
        assert done.returncode == 0, done.stderr
    result = json.loads((run / "evaluation/evaluation.json").read_text())
    verdicts = result["judge"]["verdicts"]
    assert len(verdicts) == 2
    pairs = sum(pair is not None for pair in verdicts)
    # Both attempts put the question that tries the endpoint; only the second pair is put again.
    assert len(server.asked) - asked < asked or pairs < 2
