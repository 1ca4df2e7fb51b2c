"""Answers end where they should, and a batch says what each prompt alone would hear."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib.data.formats import Stops
from stages.lib.data.tokens import Tokens
from stages.lib.model.answer import Stream, _answer, answer, in_batches

STOP = "### Human:"


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> Tokens:
    return Tokens(tiny)


def stops(tokens: Tokens, *texts: str) -> Stops:
    return Stops(texts, (tokens.eos,))


def ids_of(tokens: Tokens, text: str) -> list[int]:
    return list(tokens.backend.encode(text).ids)


@pytest.mark.parametrize(
    ("said", "ends", "text", "finish"),
    [
        (" Yes.", True, "Yes.", "stop"),
        (" Yes.", False, "Yes.", "length"),
        (" Yes.### Human: And", False, "Yes.", "stop"),
        ("", True, "", "stop"),
    ],
)
def test_how_an_answer_ends(tokens: Tokens, said: str, ends: bool, text: str, finish: str) -> None:
    spoken = ids_of(tokens, said) + [tokens.eos] * ends
    padding = [tokens.pad] * 30 if finish == "stop" else []
    found = _answer(spoken + padding, tokens, stops(tokens, STOP))
    assert (found.text, found.finish) == (text, finish)
    assert found.tokens <= len(spoken)


@pytest.mark.parametrize(
    "said", [" A # B ## C.", " Yes.### Human: And so on", " naïve 日本 😀 done"]
)
def test_a_stream_never_shows_a_stop_mark(tokens: Tokens, said: str) -> None:
    shown: list[str] = []
    stream = Stream(tokens, [STOP], shown.append)
    stream.put(torch.tensor([ids_of(tokens, "a prompt")]))
    for token in ids_of(tokens, said):
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(shown) == said.split(STOP)[0].strip()
    assert len(shown) > 1
    assert not any("\ufffd" in part for part in shown)


def test_a_batch_says_what_each_prompt_alone_would_hear(
    attach: Callable[..., Any], tokens: Tokens
) -> None:
    tuned = attach()
    prompts = [
        ids_of(tokens, text) for text in ("One", "A much longer prompt than that", "Two words")
    ]
    together = in_batches(tuned, tokens, "fp32", prompts, stops(tokens, STOP), 6, size=3)
    alone = [
        answer(tuned, tokens, "fp32", [prompt], stops(tokens, STOP), 6)[0] for prompt in prompts
    ]
    assert together == alone


def test_generation_stops_at_the_next_turn(attach: Callable[..., Any], tokens: Tokens) -> None:
    tuned = attach()
    prompt = ids_of(tokens, "Hello there")
    free = answer(tuned, tokens, "fp32", [prompt], stops(tokens), 12)[0]
    assert free.finish == "length"
    stop = tokens.decode(ids_of(tokens, free.text)[:4])[-3:]
    stopped = answer(tuned, tokens, "fp32", [prompt], stops(tokens, stop), 12)[0]
    assert stopped.finish == "stop"
    assert stopped.tokens < 12
    assert free.text.startswith(stopped.text)
