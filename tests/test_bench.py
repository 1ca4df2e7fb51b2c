"""The figures of `bench/` are what the documents say, and what they are said to be."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import evaluate, generate, planning, quality, train
from bench.train_results import SEVEN, merge, operations, table
from stages.lib.model import speed
from stages.lib.report import past

ROOT = Path(__file__).parent.parent
FIELDS = {
    "system", "workload", "tokens_per_second", "peak_gib", "hardware", "versions", "date",
}  # fmt: skip
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
measured = pytest.mark.skipif(
    not train.RESULTS.is_file(), reason="bench/results/train.json has not been measured yet"
)


@measured
def test_results_of_training_have_the_fields_that_readers_rely_on() -> None:
    results = json.loads(train.RESULTS.read_text())
    assert len(results) > 1
    for result in results:
        assert result.keys() >= FIELDS, result["system"]
        assert result["tokens_per_second"] > 0
    keys = [(result["workload"], result["system"]) for result in results]
    assert len(keys) == len(set(keys))


@measured
def test_the_readme_has_the_table_and_the_plot_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert table(json.loads(train.RESULTS.read_text())) in readme
    assert "bench/results/train.svg" in readme


@measured
def test_the_plot_is_that_of_the_results() -> None:
    picture = train.RESULTS.with_suffix(".svg").read_text()
    for result in json.loads(train.RESULTS.read_text()):
        if result["workload"] in train.WORKLOADS and result["workload"] != train.START:
            speed = f">{result['tokens_per_second'] / 1000:.1f}k<"
            assert speed in picture, "run `python -m bench.plot`"


def test_an_fp8_base_costs_what_the_documents_say() -> None:
    results = json.loads(quality.RESULTS.read_text())
    said = quality.table(results)
    assert said in (ROOT / "docs/training.md").read_text()
    more = [line.split("|")[5] for line in said.splitlines() if "| fp8 |" in line]
    assert len(more) == 2
    assert all(float(one) <= 0.025 for one in more)


def test_a_token_of_llama_2_takes_what_was_counted_by_hand() -> None:
    found = operations(LLAMA, "q_proj,v_proj", [2048])
    assert found["frozen"] == pytest.approx(4 * 6.476, rel=1e-3)  # GFLOP for 6.476e9 weights
    assert found["other"] == pytest.approx(4 * 0.1311 + 6 * 0.00839 + 1.879, rel=1e-3)
    every = operations(LLAMA, SEVEN, [2048])
    assert every["other"] - found["other"] == pytest.approx(6 * (0.03998 - 0.00839), rel=1e-3)
    mixed = operations(LLAMA, "q_proj,v_proj", [1024, 3072])  # a token in a longer row costs more
    assert mixed["other"] > found["other"]


def test_what_plan_rests_on_is_what_was_measured() -> None:
    assert json.loads(speed.MEASURED.read_text()) == planning.measured(), "run bench.planning"
    text = planning.PAGE.read_text()
    assert planning.page(text) == text, "run `python -m bench.planning`"
    assert planning.table() in text
    assert planning.gpus() in text
    measured = {(r["tokens_per_second"], r["peak_gib"]) for r in planning.runs()}
    for result in json.loads(train.RESULTS.read_text()):
        own = result["system"].startswith("lora-stages")
        assert ((result["tokens_per_second"], result["peak_gib"]) in measured) == own


def test_the_fit_finds_the_figures_that_made_the_times() -> None:
    """Of runs whose times are made from known figures, so that what it finds can be told right from wrong."""
    made = {"products": 1.25, "layers": 11.0, "adapters": 5.0}
    found = []
    for run in (run for run in planning.runs() if run["gpus"] == 1):
        shape, setup, card, rows, choice = past.of_run(planning.CONFIG, run)
        parts = speed.work(shape, setup, card, rows)
        assert parts
        seconds = sum(n * rate for n, rate in zip(parts, made.values(), strict=True))
        found.append(run | {"tokens_per_second": 1 / (seconds * speed.cost(shape, setup, choice))})
    assert planning.fit(found) == pytest.approx(made, rel=1e-3)


def result(workload: str, system: str, speed: float, **facts: Any) -> dict[str, Any]:
    return {
        "workload": workload,
        "system": system,
        "tokens_per_second": speed,
        "peak_gib": 1,
    } | facts


def test_a_later_call_replaces_its_own_results_and_states_all_shares() -> None:
    order = train.wanted("ceiling,dense", "")
    needs = {"gflop_per_token": {"frozen": 26.0, "other": 2.0}}
    results: list[dict[str, Any]] = []
    for new in (
        result("dense", "Unsloth", 10_000, **needs), result("dense", "lora-stages FP8", 20_000, **needs),
        result("ceiling", "FP8", 1, tflops=1300), result("ceiling", "bf16", 1, tflops=700),
        result("dense", "Unsloth", 12_500, **needs),
    ):  # fmt: skip
        results = merge(results, new, order)
    assert [found["system"] for found in results] == ["bf16", "FP8", "lora-stages FP8", "Unsloth"]
    shares = [found.get("share_of_ceiling") for found in results]
    # 28 GFLOP at 700 TFLOP/s allow 25,000 tokens a second; 26 at 1,300 and 2 at 700, 43,750.
    assert shares == [None, None, pytest.approx(20_000 / 43_750, abs=1e-3), 0.5]
    assert table(results).splitlines()[-1] == "|  | Unsloth | 12,500 | 1.0 | 50% |"


def test_full_rows_are_full_and_none_is_a_duplicate(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"### Human: {n} x"}) + "\n" for n in range(20_000))
    )
    lines = train.write_dense(source, tmp_path / "dense.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == train.DENSE_ROWS
    assert {len(json.loads(line)["text"]) for line in lines} == {10 * train.LENGTH}


def test_rows_of_the_evaluation_have_the_lengths_of_conversations() -> None:
    rows = evaluate.RandomRows(16384 * 12, 2048)
    total = int(rows.lengths.sum())
    assert 16384 * 12 <= total < 16384 * 12 + 2048
    assert 380 < total / len(rows) < 480
    ids, learned = rows[0]
    assert len(ids) == len(learned) == rows.lengths[0]
    assert learned.sum() == rows.trained[0]


def test_the_documents_say_how_fast_answers_come() -> None:
    results = json.loads(generate.RESULTS.read_text())
    said = (ROOT / "docs/generating.md").read_text()
    assert generate.table(results) in said
    one = {r["system"]: r["tokens_per_second"] for r in results if r["workload"] == generate.ONE}
    ratio = one["lora-stages bf16"] / one["transformers, static cache, compiled"]
    assert f"{ratio:.2f}\ntimes a compiled static cache" in said
    assert len({r["hardware"]["gpu"] for r in results}) == 1
