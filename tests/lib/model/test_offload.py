"""What layers keep on the host: the same numbers, another place."""

import gc
import weakref
from typing import Any

import pytest
import torch

from stages.lib.model import carrying, load, offload
from stages.lib.model.offload import Offload
from stages.lib.model.quick import Quick
from tests.decoders import QUICK, gradients, make, quick_sum, some

pytestmark = pytest.mark.usefixtures("one_thread", "all_is_worth_a_copy")
LAYERS = 5
MORE: dict[str, dict[str, Any]] = {
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 1]},
}


@pytest.fixture
def all_is_worth_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors, too."""
    monkeypatch.setattr(offload, "LEAST", 1)


def built(family: str, offloaded: int, **kept: Any) -> Quick:
    described = QUICK[family] | {"num_hidden_layers": LAYERS} | MORE.get(family, {})
    quick = Quick(make(described, dropout=0.2, **kept), "fp32")
    assert not quick.remarks
    quick.arrange(0, offloaded)
    quick.seed.fill_(12345)
    return quick


def loads(quick: Quick) -> list[offload.Load]:
    """Of the last pass, whose graph is still there, from the first layer on."""
    assert quick.traffic
    found, last = [], quick.traffic.last
    while last:
        one = last()
        assert one is not None
        found.insert(0, one)
        last = one.before
    return found


@pytest.mark.parametrize("family", QUICK)
@pytest.mark.parametrize("offloaded", [1, 4, LAYERS])
def test_gradients_are_the_same_bit_for_bit(family: str, offloaded: int) -> None:
    rows = some(40, 23, 5)
    plain, away = built(family, 0), built(family, offloaded)
    wanted, loss = quick_sum(plain, rows, 128), quick_sum(away, rows, 128)
    assert torch.equal(loss, wanted)
    found = gradients(away.tuned, loss)
    for name, gradient in gradients(plain.tuned, wanted).items():
        assert torch.equal(found[name], gradient), name


def test_only_the_last_layers_keep_theirs_on_the_device() -> None:
    quick = built("llama2", LAYERS)
    loss = quick_sum(quick, some(40, 23, 5), 68)
    assert quick.traffic
    quick.traffic.settle()
    sent = carrying.sent(LAYERS)
    found = loads(quick)
    assert len(found) == LAYERS
    for number, one in enumerate(found):
        assert len(one.pieces) == 1, "the layer's input, and neither weights nor what layers share"
        (piece,) = one.pieces.values()
        assert piece.size == 68 * 64 * 4
        assert (piece.near is None) == (piece.far is not None) == (number < sent)
    loss.backward()


def test_two_passes_at_once_do_not_share_a_buffer() -> None:
    first, second = some(40, 23, 5), some(31, 30, seed=1)
    quick = built("llama3", LAYERS)
    wanted = [gradients(quick.tuned, quick_sum(quick, rows, 68)) for rows in (first, second)]
    together = [quick_sum(quick, rows, 68) for rows in (first, second)]
    found = [gradients(quick.tuned, loss) for loss in together]
    for one, other in zip(found, wanted, strict=True):
        for name, gradient in other.items():
            assert torch.equal(one[name], gradient), name


def test_buffers_are_used_again_and_nothing_stays_behind() -> None:
    quick = built("llama2", LAYERS)
    rows = some(40, 23, 5)
    assert quick.traffic
    gradients(quick.tuned, quick_sum(quick, rows, 68))
    taken = quick.traffic.host.taken
    for _ in range(3):
        loss = quick_sum(quick, rows, 68)
        last = weakref.ref(loads(quick)[0])
        gradients(quick.tuned, loss)
        del loss
        assert last() is None, "a graph that is gone still holds what it kept"
    assert quick.traffic.host.taken == taken > 0
    traffic = weakref.ref(quick.traffic)
    quick.arrange(0)
    gc.collect()
    assert traffic() is None


def test_a_graph_that_is_kept_can_go_back_twice() -> None:
    quick = built("llama2", LAYERS)
    loss = quick_sum(quick, some(40, 23, 5), 68)
    learned = [p for p in quick.tuned.parameters() if p.requires_grad]
    once, twice = (torch.autograd.grad(loss, learned, retain_graph=True) for _ in range(2))
    for one, other in zip(once, twice, strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_keeps_nothing() -> None:
    quick = built("llama2", LAYERS)
    quick.tuned.eval()
    with torch.no_grad(), load.compute("fp32"):
        quick_sum(quick, some(40, 23, 5), 68)
    assert quick.traffic
    assert quick.traffic.last is None


def test_views_of_one_storage_come_back_as_they_were() -> None:
    """One copy serves them all, whatever part of it each is and however it is laid out."""
    torch.manual_seed(0)
    traffic = Offload([torch.nn.Identity() for _ in range(4)], torch.device("cpu"))
    both = torch.randn(6, 10, requires_grad=True)
    weight = torch.randn(4, 6)
    scratch = both * 1
    left, right = scratch[:, :4], scratch[:, 4:].t()
    with traffic.around(0, {"weight": weight}):
        found = (left @ weight).sin().sum() + (right @ right.t()).exp().sum()
    assert traffic.last
    one = traffic.last()
    assert one
    assert [p.size for p in one.pieces.values()].count(scratch.nbytes) == 1
    alive = [found for found in gc.get_objects() if isinstance(found, offload.Piece)]
    assert len(alive) == len(one.pieces)
    traffic.settle()
    of_both = torch.autograd.grad(found, both)[0]
    wanted = (both[:, :4] @ weight).sin().sum() + (both[:, 4:].t() @ both[:, 4:]).exp().sum()
    assert torch.equal(of_both, torch.autograd.grad(wanted, both)[0])
