"""`evaluate` with benchmarks and a judge: what it leaves, prints and asks, and where no key goes."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forking import run_forked
from tests.judge_server import KEY, Endpoint
from tests.refusals import refused, write_preset

RECIPE = {
    "MAX_LENGTH": 64, "BASE_PRECISION": "fp32", "LORA_RANK": 4, "LORA_ALPHA": 8, "BATCH_TOKENS": 128,
    "MAX_STEPS": 2, "OPTIMIZER": "adamw_torch", "VALIDATION_FRACTION": 0.1, "MAX_NEW_TOKENS": 4,
    "EVALUATION_PROMPTS": 2, "LEARNING_RATE": 1, "WARMUP": 0,
}  # fmt: skip
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: sums/rows.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["one", "two"]
doc_to_target: 1
metric_list: [{metric: acc}]
"""
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def folder(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, a task in a folder of its own, and the judge's key in env/secrets.env."""
    folder = tmp_path_factory.mktemp("judged")
    preset = write_preset(folder / "tiny.env", BASE_MODEL=tiny, DATASET=rows, **RECIPE)
    for stage in ("prepare-data", "train"):
        result = run_forked(folder, "--env-file", preset, stage, "--run-dir", folder / "run")
        assert result.returncode == 0, result.stderr
    (folder / "sums").mkdir()
    (folder / "sums" / "sums.yaml").write_text(TASK)
    lines = [json.dumps({"question": f"{n} and 1?"}) for n in range(5)]
    (folder / "sums" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "env").mkdir()
    (folder / "env" / "secrets.env").write_text(f"JUDGE_API_KEY={KEY}\n")
    return folder


def evaluate(folder: Path, server: Endpoint) -> Result:
    return run_forked(
        folder, "--env-file", folder / "tiny.env", "evaluate", "--run-dir", folder / "run",
        "--benchmarks", "sums/sums.yaml", "--benchmark-limit", "4", "--benchmark-chat",
        "--judge-url", server.url, "--judge-model", "wise",
    )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    with Endpoint("first") as server:
        yield server


def test_a_key_that_is_refused_costs_no_evaluation(folder: Path) -> None:
    with Endpoint("401") as server:
        result = evaluate(folder, server)
    refused(result, 77, "JUDGE_API_KEY", server.url)
    assert KEY not in result.stderr
    assert len(server.asked) == 1
    assert "2 + 2?" in server.asked[0]["messages"][0]["content"]


@pytest.fixture(scope="module")
def evaluated(folder: Path, server: Endpoint) -> Result:
    result = evaluate(folder, server)
    assert result.returncode == 0, result.stderr
    return result


def test_both_are_in_the_evaluation(evaluated: Result, folder: Path, server: Endpoint) -> None:
    found = json.loads((folder / "run" / "evaluation" / "evaluation.json").read_text())
    (score,) = found["benchmarks"]["scores"]
    assert (score["task"], score["documents"]) == ("sums", 4)
    assert (found["benchmarks"]["limit"], found["benchmarks"]["chat"]) == (4, True)
    assert found["judge"]["pairs"] == 2
    asked = [pair for pair in found["judge"]["verdicts"] if pair]
    assert asked, "the adapter changes no answer, so the judge is not asked"
    assert found["judge"]["disagreement_rate"] == 1
    assert len(server.asked) == 1 + 2 * len(asked)
    page = (folder / "run" / "evaluation" / "evaluation.md").read_text()
    assert "## Benchmarks" in page
    assert "| sums | acc ↑ |" in page
    assert "## A judge's opinion" in page
    assert "sums" in evaluated.stdout
    assert "verdict changed with the order" in evaluated.stdout


def test_the_log_is_json_lines(evaluated: Result) -> None:
    lines = [json.loads(line) for line in evaluated.stderr.splitlines()]
    assert {"base", "tuned"} <= {line.get("side") for line in lines}


@pytest.mark.promise("P7")
def test_the_key_is_nowhere(evaluated: Result, folder: Path, server: Endpoint) -> None:
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in evaluated.stdout + evaluated.stderr
    holding = [
        path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    assert holding == [folder / "env" / "secrets.env"]


def test_again_nothing_is_asked(evaluated: Result, folder: Path, server: Endpoint) -> None:
    before = len(server.asked)
    result = evaluate(folder, server)
    assert result.returncode == 0
    assert "nothing changed" in result.stderr
    assert len(server.asked) == before
