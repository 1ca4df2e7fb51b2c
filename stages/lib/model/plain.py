"""Answers by transformers' own `generate`, for models that `decoding` does not know: left-padded batches."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from stages.lib.model import load
from stages.lib.model.said import Said
from stages.lib.model.sampling import Sampling, choose
from stages.lib.run import preemption, watchdog

BATCH = 8


class _Listening(StoppingCriteria):
    """Hands each row's new token on, and ends those that say so; it also looks for signals."""

    def __init__(self, answers: Sequence[Said]) -> None:
        self.answers = answers
        self.done = [False] * len(answers)

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        preemption.check()
        watchdog.alive()
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self.done[row]:
                self.done[row] = not self.answers[row].add(token)
        return torch.tensor(self.done, device=input_ids.device)


class _Chosen(LogitsProcessor):
    """Leaves one token to choose from: the one that `choose` chooses."""

    def __init__(self, how: Sampling, numbers: Sequence[int], start: int, lengths: Sequence[int]):
        self.how, self.start, self.lengths = how, start, lengths
        self.numbers = torch.tensor(numbers, dtype=torch.int32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = torch.full_like(self.numbers, input_ids.shape[1] - self.start)
        seen = self._seen(input_ids, scores) if self.how.repetition_penalty != 1 else None
        numbers, place = self.numbers.to(scores.device), place.to(scores.device)
        chosen = choose(scores, self.how, numbers, place, seen)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    def _seen(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(scores, dtype=torch.bool)
        for row, length in enumerate(self.lengths):  # but what pads it on the left
            found[row, input_ids[row, self.start - length :]] = True
        return found


@torch.no_grad()
def answer(
    model: Any, precision: str, pad: int, prompts: Sequence[Sequence[int]], numbers: Sequence[int],
    answers: Sequence[Said], sampling: Sampling,
) -> None:  # fmt: skip
    """Let prompts be answered in one batch.

    Args:
        pad: id that fills a row. prompts: token ids of each. numbers: of the prompts, on which depends what is
            drawn. answers: what is said is added to them.
    """
    place, longest = load.device(), max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=place)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=place)
    model.eval()
    with load.compute(precision):
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(said.limit for said in answers),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList(
                [_Chosen(sampling, numbers, longest, [len(p) for p in prompts])]
            ),
            stopping_criteria=StoppingCriteriaList([_Listening(answers)]),
        )


def each(
    tuned: Any, precision: str, pad: int, prompts: Sequence[Sequence[int]], numbers: Sequence[int],
    answers: Sequence[Said], sampling: Sampling, adapted: bool, size: int,
) -> Iterator[int]:  # fmt: skip
    """Let many prompts be answered, those of like length together; their places, as they finish.

    Args:
        adapted: with the adapter, or without it. size: prompts of a batch. The others: see `answer`.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        with contextlib.nullcontext() if adapted else tuned.disable_adapter():
            answer(
                tuned, precision, pad, [prompts[i] for i in batch], [numbers[i] for i in batch],
                [answers[i] for i in batch], sampling,
            )  # fmt: skip
        yield from batch
