"""EleutherAI's harness over a model in memory: with our precision, batches, chat format and signals."""

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from stages.lib.model import load
from stages.lib.model.tasks import Chat
from stages.lib.run import preemption
from stages.lib.run.parts import Done, afresh
from stages.lib.run.progress import Progress

# Logits of a forward pass: their log-probabilities are fp32, 1 GiB and 256 MiB.
MOST_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 26}
GENERATED_AT_ONCE = 16
PART = 1024  # requests, whose answers are kept together


class Finished:
    """What the harness tells of each finished request: counted, and a moment to look for signals."""

    def __init__(self, progress: Progress, side: str) -> None:
        self.progress, self.side = progress, side

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more."""
        # A task's own code may have caught what a signal raised.
        preemption.check()
        self.progress.update(self.progress.done + 1, side=self.side)


class Harness(HFLM):
    """The model with its adapter, as the harness asks it.

    Args:
        tuned: the peft model. tokens: see `stages.lib.data.tokens.Tokens`. chat: to put tasks as conversations.
        done: see `Parts.of`.

    Attributes:
        side: `base` or `tuned`, for the log. truncated: requests so far that lost their beginning, as they were
        longer than the model's context.
    """

    def __init__(
        self, tuned: Any, tokens: Any, precision: str, chat: Chat | None, done: Done = afresh
    ) -> None:
        super().__init__(
            pretrained=tuned,
            tokenizer=copy.deepcopy(tokens.fast),
            batch_size="auto",
            # Its default is the logits' own type; in bf16 near answers would have equal probabilities.
            softmax_dtype=torch.float32,
            mixed_precision_dtype=_autocast_dtype(precision),
        )
        self.chat, self.done = chat, done
        self.side, self.truncated = "base", 0
        width = max(len(self.tokenizer), getattr(self.config, "vocab_size", 1))
        self.tokens_at_once = MOST_LOGITS[load.device().type] // width
        self._batch, self._ends = 1, 0

    def ask_as(self, side: str) -> Any:
        """Context in which it is the `base` or the `tuned` model; `truncated` starts anew."""
        self.side, self.truncated = side, 0
        return self.model.disable_adapter() if side == "base" else nullcontext()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Log-probability of each continuation, and whether it is what the model would say."""
        found = self._counted(super().loglikelihood, requests)
        return [tuple(one) for one in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Log-probability of each text."""
        return self._counted(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """What the model says to each request."""
        said = self._counted(super().generate_until, requests)
        return [self._until(text) for text in said]

    def _counted(self, ask: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        before, found = self.truncated, []
        with Progress(len(requests), "requests", name="benchmarks") as progress:
            self.cache_hook = Finished(progress, self.side)
            for begin in range(0, len(requests), PART):
                some = requests[begin : begin + PART]
                name = f"{ask.__name__} of {_digest(some)}, {self.side}"
                part = self.done(name, functools.partial(self._answered, ask, some))
                before += part["truncated"]
                found += part["answers"]
                progress.skip(len(found) - progress.done)  # of an attempt before this one
        self.truncated = before
        return found

    def _answered(self, ask: Callable[..., list[Any]], requests: Sequence[Any]) -> dict[str, Any]:
        before = self.truncated
        answers = ask(requests, disable_tqdm=True)
        return {"answers": answers, "truncated": self.truncated - before}

    def _until(self, text: str) -> str:
        for stop in self.chat.stops.texts if self.chat else ():
            text = text.split(stop)[0]
        return text

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        room = self.max_length + 1
        self.truncated += sum(len(context) + len(rest) > room for _, context, rest in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, left-padded; a prompt over `left_truncate_len` tokens loses its beginning."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.truncated += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _batch_scheduler(self, pos: int, n_reordered_requests: Any) -> int:
        """How many requests the batch around `pos` has; they come longest first."""
        preemption.check()
        if pos == 0 or pos >= self._ends:
            _, context, rest = n_reordered_requests[pos]
            longest = min(len(context) + len(rest), self.max_length)
            self._batch = max(self.tokens_at_once // longest, 1)
            self._ends = pos + self._batch
        return self._batch

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        return GENERATED_AT_ONCE

    def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
        preemption.check()
        if self.chat:
            stop = [*stop, *self.chat.stops.texts]
            options.setdefault("eos_token_id", list(self.chat.stops.ids))
        return super()._model_generate(context, max_length, stop, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the format of the training data; else its last message is to be continued."""
        assert self.chat is not None
        if add_generation_prompt:
            return self.chat.render(chat_history)
        *before, last = chat_history
        return self.chat.render(before) + last["content"]


def _digest(requests: Sequence[Any]) -> str:
    asked = [request.args for request in requests]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def _autocast_dtype(precision: str) -> torch.dtype | None:
    """What `load.compute` computes in, as the harness opens a context of its own."""
    kind = load.device().type
    with load.compute(precision):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
