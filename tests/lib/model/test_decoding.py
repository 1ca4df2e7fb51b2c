"""Our decoder says what transformers says: token for token in fp32, and in any batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from stages.lib.data.formats import Stops
from stages.lib.model import decoding, fp8
from stages.lib.model.answer import Speaker
from stages.lib.model.decoder import Decoder, logits_of
from stages.lib.model.sampling import GREEDY, Sampling
from stages.lib.model.steps import Free
from tests.decoders import PLAIN, QUICK, WORDS, error, exact_twin, make
from tests.lib.model.test_int8 import convert as in_int8
from tests.lib.model.test_nf4 import convert as in_nf4

FAMILIES = ("llama2", "llama3", "smollm", "mistral", "qwen2", "qwen3")
NEW = 9
PROMPTS = [[5, 9, 3], [7] * 11, [100, 4], [64, 65, 66, 67], [90], [3, 4, 5, 6, 7, 8]]


@dataclass
class Numbers:
    """A tokenizer whose texts are the ids themselves."""

    pad: int = 0

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def speaker(tuned: Any, precision: str = "fp32", how: Sampling = GREEDY, **given: Any) -> Speaker:
    return Speaker(tuned, precision, Numbers(), Stops((), (WORDS,)), NEW, how, **given)


def said(one: Speaker, adapted: bool = True) -> list[str]:
    found = dict(one.each(PROMPTS, adapted=adapted))
    return [found[place].text for place in range(len(PROMPTS))]


def wanted(tuned: Any, **given: Any) -> list[str]:
    """transformers' own greedy answers, each prompt alone."""
    tuned.eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=tuned.device)
        out = tuned.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
            min_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **given,
        )  # fmt: skip
        found.append(Numbers().decode(out[0, len(prompt) :].tolist()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_transformers_says(family: str) -> None:
    tuned = make(QUICK[family] | {"sliding_window": 64})
    with tuned.disable_adapter():
        base = wanted(tuned)
    own = wanted(tuned)
    assert own != base
    one = speaker(tuned)
    assert one.decoding
    assert not one.remarks
    assert said(one) == own
    assert said(one, adapted=False) == base
    assert said(one) == own
    assert wanted(tuned) == own  # the modules still hold what they held


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("o_proj", "up_proj")])
def test_whatever_the_adapter_is_on(targets: Any) -> None:
    tuned = make(QUICK["llama3"], targets=targets)
    one = speaker(tuned)
    assert one.decoding
    assert said(one) == wanted(tuned)


def test_biases_are_added() -> None:
    tuned = make(QUICK["llama2"] | {"attention_bias": True, "mlp_bias": True})
    one = speaker(tuned)
    assert one.decoding
    assert said(one) == wanted(tuned)


def held_against_plain(one: Speaker, exact: Any) -> None:
    """The decoder's logits are as close to fp64 as those of the model itself are."""
    assert one.decoding, one.remarks
    decoder = one.decoding.decoder
    ids = torch.arange(3, 3 + decoding.PROBE, device=decoder.place)
    true = logits_of(exact, "fp32", ids)[-2:]
    plain = logits_of(one.tuned, one.precision, ids)[-2:]
    decoder.switch(adapted=True)
    with torch.no_grad():
        found = decoding.of_text(decoder, ids)
    assert error(found, true) < 1.3 * error(plain, true)


@pytest.mark.parametrize(
    ("precision", "convert"), [("nf4", in_nf4), ("fp8", fp8.convert), ("int8", in_int8)]
)
def test_a_base_in_few_bits(precision: str, convert: Any) -> None:
    described = QUICK["llama3"] | {"hidden_size": 128, "intermediate_size": 256}
    tuned = make(described, dtype=torch.bfloat16, convert=convert).eval()
    exact = exact_twin(tuned, described).eval()
    held_against_plain(speaker(tuned, precision), exact)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_what_is_not_known_answers_as_transformers_has_it(family: str) -> None:
    targets = ("c_attn",) if family == "gpt2" else "all-linear"
    tuned = make(PLAIN[family][0], targets=targets)
    one = speaker(tuned)
    assert one.decoding is None
    assert "not a decoder known here" in one.remarks[0]
    assert said(one) == wanted(tuned)


@pytest.mark.parametrize("what", ["eps", "turns", "scale"])
def test_a_decoder_that_says_something_else_is_not_used(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(decoder: Decoder, tuned: Any, precision: str) -> None:
        right(decoder, tuned, precision)
        if what == "eps":
            decoder.eps = 0.5
        elif what == "turns":
            decoder.turns = (decoder.turns[0], -decoder.turns[1])
        else:
            decoder.scale *= 0.5

    right = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", wrong)
    tuned = make(QUICK["llama3"])
    one = speaker(tuned)
    assert one.decoding is None
    assert "nats off" in one.remarks[0]
    assert said(one) == wanted(tuned)


def test_texts_beyond_the_window_answer_as_transformers_has_them() -> None:
    tuned = make(QUICK["mistral"])  # 16 tokens; the longest text has 20
    one = speaker(tuned)
    assert one.decoding
    assert not one.decoding.knows(20)
    assert said(one) == wanted(tuned)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_places_that_are_free_are_taken_by_the_next(at_once: int) -> None:
    tuned = make(QUICK["llama3"])
    how = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=3)
    together = dict(speaker(tuned, how=how).each(PROMPTS))
    few = dict(speaker(tuned, how=how, at_once=at_once).each(PROMPTS))
    assert few == together
    again = dict(speaker(tuned, how=how).each(PROMPTS[3:], numbers=[3, 4, 5]))
    assert [again[n] for n in range(3)] == [together[n] for n in range(3, 6)]


def test_a_repetition_penalty_is_transformers_own() -> None:
    tuned = make(QUICK["llama3"])
    how = Sampling(repetition_penalty=1.5)
    found = said(speaker(tuned, how=how))
    assert found == wanted(tuned, repetition_penalty=1.5)
    assert found != wanted(tuned)


def test_answers_that_end_early_leave_the_others_alone() -> None:
    tuned = make(QUICK["llama3"])
    own = wanted(tuned)
    stops = Stops((), tuple({int(own[0].split()[0]), int(own[1].split()[3])}))
    found = dict(Speaker(tuned, "fp32", Numbers(), stops, NEW, at_once=3).each(PROMPTS))
    for place, text in enumerate(own):
        ids = [int(word) for word in text.split()]
        ends = [n for n, token in enumerate(ids) if token in stops.ids]
        kept = ids[: ends[0]] if ends else ids
        assert found[place].text == Numbers().decode(kept)
        assert found[place].finish == ("stop" if ends else "length")
    assert {one.finish for one in found.values()} == {"stop", "length"}


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_nobody_asked(family: str) -> None:
    tuned = make((QUICK | {name: one for name, (one, _) in PLAIN.items()})[family])
    assert list(speaker(tuned).each([])) == []


def test_parts_of_a_cache_come_back() -> None:
    free = Free(10, 20)
    assert [free.take(4), free.take(4), free.take(4)] == [10, 14, None]
    free.give(10, 4)
    assert free.take(5) is None
    free.give(14, 4)
    assert free.parts == [(10, 20)]
    assert free.take(10) == 10
    assert free.parts == []
