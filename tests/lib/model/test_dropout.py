"""Dropout as a function of a seed and a position: its rate, its independence, its repeatability."""

import itertools

import pytest
import torch

from stages.lib.model import lora
from stages.lib.model.dropout import CountedDropout
from stages.lib.model.quick import Quick
from tests.decoders import QUICK, make

pytestmark = pytest.mark.usefixtures("one_thread")
MANY = torch.empty(
    512, 1024
)  # 2**19 elements: a correlation of independent ones is 0.0014 off zero
FIVE_SIGMA = 5 / MANY.numel() ** 0.5


def mask(seed: int, p: float = 0.5, place: int = 0) -> torch.Tensor:
    """Of one place, bool."""
    made = CountedDropout(p, torch.tensor(seed, dtype=torch.int32), place)
    return made(torch.ones_like(MANY)) != 0


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two masks."""
    return float(
        torch.corrcoef(torch.stack([one.flatten().float(), other.flatten().float()]))[0, 1]
    )


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**31 - 1, 123456789])
def test_the_rate_is_the_one_that_was_asked_for(p: float, seed: int) -> None:
    found = mask(seed, p)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(1 - float(found.float().mean()) - p) < 5 * sigma / MANY.numel() ** 0.5
    for axis in (0, 1):  # no row and no column is favoured
        rates = 1 - found.float().mean(axis)
        z = (rates - p) / sigma * found.shape[axis] ** 0.5
        chi = float(z.square().sum())
        assert abs(chi - len(z)) < 5 * (2 * len(z)) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_expectation_stays(p: float) -> None:
    torch.manual_seed(0)
    x = 1 + torch.rand(64, 64, dtype=torch.float64)
    seed = torch.zeros((), dtype=torch.int32)
    place = CountedDropout(p, seed, 3)
    total = torch.zeros_like(x)
    for number in range(1000):
        seed.fill_(number * 7919)
        total += place(x)
    off = (total / 1000 / x - 1).abs()
    assert float(off.max()) < 5.5 * (p / (1 - p) / 1000) ** 0.5
    assert float((total / 1000 / x).mean()) == pytest.approx(1, abs=1e-3)


def test_what_stays_is_scaled_and_the_gradient_has_the_same_mask() -> None:
    x = torch.randn(8, 32, requires_grad=True)
    y = CountedDropout(0.5, torch.tensor(5, dtype=torch.int32), 1)(x)
    stays = y != 0
    assert torch.equal(y[stays], x[stays] * 2)
    y.sum().backward()
    assert torch.equal(x.grad, stays.float() * 2)


def test_off_in_evaluation_and_at_zero() -> None:
    x = torch.randn(8, 32)
    seed = torch.zeros((), dtype=torch.int32)
    assert CountedDropout(0.5, seed, 1).eval()(x) is x
    assert CountedDropout(0.0, seed, 1)(x) is x


def test_places_seeds_and_neighbours_have_nothing_in_common() -> None:
    """Seeds and places side by side, and far from each other; shifts within a mask, and between two."""
    pairs = [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (0, 2),
        (1, 1),
        (2**30, 0),
        (12345, 6),
        (2**31 - 1, 223),
    ]
    masks = [mask(seed, place=place) for seed, place in pairs]
    for one, other in itertools.combinations(masks, 2):
        assert abs(correlation(one, other)) < FIVE_SIGMA
    for one in masks:
        for shift in (1, 2, 3, 7, 64, 1024, 1025, 4096, 65536):
            flat = one.flatten()
            assert abs(correlation(flat[shift:], flat[:-shift])) < FIVE_SIGMA * 1.1


@pytest.mark.parametrize(("p", "most"), [(0.05, 10), (0.5, 7.5)])
def test_no_two_rows_and_no_two_columns_drop_alike(p: float, most: float) -> None:
    """Of every two, of one seed and of two: what both drop scatters as by chance, and no pair stands out."""
    one, other = (1 - mask(seed, p).float() for seed in (0, 7919))
    for a, b in ((one, one), (one.t(), one.t()), (one, other), (one.t(), other.t())):
        both = a @ b.t()
        if torch.equal(a, b):
            both = both[~torch.eye(len(a), dtype=torch.bool)]
        chance, tries = p * p, a.shape[1]
        sigma = (tries * chance * (1 - chance)) ** 0.5
        assert abs(float(both.var()) / sigma**2 - 1) < 0.15
        assert float((both - tries * chance).abs().max()) < most * sigma


def test_no_mask_is_another_one_in_another_order() -> None:
    """A number that the seed is only mixed into at first gives every mask anew under another numbering."""
    at = torch.arange(MANY.numel())
    one = mask(0).flatten()
    for seed in (1, 2, 3, 64, 1024, 4097):
        other = mask(seed).flatten()
        assert abs(correlation(one, other[at ^ seed])) < 0.03  # 0.012 was seen


def test_compiled_it_is_the_same_mask() -> None:
    x = torch.randn(16, 64)
    seed = torch.tensor(77, dtype=torch.int32)
    eager = CountedDropout(0.3, seed, 5)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for value in (77, 2**31 - 1, 0):
        seed.fill_(value)
        assert torch.equal(compiled(x), eager(x))


def test_every_place_of_a_model_has_its_own_and_one_seed_moves_them_all() -> None:
    tuned = make(QUICK["llama3"], dropout=0.5)
    quick = Quick(tuned, "fp32")
    places = [layer.lora_dropout["default"] for layer in lora.layers(tuned)]
    assert len(places) == 14
    x = torch.ones(32, 64)
    found = []
    for seed in (1, 2):
        quick.seed.fill_(seed)
        found += [place(x) != 0 for place in places]
    for one, other in itertools.combinations(found, 2):
        assert 0.4 < float((one == other).float().mean()) < 0.6
    tuned.eval()
    assert all(place(x) is x for place in places)
