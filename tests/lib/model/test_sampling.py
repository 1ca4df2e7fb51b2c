"""What is drawn follows the distribution, and nothing but seed, prompt and place."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from stages.lib.model.sampling import Sampling, choose

ROWS = 20_000


def draw(logits: torch.Tensor, how: Sampling, rows: int = ROWS) -> torch.Tensor:
    prompts = torch.arange(rows, dtype=torch.int32) % 100
    places = torch.arange(rows, dtype=torch.int32) // 100
    return choose(logits.expand(rows, -1), how, prompts, places)


@pytest.mark.parametrize(
    "how",
    [Sampling(1.0), Sampling(0.7, seed=2**32 - 1), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.8),
     Sampling(2.0, top_k=12, top_p=0.9)],
)  # fmt: skip
def test_tokens_come_as_often_as_transformers_says(how: Sampling) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 40)
    scores = TemperatureLogitsWarper(how.temperature)(None, logits)  # type: ignore[arg-type]
    if how.top_k:
        scores = TopKLogitsWarper(how.top_k)(None, scores)  # type: ignore[arg-type]
    if how.top_p < 1:
        scores = TopPLogitsWarper(how.top_p)(None, scores)  # type: ignore[arg-type]
    wanted = scores.softmax(-1)[0]
    counts = torch.bincount(draw(logits, how), minlength=40)
    assert not counts[wanted == 0].any()
    some = wanted > 0
    square = ((counts - ROWS * wanted)[some].square() / (ROWS * wanted[some])).sum()
    freedom = int(some.sum()) - 1
    assert float(square) < freedom + 5 * (2 * freedom) ** 0.5


def test_the_likeliest_at_temperature_0() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert draw(logits, Sampling(0.0), 5).tolist() == [1] * 5


def test_seed_prompt_and_place_decide_and_nothing_else() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 1000)
    how = Sampling(1.0, seed=5)
    found = draw(logits, how, 300)
    assert torch.equal(draw(logits, how, 300), found)
    prompts, places = torch.tensor([7], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    assert choose(logits, how, prompts, places) == found[207]
    assert (draw(logits, Sampling(1.0, seed=6), 300) == found).float().mean() < 0.1
    assert len(set(found[:100].tolist())) > 60  # another prompt, another token
    assert len(set(found[7::100].tolist())) == 3  # another place, another token


def test_no_noise_is_infinite() -> None:
    """A word in 16 million had it, so one of 300 tokens was any word of the vocabulary."""
    scores = torch.randn(1, 49152, generator=torch.manual_seed(0)).expand(400, -1)
    prompts = torch.zeros(400, dtype=torch.int32)
    places = torch.arange(400, dtype=torch.int32)
    found = choose(scores, Sampling(2.0, top_k=1), prompts, places)
    assert (found == scores[0].argmax()).all()
