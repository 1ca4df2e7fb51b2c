"""Both sides of an evaluation, in one load."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.lib.data.formats import Stops
from stages.lib.data.tokens import Tokens
from stages.lib.model import measure
from stages.lib.model.answer import Speaker
from stages.lib.run.exits import GateFailed
from tests.lib.model.conftest import MemoryRows

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(tuned: Any, by: float) -> Any:
    """With a B that is not zero."""
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.fill_(by)
    return tuned.eval()


def test_both_sides_are_read_and_speak(
    attach: Callable[..., Any], some_rows: Callable[..., MemoryRows], tiny: Path
) -> None:
    tuned, rows = moved(attach(), 0.3), some_rows(30, 12, 20)
    sums = measure.held_out(tuned, "fp32", rows, [12, 30], 64)
    assert sums["base"].tokens.tolist() == sums["tuned"].tokens.tolist() == rows.trained.tolist()
    assert (np.abs(sums["base"].nll - sums["tuned"].nll) > 0.01).all()
    tokens, prompts = Tokens(tiny), [[5, 6, 7, 8], [9]]
    said = measure.spoken(Speaker(tuned, "fp32", tokens, Stops((), (2,)), 6), prompts)
    assert [one.text for one in said["base"]] != [one.text for one in said["tuned"]]
    assert [len(answers) for answers in said.values()] == [2, 2]
    for side, off in (("base", tuned.disable_adapter()), ("tuned", contextlib.nullcontext())):
        with off:
            for one, prompt in zip(said[side], prompts, strict=True):
                out = tuned.generate(
                    input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False,
                    eos_token_id=2, pad_token_id=0,
                )  # fmt: skip
                assert one.text == tokens.decode(out[0, len(prompt) :].tolist()).strip()


def test_nothing_held_out_is_nothing_measured(
    attach: Callable[..., Any], some_rows: Callable[..., MemoryRows]
) -> None:
    sums = measure.held_out(attach(), "fp32", some_rows(), [5, 5], 64)
    assert sums["base"].nll.shape == sums["tuned"].tokens.shape == (0,)


def test_a_loss_that_is_no_number_ends_it(
    attach: Callable[..., Any], some_rows: Callable[..., MemoryRows]
) -> None:
    with pytest.raises(GateFailed, match="held-out loss of the tuned model is not finite"):
        measure.held_out(moved(attach(), torch.nan), "fp32", some_rows(30, 12), [12, 30], 64)
