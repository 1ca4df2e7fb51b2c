"""From sums and answers to figures and one sentence."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from stages.lib.model.said import Answer
from stages.lib.report import comparison, gate
from stages.lib.report.comparison import Conversations
from stages.lib.run.exits import GateFailed

QUESTIONS = [
    {"question": f"What is {n}?", "prompt": f"### Human: What is {n}?", "reference": "That."}
    for n in range(4)
]
ENDED, CUT = Answer("It is that.", 4, "stop"), Answer("so " * 20, 20, "length")
SAID = {"base": [CUT, CUT, CUT, ENDED], "tuned": [ENDED, ENDED, ENDED, ENDED]}


class Sums(NamedTuple):
    nll: Any
    hits: Any
    tokens: Any


def rows(count: int, gain: float, seed: int = 0) -> Conversations:
    """Conversations of a row each, from two sources by turns, whose tuned loss is `gain` nats lower."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(10, 300, count)
    nll = tokens * generator.normal(3, 0.2, count)
    sums = {
        "base": Sums(nll, tokens // 4, tokens),
        "tuned": Sums(
            nll - tokens * (gain and generator.normal(gain, 0.1, count)), tokens // 2, tokens
        ),
    }
    return Conversations(sums, np.arange(count) * 7, tokens * 2, np.arange(count) % 2)


def compared(found: Conversations, said: dict[str, list[Answer]] = SAID) -> dict[str, Any]:
    questions = QUESTIONS[: len(said["base"])]
    return comparison.compare(found, ["one", "two"], questions, said, ["###"], 0, {"inputs": {}})


def test_losses_are_ratios_of_sums() -> None:
    found = rows(40, 0.5)
    result = compared(found)
    total = found.tokens.sum()
    assert result["held_out_tokens"] == total
    assert result["held_out_conversations"] == 40
    for side in ("base", "tuned"):
        assert result[side]["loss"] == pytest.approx(found.nll[side].sum() / total)
        low, high = result[side]["loss_interval"]
        assert low < result[side]["loss"] < high
        assert result[side]["perplexity_interval"] == pytest.approx([np.exp(low), np.exp(high)])
        assert result[side]["accuracy"] == found.hits[side].sum() / total
    change = result["difference"]["loss"]
    assert change["value"] == pytest.approx(result["tuned"]["loss"] - result["base"]["loss"])
    assert change["interval"][0] < change["value"] < change["interval"][1] < -0.4
    # Paired: what conversations have in common does not blur it.
    assert change["interval"][1] - change["interval"][0] < 0.1
    assert change["p"] == 1e-4
    assert result["difference"]["accuracy"]["interval"][0] > 0.2


@pytest.mark.case("H8")
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_no_result(side: str, number: float) -> None:
    found = rows(5, 0.5)
    found.nll[side][3] = number
    with pytest.raises(GateFailed, match=f"the {side} model is not finite in 1 of 5"):
        compared(found)


def test_parts_add_up_to_the_whole() -> None:
    result = compared(rows(40, 0.5))
    for name in ("by_source", "by_length"):
        parts = result[name]
        assert len(parts) > 1
        assert sum(part["conversations"] for part in parts) == 40
        assert sum(part["tokens"] for part in parts) == result["held_out_tokens"]
        for side in ("base", "tuned"):
            whole = sum(part[side] * part["tokens"] for part in parts) / result["held_out_tokens"]
            assert whole == pytest.approx(result[side]["loss"])
        for part in parts:
            assert part["difference"] == pytest.approx(part["tuned"] - part["base"])
            assert (part["interval"] is None) == (part["conversations"] < 6)
    assert [part["source"] for part in result["by_source"]] == ["one", "two"]


def test_a_conversation_that_was_split_is_one() -> None:
    one = np.array([1.0, 2.0, 3.0, 4.0])
    tokens, hits = np.array([10, 10, 10, 10]), np.array([1, 2, 3, 4])
    sums = {side: Sums(one, hits, tokens) for side in ("base", "tuned")}
    found = Conversations(
        sums, np.array([5, 5, 2, 9]), np.array([60, 60, 20, 30]), np.array([1, 1, 0, 0])
    )
    assert (len(found), found.rows) == (3, 4)
    assert found.nll["base"].tolist() == [3, 3, 4]
    assert found.hits["tuned"].tolist() == [3, 3, 4]
    assert found.lengths.tolist() == [20, 120, 30]
    assert found.sources.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, (1, 64)), (64, (1, 64)), (65, (65, 128)), (128, (65, 128)), (129, (129, 256)), (4096, (2049, 4096))],
)  # fmt: skip
def test_buckets_of_length(length: int, bucket: tuple[int, int]) -> None:
    ((low, high, chosen),) = comparison.buckets(np.array([length, length]))
    assert (low, high) == bucket
    assert chosen.tolist() == [True, True]


