"""Held-out sums on a GPU: compiled, both sides, against plain PEFT one row at a time."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from stages.lib.model import load
from stages.lib.model.scoring import Scorer
from tests.decoders import plain_sum
from tests.gpu.test_quick import built, rows
from tests.lib.model.conftest import MemoryRows

CLOSE = {"fp32": 1e-4, "bf16": 0.01, "nf4": 0.01, "fp8": 0.02}


@pytest.mark.parametrize("precision", list(CLOSE))
def test_both_sides_are_those_of_plain_peft(precision: str) -> None:
    tuned = built("llama3", precision).eval()
    some = MemoryRows(rows(100, 57, 5, 80, 33, 9, seed=1))
    wanted: dict[bool, Any] = {}
    for adapted in (False, True):
        off = contextlib.nullcontext() if adapted else tuned.disable_adapter()
        with torch.no_grad(), off, load.compute(precision):
            wanted[adapted] = np.array([float(plain_sum(tuned, [row])) for row in some.rows])
    torch._dynamo.reset()
    counters.clear()
    with Scorer(tuned, precision, some.lengths, 256) as scorer:
        assert scorer.quick.compiles == (precision != "fp32")  # its attention goes row by row
        found = [{on: scorer.sums(some, on) for on in (False, True)} for _ in range(2)]
    # A graph of the layers and one of the loss for each side at most, and none for the second time.
    assert counters["stats"]["unique_graphs"] <= 6
    for adapted, nll in wanted.items():
        sums = found[0][adapted]
        assert abs(sums.nll.sum() / nll.sum() - 1) < CLOSE[precision]
        assert sums.tokens.tolist() == some.trained.tolist()
        assert sums.nll.tolist() == found[1][adapted].nll.tolist()
        assert sums.hits.tolist() == found[1][adapted].hits.tolist()
    change = [side[True].nll.sum() - side[False].nll.sum() for side in found]
    told = wanted[True].sum() - wanted[False].sum()
    assert change[0] == pytest.approx(told, rel=0.2)
    with torch.no_grad(), load.compute(precision):
        again = np.array([float(plain_sum(tuned, [row])) for row in some.rows])
    assert again == pytest.approx(wanted[True], rel=1e-3)
