"""Answers: prompts continued until EOS, the next turn's mark, or a limit."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stages.lib.model import decoding, plain, shortage
from stages.lib.model.decoder import Decoder
from stages.lib.model.groups import Unknown
from stages.lib.model.said import Answer, Ends, Said, Stops, Tokenizer
from stages.lib.model.sampling import GREEDY, Sampling


class Speaker:
    """A tuned model that answers prompts: by a decoder of our own where that says the same, else as it is.

    Make it before a `Quick` of the same model, which changes how the model is called.

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
        self.tuned, self.precision, self.pad = tuned, precision, tokens.pad
        self.ends = Ends(tokens, stops)
        self.max_new_tokens, self.sampling, self.at_once = max_new_tokens, sampling, at_once
        self.remarks: list[str] = []
        tuned.eval()
        self.decoding = self._decoding()

    def _decoding(self) -> decoding.Decoding | None:
        try:
            decoder = Decoder(self.tuned, self.precision)
        except Unknown as why:
            self.remarks.append(f"{why}: it answers as transformers has it")
            return None
        off = decoding.difference(decoder, self.tuned, self.precision)
        if off <= decoding.close(self.precision):
            return decoding.Decoding(decoder, self.sampling, self.at_once)
        kind = self.tuned.get_base_model().config.model_type
        self.remarks.append(
            f"the decoder for {kind} is {off:.2g} nats off: it answers as transformers has it"
        )
        return None

    def each(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None,
        adapted: bool = True,
    ) -> Iterator[tuple[int, Answer]]:  # fmt: skip
        """Answers as they finish, each with its prompt's place among `prompts`.

        Args:
            prompts: token ids of each. numbers: of the prompts, on which depends what is drawn; their places,
                unless told. adapted: with the adapter, or as the base alone.
        """
        answers = [Said(self.ends, self.max_new_tokens) for _ in prompts]
        for place in self._speak(prompts, numbers or range(len(prompts)), answers, adapted):
            yield place, answers[place].answer()

    def one(
        self, prompt: Sequence[int], write: Callable[[str], object] | None = None, number: int = 0
    ) -> Answer:
        """The answer to one prompt; `write` gets its text as it is said."""
        said = Said(self.ends, self.max_new_tokens, write)
        for _ in self._speak([prompt], [number], [said], adapted=True):
            pass
        return said.answer()

    def _speak(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], answers: Sequence[Said],
        adapted: bool,
    ) -> Iterator[int]:  # fmt: skip
        longest = max(map(len, prompts), default=0)
        words = f"answering {len(prompts)} prompts, the longest {longest} tokens, base in {self.precision}"
        with shortage.explained(lambda: words, shortage.WITHOUT_TRAINING):
            if self.decoding and self.decoding.knows(longest + self.max_new_tokens):
                yield from self.decoding.each(prompts, numbers, answers, adapted)
                return
            yield from plain.each(
                self.tuned, self.precision, self.pad, prompts, numbers, answers, self.sampling, adapted,
                self.at_once or plain.BATCH,
            )  # fmt: skip
