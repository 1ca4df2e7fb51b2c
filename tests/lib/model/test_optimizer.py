"""One tensor for the optimizer is as good as many."""

from typing import Any

import pytest
import torch
from torch import nn

from stages.lib.model.optimizer import Flat, unhurried

LONGEST = 0.5


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((64, 512), (256, 128), (16, 4096))]


OPTIMIZERS = ["adamw_8bit", "paged_adamw_8bit", "adamw_torch"]


def named(optimizer: str) -> tuple[Any, dict[str, Any]]:
    """The class that Trainer takes for a name, and its options."""
    import bitsandbytes as bnb

    return {
        "adamw_8bit": (bnb.optim.AdamW, {"optim_bits": 8}), "adamw_torch": (torch.optim.AdamW, {}),
        "paged_adamw_8bit": (bnb.optim.AdamW, {"optim_bits": 8, "is_paged": True}),
    }[optimizer]  # fmt: skip


def step_thrice(
    parts: list[nn.Parameter], steps: list[nn.Parameter], optimizer: str, flat: Flat | None
) -> None:
    kind, options = named(optimizer)
    found = (unhurried(kind) if flat else kind)(steps, lr=1e-2, weight_decay=0.1, **options)
    assert (type(found) is kind) == (not flat or optimizer == "adamw_torch")
    if flat:
        flat.guard(found)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for part in parts:
            part.grad = torch.randn(part.shape, generator=generator)
        if not flat:
            nn.utils.clip_grad_norm_(parts, LONGEST)
        found.step()
        for part in parts:
            part.grad = None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_steps_are_those_of_the_parts(optimizer: str) -> None:
    alone, together = parameters(), parameters()
    step_thrice(alone, alone, optimizer, None)
    flat = Flat(together, LONGEST)
    step_thrice(together, [flat.parameter], optimizer, flat)
    for a, b in zip(alone, together, strict=True):
        # A norm that differs in its last bit may put a moment into the next of its 256 places.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if optimizer == "adamw_torch" else 1e-3)
        assert float((a - b).detach().abs().mean()) < 1e-6
    assert not torch.equal(alone[0], parameters()[0])


def test_a_part_without_a_gradient_counts_as_zero() -> None:
    parts = parameters()
    flat = Flat(parts, longest=1e9)
    parts[0].grad = torch.ones_like(parts[0])
    flat.gather()
    assert flat.parameter.grad is not None
    assert float(flat.parameter.grad.sum()) == parts[0].numel()


@pytest.mark.parametrize("longest", [1e-3, 300.0, 1e6])
def test_gradients_are_cut_as_torch_cuts_those_of_the_parts(longest: float) -> None:
    alone, together = parameters(), parameters()
    for a, b in zip(alone, together, strict=True):
        a.grad, b.grad = a.detach().clone(), b.detach().clone()
    norm = nn.utils.clip_grad_norm_(alone, longest)
    flat = Flat(together, longest)
    flat.gather()
    torch.testing.assert_close(flat.norm, norm, rtol=1e-6, atol=0)
    assert flat.parameter.grad is not None
    wanted = torch.cat([part.grad.flatten() for part in alone if part.grad is not None])
    torch.testing.assert_close(flat.parameter.grad, wanted, rtol=1e-5, atol=1e-8)
    assert float(flat.parameter.grad.norm()) == pytest.approx(min(longest, float(norm)), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_norm_of_a_gradient_that_is_not_finite_is_not_finite(bad: float) -> None:
    parts = parameters()
    flat = Flat(parts, LONGEST)
    for part in parts:
        part.grad = torch.ones_like(part)
    assert parts[1].grad is not None
    parts[1].grad[3, 4] = bad
    flat.gather()
    assert not torch.isfinite(flat.norm)


@pytest.mark.case("E7")
@pytest.mark.parametrize("spoiled", ["gradient", "loss"])
@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_is_taken_from_the_first_that_is_not_sound_on(
    optimizer: str, bad: int, spoiled: str
) -> None:
    """Weights and moments stay to the last bit; steps behind it, sound themselves, are not taken either."""
    parts = parameters()
    loss = torch.ones(())
    flat = Flat(parts, LONGEST, lambda: loss)
    kind, options = named(optimizer)
    found = unhurried(kind)([flat.parameter], lr=1e-2, weight_decay=0.1, **options)
    flat.guard(found)
    for number in range(bad + 3):
        before = {n: t.clone() for n, t in moments(found, flat).items()}
        for part in parts:
            part.grad = torch.randn_like(part)
        if number == bad and spoiled == "gradient":
            parts[1].grad[3, 4] = torch.inf  # type: ignore[index]
        loss = torch.tensor(torch.nan if number == bad and spoiled == "loss" else 1.0)
        found.step()
        after = moments(found, flat)
        assert bool(flat.sound) == (number < bad)
        if number < bad:
            assert not torch.equal(after["weights"], before["weights"])
            continue
        for name, tensor in after.items():
            assert torch.equal(tensor, before.get(name, torch.zeros_like(tensor))), name
    assert torch.equal(parts[2].flatten(), after["weights"][-parts[2].numel() :])


def moments(optimizer: torch.optim.Optimizer, flat: Flat) -> dict[str, torch.Tensor]:
    """What a step changes, but its number and bitsandbytes' tables."""
    state = optimizer.state.get(flat.parameter, {})
    tensors = {n: t for n, t in state.items() if isinstance(t, torch.Tensor) and n != "step"}
    kept = {n: t for n, t in tensors.items() if not n.startswith("qmap")}
    return kept | {"weights": flat.parameter.detach()}
