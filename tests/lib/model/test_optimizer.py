"""One tensor for the optimizer is as good as many."""

import pytest
import torch
from torch import nn

from stages.lib.model.optimizer import Flat
from stages.lib.run.exits import Diverged


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((64, 512), (256, 128), (16, 4096))]


def step_thrice(
    parts: list[nn.Parameter], steps: list[nn.Parameter], optimizer: str, flat: Flat | None
) -> None:
    import bitsandbytes as bnb

    kinds = {"adamw_8bit": bnb.optim.AdamW8bit, "adamw_torch": torch.optim.AdamW}
    found = kinds[optimizer](steps, lr=1e-2, weight_decay=0.1)
    if flat:
        found.register_step_pre_hook(flat.gather)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for part in parts:
            part.grad = torch.randn(part.shape, generator=generator)
        found.step()
        for part in parts:
            part.grad = None


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch"])
def test_three_steps_are_those_of_the_parts(optimizer: str) -> None:
    alone, together = parameters(), parameters()
    step_thrice(alone, alone, optimizer, None)
    flat = Flat(together)
    step_thrice(together, [flat.parameter], optimizer, flat)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if optimizer == "adamw_8bit" else 1e-6)
    assert not torch.equal(alone[0], parameters()[0])


def test_a_part_without_a_gradient_counts_as_zero() -> None:
    parts = parameters()
    flat = Flat(parts)
    parts[0].grad = torch.ones_like(parts[0])
    flat.gather()
    assert flat.parameter.grad is not None
    assert float(flat.parameter.grad.sum()) == parts[0].numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    parts = parameters()
    flat = Flat(parts)
    for part in parts:
        part.grad = torch.ones_like(part)
    assert parts[1].grad is not None
    parts[1].grad[3, 4] = bad
    optimizer = torch.optim.AdamW([flat.parameter])
    optimizer.register_step_pre_hook(flat.gather)
    with pytest.raises(Diverged, match="not finite"):
        optimizer.step()
    for part, before in zip(parts, parameters(), strict=True):
        assert torch.equal(part, before)
