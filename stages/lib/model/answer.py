"""Answers: prompts continued until EOS, the next turn's mark, or a limit."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stages.lib.model import plain
from stages.lib.model.said import Answer, Said, Stops, Tokenizer
from stages.lib.model.sampling import GREEDY, Sampling


class Speaker:
    """A tuned model that answers prompts.

    Args:
        tuned: with its adapter. precision: of its base. stops: what ends an answer.
        max_new_tokens: of an answer. at_once: prompts at a time, at most; None is as many as fit.

    Attributes:
        remarks: what is not as usual, and why; a sentence each.
    """

    def __init__(
        self, tuned: Any, precision: str, tokens: Tokenizer, stops: Stops, max_new_tokens: int,
        sampling: Sampling = GREEDY, at_once: int | None = None,
    ) -> None:  # fmt: skip
        self.tuned, self.precision, self.tokens, self.stops = tuned, precision, tokens, stops
        self.max_new_tokens, self.sampling, self.at_once = max_new_tokens, sampling, at_once
        self.remarks: list[str] = []

    def each(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None,
        adapted: bool = True,
    ) -> Iterator[tuple[int, Answer]]:  # fmt: skip
        """Answers as they finish, each with its prompt's place among `prompts`.

        Args:
            prompts: token ids of each. numbers: of the prompts, on which depends what is drawn; their places,
                unless told. adapted: with the adapter, or as the base alone.
        """
        answers = [Said(self.tokens, self.stops, self.max_new_tokens) for _ in prompts]
        for place in self._speak(prompts, numbers or range(len(prompts)), answers, adapted):
            yield place, answers[place].answer()

    def one(
        self, prompt: Sequence[int], write: Callable[[str], object] | None = None, number: int = 0
    ) -> Answer:
        """The answer to one prompt; `write` gets its text as it is said."""
        said = Said(self.tokens, self.stops, self.max_new_tokens, write)
        for _ in self._speak([prompt], [number], [said], adapted=True):
            pass
        return said.answer()

    def _speak(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], answers: Sequence[Said],
        adapted: bool,
    ) -> Iterator[int]:  # fmt: skip
        return plain.each(
            self.tuned, self.precision, self.tokens.pad, prompts, numbers, answers, self.sampling,
            adapted, self.at_once or plain.BATCH,
        )  # fmt: skip
