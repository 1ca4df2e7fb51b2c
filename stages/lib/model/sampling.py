"""Which token comes next: the likeliest, or one drawn at random by a pure function of seed, prompt and place.

What is drawn for a prompt so depends on nothing else: not on the batch that it shares, nor on where a run was
stopped and started again.
"""

from dataclasses import dataclass

import torch

from stages.lib.model.dropout import mixed

# A hash's upper 23 bits and a half as a number between 0 and 1; with 24 the largest would be rounded to 1.
TO_UNIT = 2.0**-23


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: 0 takes the likeliest. top_k: among so many; 0 is all. top_p: among the likeliest that have
            this probability together. repetition_penalty: what has been said is less likely by it (Keskar et
            al. 2019); 1 changes nothing. seed: of what is drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def choose(
    logits: torch.Tensor, how: Sampling, prompts: torch.Tensor, places: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The next token of each row, int64 [rows].

    Args:
        logits: [rows, vocabulary]. prompts: the number of each row's prompt, int32 [rows]. places: of the token
            in its answer, int32 [rows]. seen: tokens of prompt and answer so far, bool [rows, vocabulary]; for
            a repetition penalty.
    """
    scores = logits.float()
    if seen is not None:
        less = torch.where(
            scores > 0, scores / how.repetition_penalty, scores * how.repetition_penalty
        )
        scores = torch.where(seen, less, scores)
    if how.temperature == 0:
        return scores.argmax(-1)
    scores = scores / how.temperature
    if how.top_k or how.top_p < 1:
        scores = scores.masked_fill(scores < _least(scores, how), -torch.inf)
    return (scores + _gumbel(scores, how.seed, prompts, places)).argmax(-1)


def _least(scores: torch.Tensor, how: Sampling) -> torch.Tensor:
    """The lowest score that may be drawn, [rows, 1]."""
    ranked = scores.sort(-1, descending=True).values
    if how.top_k:
        ranked = ranked[:, : how.top_k]
    chances = ranked.softmax(-1)
    before = chances.cumsum(-1) - chances
    kept = (before < how.top_p).sum(-1, keepdim=True)
    return ranked.gather(-1, kept - 1)


def _gumbel(
    scores: torch.Tensor, seed: int, prompts: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Noise by which the largest sum is a draw from softmax(scores)."""
    rows = mixed(mixed(prompts + _signed(seed)) + places)
    words = mixed(torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device))
    hashes = mixed(words + rows[:, None])
    uniform = (((hashes >> 9) & 0x7FFFFF).float() + 0.5) * TO_UNIT
    return -(-uniform.log()).log()


def _signed(seed: int) -> int:
    """A seed below 2**32 as int32."""
    return (seed + 2**31) % 2**32 - 2**31
