"""A judge's verdicts, from a real server that behaves well or badly, with a key that must not be seen."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stages.lib.report import judge
from stages.lib.report.judge import Judge
from stages.lib.run import preemption
from stages.lib.run.exits import BadSetting, NoPermission, StageError, TryAgain
from tests.judge_server import KEY, Endpoint


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start an endpoint in a mood."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    started: list[Endpoint] = []

    def start(mood: str, **more: Any) -> Endpoint:
        started.append(Endpoint(mood, **more))
        return started[-1].__enter__()

    yield start
    for server in started:
        server.__exit__()


def pair(base: str, tuned: str, reference: str | None = None) -> dict[str, Any]:
    return {
        "question": "Why {so}?", "prompt": "", "reference": reference,
        "base": {"text": base}, "tuned": {"text": tuned},
    }  # fmt: skip


PAIRS = [
    pair("bad", "good"), pair("bad", "good one", "42"), pair("good", "bad"), pair("bad", "worse"),
    pair("same", "same"),
]  # fmt: skip


def test_a_judge_that_looks_at_the_answers(serve: Any) -> None:
    server = serve("content")
    result = judge.ask(Judge(server.url, "wise"), PAIRS)
    counts = ("pairs", "identical", "wins", "ties", "losses", "disagreed", "unusable")
    assert [result[name] for name in counts] == [5, 1, 2, 1, 1, 0, 0]
    assert result["disagreement_rate"] == 0
    assert result["win_rate"] == pytest.approx(2 / 3)
    assert result["verdicts"] == [
        ["tuned", "tuned"], ["tuned", "tuned"], ["base", "base"], ["tie", "tie"], None,
    ]  # fmt: skip
    assert result["model"] == "wise"
    assert len(server.asked) == 8, "the same text twice is nothing to judge"
    assert set(server.paths) == {"/v1/chat/completions"}
    first, swapped = (asked["messages"][0]["content"] for asked in server.asked[:2])
    assert first.index("\nbad\n") < first.index("\ngood\n")
    assert swapped.index("\ngood\n") < swapped.index("\nbad\n")
    assert "Why {so}?" in first
    assert "reference" not in first
    assert "\n42\n" in server.asked[2]["messages"][0]["content"]
    assert server.asked[0]["temperature"] == 0
    assert server.asked[0]["seed"] == 0
    assert server.asked[0]["model"] == "wise"
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(result, allow_nan=False)


def test_a_judge_that_prefers_a_place(serve: Any) -> None:
    result = judge.ask(Judge(serve("first").url, "biased"), PAIRS)
    assert result["disagreement_rate"] == 1
    assert (result["wins"], result["ties"], result["losses"]) == (0, 0, 0)
    assert result["win_rate"] is None
    assert result["interval"] is None
    assert (judge.WIN_RATE, None) in judge.shown(result)["rows"]


def test_a_judge_that_says_something_else(serve: Any) -> None:
    server = serve("words", reply="Both answers are good, A even more so.")
    result = judge.ask(Judge(server.url, "chatty"), PAIRS)
    assert (result["unusable_replies"], result["unusable"]) == (8, 4)
    assert (result["wins"], result["ties"], result["losses"]) == (0, 0, 0)
    assert result["disagreement_rate"] is None


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("A", "a"), (" b.\n", "b"), ("**Tie**", "tie"), ('{"verdict": "B"}', "b"), ('"A"', "a"),
        ("<think>A or B? B.</think>\n\nA", "a"), ("`tie`", "tie"),
        ("", None), ("A or B", None), ("A B", None), ("Answer A", None), ("C", None), ("ab", None),
        ("A is better", None), ("<think>A", None), ("neither", None),
    ],
)  # fmt: skip
def test_a_verdict_is_one_word(reply: str, found: str | None) -> None:
    assert judge.verdict(reply) == found


@pytest.mark.parametrize(
    ("wins", "of", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 5, 0.0, 0.4345), (5, 5, 0.5655, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_interval(wins: int, of: int, low: float, high: float) -> None:
    """Against the tables of Wilson's interval."""
    assert judge.interval(wins, of) == pytest.approx((low, high), abs=1e-4)


