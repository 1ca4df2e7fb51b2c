"""The plan of memory: against measured peaks, and what it chooses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from stages.lib.model import carrying, plan
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.loss import lay_out, nll_sum
from stages.lib.model.plan import Choice
from tests.decoders import QUICK, make

LLAMA_2_7B = Architecture(4096, 32, 4096, 4096, 11008, 32000, False)
QV, ALL = ("q_proj", "v_proj"), ("all-linear",)
GIB = 2**30
# Peaks on an H200, torch 2.11, transformers 5.17, 2026-11-23: tokens of a pass, layers recomputed, GiB.
MEASURED = [
    (Setup("fp8", 16, QV), 16384, 0, 63.86),
    (Setup("fp8", 16, ALL), 16384, 0, 79.05),
]


@pytest.mark.parametrize(("setup", "tokens", "recomputed", "measured"), MEASURED)
def test_the_plan_is_within_a_tenth_of_what_was_measured(
    setup: Setup, tokens: int, recomputed: int, measured: float
) -> None:
    predicted = plan.predict(LLAMA_2_7B, setup, tokens, recomputed).total / GIB
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", ["llama2", "llama3", "smollm", "qwen3", "gemma", "granite"])
@pytest.mark.parametrize("targets", [QV, ALL])
def test_parameters_are_counted_from_the_config_alone(
    family: str, targets: tuple[str, ...]
) -> None:
    tuned = make(QUICK[family], targets="all-linear" if targets == ALL else targets)
    shape = Architecture.of(tuned.config.to_dict())
    assert shape
    learned = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert plan.adapter_parameters(shape, Setup("bf16", 4, targets)) == learned
    frozen = sum(p.numel() for p in tuned.parameters() if not p.requires_grad and p.ndim == 2)
    assert shape.frozen + shape.words == frozen


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen3"])
@pytest.mark.parametrize("targets", [QV, ALL])
def test_operations_are_those_that_torch_counts(family: str, targets: tuple[str, ...]) -> None:
    """Of plain attention, which multiplies all pairs of tokens, not those alone that count."""
    tuned = make(QUICK[family], targets="all-linear" if targets == ALL else targets)
    tuned.set_attn_implementation("eager")
    tuned.get_input_embeddings().register_forward_hook(lambda *io: io[2].requires_grad_())
    tokens, learned = 48, 11
    batch = lay_out([(np.arange(tokens), np.arange(tokens) >= tokens - learned)])
    with FlopCounterMode(display=False) as counter:
        nll_sum(tuned, batch).backward()
    counts = {str(kind): n for kind, n in counter.get_flop_counts()["Global"].items()}

    shape = Architecture.of(tuned.config.to_dict())
    assert shape
    adapter = plan.adapter_parameters(shape, Setup("bf16", 4, targets))
    whole = plan.operations(shape, adapter, [tokens], learned)
    pairs = tokens * (tokens + 1) // 2
    of_pair = (whole - plan.operations(shape, adapter, [1] * tokens, learned)) / (pairs - tokens)
    assert counts["aten.bmm"] == pytest.approx(of_pair * tokens**2, rel=1e-3)  # and the rotation
    assert counts["aten.mm"] == pytest.approx(whole - of_pair * pairs)


def test_another_kind_of_model_is_not_planned() -> None:
    assert Architecture.of({"n_embd": 64, "vocab_size": 128}) is None


LLAMA_2_70B = Architecture(8192, 80, 8192, 1024, 28672, 32000, False)


def test_a_base_in_parts_takes_its_share_and_a_few_layers_for_a_moment() -> None:
    whole = plan.predict(LLAMA_2_70B, Setup("bf16", 16, QV), 4096, 80)
    parts = plan.predict(LLAMA_2_70B, Setup("bf16", 16, QV, shared=4), 4096, 80)
    layer = LLAMA_2_70B.frozen * 2 / 80
    assert parts.weights == pytest.approx(whole.weights / 4)
    assert parts.gathered == pytest.approx(3 * layer)
    assert (whole.gathered, "gathered" in str(whole)) == (0, False)
    assert parts.total - parts.weights - parts.gathered == whole.total - whole.weights
    many_words = replace(LLAMA_2_70B, vocabulary=256000)
    head = 256000 * 8192 * 2
    found = plan.predict(many_words, Setup("bf16", 16, QV, shared=4), 4096, 80)
    assert found.gathered == pytest.approx(2 * head + layer)


@pytest.mark.parametrize(
    ("precision", "gpus", "room", "fits"),
    [("bf16", 1, 80, False), ("bf16", 2, 64, False), ("bf16", 2, 80, True), ("nf4", 1, 80, True)],
)
def test_a_base_fits_a_gpu_or_in_parts_several(
    precision: str, gpus: int, room: int, fits: bool
) -> None:
    setup = Setup(precision, 16, QV, shared=gpus)
    sizes = [4096, 2048]
    assert plan.fits(LLAMA_2_70B, setup, sizes, room * GIB, "auto", 0) == fits
    if fits:
        assert not plan.fits(LLAMA_2_70B, setup, sizes, room * GIB, "auto", 0, Choice(16384, 0))
        assert plan.fits(LLAMA_2_70B, setup, sizes, room * GIB, "auto", 0, Choice(2048, 80))


def choose(room: float, precision: str = "fp8", recompute: str = "auto") -> list[Choice]:
    sizes = [16384, 8192, 4096, 2048, 1024]
    return plan.choices(LLAMA_2_7B, Setup(precision, 16, QV), sizes, int(room * GIB), recompute)


def test_a_large_gpu_recomputes_nothing_and_a_small_one_as_little_as_will_do() -> None:
    assert choose(130)[0].recomputed == 0
    assert choose(130)[0].tokens == 16384
    small = choose(14)
    assert 0 < small[0].recomputed < 32
    for choice in small:
        assert choice.memory
        assert choice.memory.total <= 14 * GIB
        less = plan.predict(LLAMA_2_7B, Setup("fp8", 16, QV), choice.tokens, choice.recomputed - 1)
        assert choice.recomputed == 0 or less.total > 14 * GIB
    assert [c.cost for c in small] == sorted(c.cost for c in small)


def test_what_was_set_is_kept_to() -> None:
    assert {c.recomputed for c in choose(130, recompute="all")} == {32}
    assert {c.recomputed for c in choose(20, recompute="none")} == {0}
    assert choose(10) == []


@pytest.mark.parametrize(
    ("room", "possible", "found"),
    [
        (130, ("fp8", "bf16", "nf4"), "fp8"),
        (130, ("bf16", "nf4"), "bf16"),
        (10, ("fp8", "bf16", "nf4"), "nf4"),
        (1, ("fp8", "bf16", "nf4"), "nf4"),
    ],
)
def test_the_fastest_precision_that_fits(room: int, possible: Any, found: str) -> None:
    setup = Setup("auto", 16, QV)
    assert plan.precision(LLAMA_2_7B, setup, [8192, 1024], room * GIB, "auto", possible) == found


def test_a_cut_is_remembered_by_a_checkpoint() -> None:
    for choice in (Choice(4096, 3), Choice(4096, 0, offloaded=5, lean=2)):
        assert Choice.kept(choice.facts()) == choice
    assert Choice.kept({"bin_tokens": 64, "recomputed_layers": 1}) == Choice(64, 1)


NF4 = Setup("nf4", 16, QV)


def offloads(
    room: float, spare: float, recompute: str = "auto", setup: Setup = NF4
) -> list[Choice]:
    sizes = [16384, 8192, 4096]
    return plan.choices(LLAMA_2_7B, setup, sizes, int(room * GIB), recompute, int(spare * GIB))


def test_a_small_gpu_offloads_rather_than_recompute_where_the_host_has_room() -> None:
    (away, *_), (again, *_) = offloads(6.7, 64), offloads(6.7, 0)
    assert (away.tokens, away.recomputed) == (8192, 0)
    assert 0 < away.offloaded <= 32
    assert again.offloaded == 0
    assert again.recomputed > 0
    assert away.cost < again.cost
    assert away.memory
    assert away.memory.total <= 6.7 * GIB
    less = plan.predict(LLAMA_2_7B, NF4, 8192, 0, away.offloaded - 1)
    assert less.total > 6.7 * GIB
    need = 8192 * carrying.host(LLAMA_2_7B, NF4, away.offloaded, away.lean) / GIB
    assert offloads(6.7, need - 0.1)[0] != away


def test_a_large_gpu_offloads_nothing() -> None:
    assert offloads(130, 500)[0].offloaded == 0


def test_who_asks_for_offloading_gets_it_for_all_layers_and_others_do_not() -> None:
    for room in (10, 130):
        assert {c.offloaded for c in offloads(room, 64, "offload")} == {32}
        assert not [
            c for c in offloads(room, 64, "all") + offloads(room, 64, "none") if c.offloaded
        ]
    assert offloads(130, 1, "offload") == []


@pytest.mark.parametrize(("precision", "keeps_up"), [("nf4", True), ("fp8", False)])
def test_lean_layers_are_as_few_as_let_the_copies_keep_up(precision: str, keeps_up: bool) -> None:
    """FP8 computes too fast for 7B's own q, k and v to be carried: that costs the most lean layers."""
    setup = Setup(precision, 16, QV)
    lean = carrying.leanest(LLAMA_2_7B, setup, 32)
    assert (0 < lean < 15) if keeps_up else (15 < lean <= 30)
    places = [carrying.is_lean(place, 32, lean) for place in range(32)]
    assert sum(places) == lean
    assert places[30:] == [False, False], "these keep theirs on the device"
    grouped = Architecture(4096, 32, 4096, 1024, 14336, 128256, False)
    assert carrying.leanest(grouped, Setup("nf4", 16, QV), 32) == 0
    assert carrying.leanest(LLAMA_2_7B, setup, 2) == 0


def test_what_is_computed_again_is_counted() -> None:
    products = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert carrying.again(LLAMA_2_7B, False) * products == 4096 * 4096 + 2 * 4096 * 11008
    assert carrying.again(LLAMA_2_7B, True) * products == 4 * 4096 * 4096 + 2 * 4096 * 11008
