"""The loss without logits, against torch's in fp64; how a bin is laid out for it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages.lib.model import cross_entropy
from stages.lib.model.loss import Shape, lay_out
from tests.decoders import error, some

pytestmark = pytest.mark.usefixtures("one_thread")


def given(count: int, bias: bool) -> list[torch.Tensor | None]:
    """Hidden states, a head, perhaps its bias, and targets."""
    torch.manual_seed(count)
    hidden = torch.randn(count, 32, requires_grad=True)
    head, targets = torch.randn(200, 32), torch.randint(0, 200, (count,))
    return [hidden, head, torch.randn(200) if bias else None, targets]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 50])
def test_it_is_the_sum_of_torchs_cross_entropy(
    count: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)
    hidden, head, offset, targets = given(count, bias)
    assert hidden is not None
    found = cross_entropy.NllSum.apply(hidden, head, offset, targets, cross_entropy.piece)
    (3 * found).backward()
    far = hidden.detach().double().requires_grad_()
    logits = F.linear(far, head.double(), None if offset is None else offset.double())
    wanted = F.cross_entropy(logits, targets, reduction="sum")
    (3 * wanted).backward()
    assert found.dtype == torch.float32
    assert error(found, wanted) < 5e-7
    assert error(hidden.grad, far.grad) < 1e-6


def test_logits_that_are_far_out_do_not_overflow() -> None:
    hidden, head, _, targets = given(9, False)
    assert hidden is not None
    large = (hidden.detach() * 1e4).requires_grad_()
    found = cross_entropy.NllSum.apply(large, head, None, targets, cross_entropy.piece)
    found.backward()
    wanted = F.cross_entropy(large.detach().double() @ head.double().t(), targets, reduction="sum")
    assert error(found, wanted) < 1e-5
    assert large.grad is not None
    assert large.grad.isfinite().all()


def test_nothing_learned_is_no_loss() -> None:
    hidden, head, _, targets = given(0, False)
    assert hidden is not None
    found = cross_entropy.NllSum.apply(hidden, head, None, targets, cross_entropy.piece)
    found.backward()
    assert found.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 32)


def test_what_is_no_number_stays_none() -> None:
    hidden, head, _, targets = given(9, False)
    assert hidden is not None
    with torch.no_grad():
        hidden[4, 4] = torch.nan
    found = cross_entropy.NllSum.apply(hidden, head, None, targets, cross_entropy.piece)
    found.backward()
    assert found.isnan()
    assert hidden.grad is not None
    assert hidden.grad[4].isnan().all()


def test_in_bf16_it_takes_what_a_norm_under_autocast_hands_on() -> None:
    """fp32 hidden states before a bf16 head."""
    hidden, head, _, targets = given(9, False)
    assert hidden is not None
    assert head is not None
    head = head.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy.NllSum.apply(hidden, head, None, targets, cross_entropy.piece)
    found.backward()
    far = hidden.detach().double().requires_grad_()
    F.cross_entropy(far @ head.double().t(), targets, reduction="sum").backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert error(hidden.grad, far.grad) < 0.02


def test_rows_fill_a_bin_up_and_nobody_learns_from_the_filling() -> None:
    rows = some(40, 23, 5)
    batch = lay_out(rows, Shape(longest=40, tokens=128))
    plain = lay_out(rows)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, 128)
    assert batch["bounds"].tolist() == [0, 40, 63, 68, 108, 128]
    assert batch["bounds"].dtype == torch.int32
    assert (batch["longest"], batch["uniform"]) == (40, False)
    assert torch.equal(batch["kept"], plain["kept"])
    assert torch.equal(batch["targets"], plain["targets"])
    assert torch.equal(batch["input_ids"][:, :68], plain["input_ids"])
    ends = batch["bounds"].tolist()
    for first, last in pairwise(ends):
        assert batch["position_ids"][0, first:last].tolist() == list(range(last - first))
    assert int(batch["bounds"].diff().max()) <= 40


def test_a_full_bin_and_one_without_a_size_are_left_as_they_are() -> None:
    rows = some(40, 23, 5)
    for shape in (Shape(40, tokens=68), Shape(40)):
        assert lay_out(rows, shape)["bounds"].tolist() == [0, 40, 63, 68]
    assert "bounds" not in lay_out(rows)


@pytest.mark.parametrize(
    ("lengths", "tokens", "wanted"),
    [
        ([5, 40, 23], 128, Shape(40, False, 128)),
        ([32, 32], 128, Shape(32, True, 128)),
        ([32, 32], 120, Shape(32, False, 120)),  # a bin would end in a shorter row
    ],
)
def test_the_shape_of_rows(lengths: list[int], tokens: int, wanted: Shape) -> None:
    assert Shape.of(np.array(lengths), tokens) == wanted


def test_rows_of_one_length_are_filled_up_with_such_rows() -> None:
    shape = Shape.of(np.array([32, 32, 32]), 128)
    assert lay_out(some(32), shape)["bounds"].tolist() == [0, 32, 64, 96, 128]
