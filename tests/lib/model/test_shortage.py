"""Where the memory ends, the user is told what was done, what was free, and what to change first."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib.model.quick import Quick
from stages.lib.model.scoring import Scorer
from stages.lib.model.shortage import explained, of_training, remedies
from stages.lib.run import exits
from stages.lib.run.exits import OutOfMemory
from tests.lib.model.test_training import Schedule, run

pytestmark = pytest.mark.usefixtures("one_thread")
# As torch says it, torch 2.11 and 2.13.
CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
    "512.00 MiB is free. Process 7 has 78.60 GiB memory in use. Of it 70.00 GiB are torch's."
)
FREE = "Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 512.00 MiB is free"
SHAPE = "a pass of 40 tokens, the longest row 27, base in fp32, of 2 layers 0 recomputed"


def spill(model: Any, at: int) -> Any:
    """Let the memory end in a model's pass of that number, those of evaluations among them."""
    seen = 0

    def hook(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            raise torch.OutOfMemoryError(CUDA)

    return model.register_forward_pre_hook(hook)


# Steps 2, 3, 5 and 6 of three bins each are evaluated, in one pass.
@pytest.mark.case("E4")
@pytest.mark.parametrize(
    ("at", "where"), [(1, "step 1"), (7, "the evaluation after step 2"), (16, "step 5")]
)
def test_training_says_where_and_what_it_was(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path, at: int, where: str
) -> None:
    tuned = attach()
    spill(tuned, at)
    with pytest.raises(OutOfMemory) as caught:
        run(tuned, some_rows(*range(8, 28)), 40, 3, tmp_path, steps=6)
    assert caught.value.exit_code == 81
    assert caught.value.message == (
        f"the GPU ran out of memory in {where}: {SHAPE} ({FREE}); change first MICRO_BATCH_TOKENS=30, then "
        "RECOMPUTE=all, BASE_PRECISION=nf4, OPTIMIZER=adamw_8bit, a smaller MAX_LENGTH, a larger GPU"
    )


@pytest.mark.case("E4")
@pytest.mark.parametrize(
    ("capacity", "precision", "arranged", "optimizer", "first"),
    [
        (64, "fp32", (0, 0), "adamw_8bit", ["MICRO_BATCH_TOKENS=32", "RECOMPUTE=all", "BASE_PRECISION=nf4"]),
        (32, "bf16", (1, 0), "adamw_8bit", ["RECOMPUTE=all", "BASE_PRECISION=nf4"]),
        (32, "bf16", (2, 0), "adamw_torch", ["BASE_PRECISION=nf4", "OPTIMIZER=adamw_8bit"]),
        (32, "nf4", (0, 2), "paged_adamw_8bit", ["a smaller MAX_LENGTH"]),
    ],
)  # fmt: skip
def test_what_to_change_is_what_can_still_be_changed(
    attach: Callable[..., Any], some_rows: Callable[..., Any], capacity: int, precision: str,
    arranged: tuple[int, int], optimizer: str, first: list[str],
) -> None:  # fmt: skip
    quick, rows = Quick(attach(precision), precision), some_rows(*range(8, 28))
    quick.arrange(*arranged)
    plan = Schedule(rows.lengths, capacity, 4, 1, 6, 0)
    found = remedies(quick, plan, rows, optimizer)
    assert found[: len(first)] == first
    assert found[-2:] == ["a smaller MAX_LENGTH", "a larger GPU"]
    words = f"of 2 layers {arranged[1] or arranged[0]} {'off' if arranged[1] else 're'}"
    assert words in of_training(quick, plan, rows)


@pytest.mark.case("E4")
def test_an_evaluation_says_so_too(
    attach: Callable[..., Any], some_rows: Callable[..., Any]
) -> None:
    tuned, rows = attach(), some_rows(9, 12)
    told = f"a pass of 40 tokens, the longest row 12, base in fp32 ({FREE}); change first what else is on"
    with Scorer(tuned, "fp32", rows.lengths, 40) as scorer:
        spill(tuned.get_base_model().model.layers[0], 1)
        with pytest.raises(OutOfMemory, match=re.escape(told)):
            scorer.sums(rows, adapted=False)


@pytest.mark.case("E4")
def test_elsewhere_the_first_line_is_kept() -> None:
    found = exits.classify(torch.OutOfMemoryError(CUDA + "\nmore"))
    assert isinstance(found, OutOfMemory)
    assert "512.00 MiB is free" in found.message
    assert "more" not in found.message
    with (
        pytest.raises(OutOfMemory, match=r"in x \(odd\); change first y$"),
        explained(lambda: "x", ["y"]),
    ):
        raise torch.OutOfMemoryError("odd")
