"""Answers: prompts continued until EOS, the next turn's mark, or a limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from stages.lib.model import load
from stages.lib.run import preemption
from stages.lib.run.progress import Progress


class Tokenizer(Protocol):
    """What answering needs of a tokenizer; see `stages.lib.data.tokens.Tokens`."""

    pad: int

    def decode(self, ids: Sequence[int]) -> str: ...


class Stops(Protocol):
    """What ends an answer: texts and token ids; see `stages.lib.data.formats.Stops`."""

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Answer:
    """What the model said. `finish` is `stop` where it ended by itself, `length` at the limit."""

    text: str
    tokens: int
    finish: str


class AtStop(StoppingCriteria):
    """Ends each row that said a stop text; asked after every token, so it also looks for signals."""

    def __init__(self, tokens: Tokenizer, stops: Sequence[str], start: int) -> None:
        self.tokens, self.stops, self.start = tokens, stops, start

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        preemption.check()
        # A stop text has fewer tokens than characters, so it lies within so many of the last.
        reach = max(self.start, input_ids.shape[1] - max(map(len, self.stops), default=0))
        said = [self.tokens.decode(row[reach:].tolist()) for row in input_ids]
        stopped = [_holds(text, self.stops) for text in said]
        return torch.tensor(stopped, device=input_ids.device)


class Stream:
    """Passes text on as it is said, holding back what may be the beginning of a stop text."""

    def __init__(
        self, tokens: Tokenizer, stops: Sequence[str], write: Callable[[str], object]
    ) -> None:
        self.tokens, self.stops, self.write = tokens, stops, write
        self.ids: list[int] = []
        self.shown = 0
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then one token at a time."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self._show(held_back=True)

    def end(self) -> None:
        """Show the rest."""
        self._show(held_back=False)

    def _show(self, held_back: bool) -> None:
        text = _until(self.tokens.decode(self.ids).lstrip(), self.stops)
        # An unfinished character shows as U+FFFD until its last byte is there.
        limit = len(text.rstrip("\ufffd"))
        if held_back:
            ends = [
                n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])
            ]
            limit = min(limit, len(text) - max(ends, default=0))
        if limit > self.shown:
            self.write(text[self.shown : limit])
            self.shown = limit


def _until(text: str, stops: Sequence[str]) -> str:
    places = [text.index(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


@torch.no_grad()
def answer(
    model: Any,
    tokens: Tokenizer,
    precision: str,
    prompts: Sequence[Sequence[int]],
    stops: Stops,
    max_new_tokens: int,
    write: Callable[[str], object] | None = None,
) -> list[Answer]:
    """Continue prompts greedily, all in one left-padded batch.

    Args:
        prompts: token ids of each. stops: what ends an answer.
        write: gets the text of a single prompt as it is said.
    """
    place, longest = load.device(), max(map(len, prompts))
    ids = torch.tensor([[tokens.pad] * (longest - len(p)) + list(p) for p in prompts], device=place)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=place)
    model.eval()
    with load.compute(precision):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=list(stops.ids),
            pad_token_id=tokens.pad,
            stopping_criteria=StoppingCriteriaList([AtStop(tokens, stops.texts, longest)]),
            streamer=Stream(tokens, stops.texts, write) if write else None,
        )
    return [_answer(row[longest:].tolist(), tokens, stops) for row in out]


def _answer(ids: list[int], tokens: Tokenizer, stops: Stops) -> Answer:
    end = next((n for n, token in enumerate(ids) if token in stops.ids), None)
    ended, said = end is not None, ids[:end]
    text = tokens.decode(said)
    at_stop = _holds(text, stops.texts)
    if at_stop:  # what comes after it is padding, or another row's time
        spoken = (n for n in range(len(said)) if _holds(tokens.decode(said[:n]), stops.texts))
        said = said[: next(spoken, len(said))]
    finish = "stop" if ended or at_stop else "length"
    return Answer(_until(text, stops.texts).strip(), len(said) + (ended and not at_stop), finish)


def _holds(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def in_batches(
    model: Any,
    tokens: Tokenizer,
    precision: str,
    prompts: Sequence[Sequence[int]],
    stops: Stops,
    max_new_tokens: int,
    size: int,
) -> list[Answer]:
    """The answers to many prompts in their order; those of like length share a batch of `size`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Answer] = {}
    with Progress(len(prompts), "prompts") as progress:
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            said = answer(
                model, tokens, precision, [prompts[i] for i in batch], stops, max_new_tokens
            )
            found |= dict(zip(batch, said, strict=True))
            progress.update(len(found))
    return [found[i] for i in range(len(prompts))]