def test_it_waits_when_told_to(serve: Any) -> None:
    server = serve("busy", failures=2)
    before = time.monotonic()
    assert judge.ask(Judge(server.url, "busy"), PAIRS[:1])["wins"] == 1
    assert len(server.asked) == 4
    assert 0.4 <= time.monotonic() - before < 3


def test_what_an_endpoint_refuses_is_left_out(serve: Any) -> None:
    server = serve("picky")
    result = judge.ask(Judge(server.url, "picky"), PAIRS[:1])
    assert result["wins"] == 1
    assert "temperature" not in result["sampling"]
    assert len(server.asked) == 3


FAILURES = [
    ("401", NoPermission, "JUDGE_API_KEY"), ("403", NoPermission, "JUDGE_API_KEY"),
    ("404", BadSetting, "JUDGE_MODEL"), ("400", BadSetting, "JUDGE_MODEL"),
    ("307", BadSetting, "JUDGE_URL"), ("page", BadSetting, "JUDGE_URL"),
    ("500", TryAgain, "status 500"), ("429", TryAgain, "status 429"), ("hangs", TryAgain, "did not answer"),
]  # fmt: skip


@pytest.mark.parametrize(("mood", "kind", "word"), FAILURES, ids=[f[0] for f in FAILURES])
def test_failures_are_told_apart(
    serve: Any, mood: str, kind: type[StageError], word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve(mood)
    with pytest.raises(kind, match=word) as caught:
        judge.ask(Judge(server.url, "any", timeout=0.3, retries=1), PAIRS)
    assert KEY not in str(caught.value.format_message())
    assert len(server.asked) == (2 if kind is TryAgain else 1)
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err


def test_nobody_there() -> None:
    with Endpoint() as server:
        url = server.url
    with pytest.raises(TryAgain, match="did not answer"):
        judge.ask(Judge(url, "any", retries=0), PAIRS)


def test_without_a_key(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(NoPermission, match="set JUDGE_API_KEY"):
        judge.appoint(serve("401").url, "any")


def test_a_key_that_no_header_takes(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "clé")
    with pytest.raises(NoPermission, match="JUDGE_API_KEY"):
        judge.appoint(serve("content").url, "any")


def test_a_judge_is_tried_before_anything_long(serve: Any) -> None:
    server = serve("content")
    assert judge.appoint(server.url, "any") is not None
    assert len(server.asked) == 1
    assert judge.appoint(None, None) is None


def test_a_stop_signal_is_no_failure_of_the_network(serve: Any) -> None:
    """The client takes what is raised within it for one, and would try again."""
    server = serve("500")
    server.then = lambda: preemption.request("stopped by SIGTERM")
    try:
        with pytest.raises(TryAgain, match="stopped by SIGTERM"):
            judge.ask(Judge(server.url, "any", retries=1), PAIRS)
    finally:
        preemption.listen()
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "model", "answers", "word"),
    [
        ("http://a/v1", None, True, "JUDGE_MODEL is not"),
        (None, "m", True, "JUDGE_URL is not"),
        ("localhost:80/v1", "m", True, "https://HOST/v1"),
        ("http://a:b/v1", "m", True, "https://HOST/v1"),
        (f"https://me:{KEY}@a/v1", "m", True, "JUDGE_API_KEY"),
        (f"https://a/v1?key={KEY}", "m", True, "JUDGE_API_KEY"),
        ("http://a/v1", "m", False, "EVALUATION_PROMPTS"),
    ],
)
def test_settings_that_reach_no_judge(
    url: str | None, model: str | None, answers: bool, word: str
) -> None:
    with pytest.raises(BadSetting, match=word) as caught:
        judge.check_settings(url, model, answers)
    assert KEY not in caught.value.format_message()


def test_no_judge_is_no_mistake() -> None:
    judge.check_settings(None, None, False)


def test_what_people_read(serve: Any) -> None:
    result = judge.ask(Judge(serve("content").url, "wise"), PAIRS)
    assert "tuned is better" in judge.table_of(result)
    page = judge.shown(result)
    assert ("tuned is better", 2) in page["rows"]
    assert ("  disagreement rate", 0) in page["rows"]
    assert "wise" in page["note"]
    assert KEY not in str(page)