@pytest.mark.parametrize(
    ("count", "gain", "verdict", "begins"),
    [
        (40, 0.5, "better", "The tuned model is better: held-out loss 3.0"),
        (40, -0.5, "worse", "The tuned model is worse: held-out loss 3.0"),
        (40, 0.001, "open", "It cannot be told whether the tuned model is better: "),
        (40, 0, "equal", "The adapter changes nothing: "),
        (2, 0, "equal", "The adapter changes nothing: "),
        (5, 0.5, "open", "5 held-out conversations are too few to tell whether the tuned model is better: "),
        (1, 0.5, "open", "1 held-out conversation is too few to tell"),
        (0, 0, "unmeasured", "Nothing is held out, so no loss was measured; 100% of answers stop by"),
    ],
)  # fmt: skip
def test_verdicts(count: int, gain: float, verdict: str, begins: str) -> None:
    result = compared(rows(count, gain))
    assert result["verdict"] == verdict
    assert result["sentence"].startswith(begins)
    assert result["sentence"].endswith("100% of answers stop by themselves (25% before).")
    assert gate.judge(result, "better")["met"] == (verdict == "better")
    text = json.dumps(result, allow_nan=False)
    assert gate.judge(json.loads(text), "better,loss<9") == json.loads(
        json.dumps(gate.judge(result, "better,loss<9"))
    )


def test_the_sentence_says_how_sure_it_is() -> None:
    assert "(95 %: -0.5" in compared(rows(40, 0.5))["sentence"]
    assert ", p < 0.001), 100% of" in compared(rows(40, 0.5))["sentence"]
    assert compared(rows(40, 0.5), {"base": [], "tuned": []})["sentence"].endswith("p < 0.001).")
    few = compared(rows(5, 0.5))
    assert "95 %" not in few["sentence"]
    assert few["difference"]["loss"]["interval"] is None
    assert few["difference"]["loss"]["p"] == 2 / 32


def test_an_adapter_that_changes_nothing_has_p_1() -> None:
    change = compared(rows(40, 0))["difference"]["loss"]
    assert change == {"value": 0, "interval": (0, 0), "p": 1}


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    texts = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        comparison.write(compared(rows(40, 0.5)), tmp_path / name)
        texts.add((tmp_path / name / "evaluation.json").read_bytes())
    assert len(texts) == 1
    assert comparison.read(tmp_path / "one")["schema"] == comparison.SCHEMA


def test_the_summary_is_the_demos_table() -> None:
    result = compared(rows(40, 0.5))
    losses = [f"{result[side]['loss']:.3f}" for side in ("base", "tuned")]
    assert result["summary"] == [
        ["held-out loss, nats a token", *losses],
        ["answers that stop by themselves", "25%", "100%"],
        ["What is 0?", CUT.text, ENDED.text],
    ]
    shown = comparison.summary_table(result)
    assert losses[0] in shown
    assert "What is 0?" in shown
    result["summary"][2][1] = "\x1b[2Jso"
    assert r"\x1b[2Jso" in comparison.summary_table(result)
    nothing = compared(rows(0, 0), {"base": [], "tuned": []})
    assert nothing["summary"] == []
    assert comparison.summary_table(nothing)
