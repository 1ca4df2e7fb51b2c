"""Answers end where they should, and a batch says what each prompt alone would hear."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib.data.formats import Stops
from stages.lib.data.tokens import Tokens
from stages.lib.model.answer import Speaker
from stages.lib.model.said import Ends, Said, answer_of
from stages.lib.model.sampling import GREEDY, Sampling
from stages.lib.run.exits import OutOfMemory

STOP = "### Human:"


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> Tokens:
    return Tokens(tiny)


def stops(tokens: Tokens, *texts: str) -> Stops:
    return Stops(texts, (tokens.eos,))


def ids_of(tokens: Tokens, text: str) -> list[int]:
    return list(tokens.backend.encode(text).ids)


@pytest.mark.case("H6")
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
    found = answer_of(spoken + padding, tokens, stops(tokens, STOP))
    assert (found.text, found.finish) == (text, finish)
    assert found.tokens <= len(spoken)


@pytest.mark.parametrize(
    "said", [" A # B ## C.", " Yes.### Human: And so on", " naïve 日本 😀 done"]
)
def test_a_stream_never_shows_a_stop_mark(tokens: Tokens, said: str) -> None:
    shown: list[str] = []
    spoken = [*ids_of(tokens, said), tokens.eos]
    stream = Said(Ends(tokens, stops(tokens, STOP)), len(spoken), shown.append)
    for token in spoken:
        if not stream.add(token):
            break
    assert "".join(shown) == said.split(STOP)[0].strip()
    assert len(shown) > 1
    assert not any("\ufffd" in part for part in shown)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 50, 0.9, 1.3, seed=7)])
def test_a_batch_says_what_each_prompt_alone_would_hear(
    attach: Callable[..., Any], tokens: Tokens, sampling: Sampling
) -> None:
    tuned = attach()
    prompts = [
        ids_of(tokens, text) for text in ("One", "A much longer prompt than that", "Two words")
    ]
    speaker = Speaker(tuned, "fp32", tokens, stops(tokens, STOP), 6, sampling)
    together = dict(speaker.each(prompts))
    alone = {n: speaker.one(prompt, number=n) for n, prompt in enumerate(prompts)}
    assert together == alone


def test_generation_stops_at_the_next_turn(attach: Callable[..., Any], tokens: Tokens) -> None:
    tuned = attach()
    prompt = ids_of(tokens, "Hello there")
    free = Speaker(tuned, "fp32", tokens, stops(tokens), 12).one(prompt)
    assert free.finish == "length"
    stop = tokens.decode(ids_of(tokens, free.text)[:4])[-3:]
    stopped = Speaker(tuned, "fp32", tokens, stops(tokens, stop), 12).one(prompt)
    assert stopped.finish == "stop"
    assert stopped.tokens < 12
    assert free.text.startswith(stopped.text)


@pytest.mark.case("E4")
def test_where_the_memory_ends_it_says_what_was_answered(
    attach: Callable[..., Any], tokens: Tokens
) -> None:
    speaker = Speaker(attach(), "fp32", tokens, stops(tokens, STOP), 6)
    speaker.decoding = None

    def spill(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 is full.")

    speaker.tuned.get_base_model().model.layers[0].register_forward_pre_hook(spill)
    prompts = [ids_of(tokens, text) for text in ("One", "Two words")]
    words = (
        f"answering 2 prompts, the longest {max(map(len, prompts))} tokens, base in fp32 (Tried to"
    )
    with pytest.raises(OutOfMemory, match=re.escape(words)):
        list(speaker.each(prompts))
