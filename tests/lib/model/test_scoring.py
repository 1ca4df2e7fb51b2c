"""Each row's sums over the quick path, both sides, against plain PEFT one row at a time."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from stages.lib.model import attention, cross_entropy, fp8, load
from stages.lib.model.loss import Shape
from stages.lib.model.scoring import UNIT, Scorer, Sums
from tests.decoders import PLAIN, QUICK, make, plain_sum, some
from tests.lib.model.conftest import MemoryRows
from tests.lib.model.test_compiled import masked
from tests.lib.model.test_nf4 import convert as to_nf4

pytestmark = pytest.mark.usefixtures("one_thread")
CONVERT = {"fp32": None, "bf16": None, "fp8": fp8.convert, "nf4": to_nf4}
LENGTHS = (40, 23, 1, 5, 17, 33, 2)


def side(tuned: Any, adapted: bool) -> Any:
    return contextlib.nullcontext() if adapted else tuned.disable_adapter()


@torch.no_grad()
def half_expected(tuned: Any, precision: str = "fp32") -> MemoryRows:
    """Rows whose every second token is what the tuned model would say, their masks with holes."""
    generator = np.random.default_rng(0)
    rows = []
    for length in LENGTHS:
        ids = generator.integers(3, 100, length)
        for place in range(1, length, 2):
            with load.compute(precision):
                logits = tuned(
                    input_ids=torch.from_numpy(ids[None, :place]), use_cache=False
                ).logits
            ids[place] = int(logits[0, -1].argmax())
        rows.append((ids, generator.random(length) < 0.7))
    return MemoryRows(rows)


@torch.no_grad()
def plain(tuned: Any, rows: MemoryRows, precision: str = "fp32") -> dict[bool, Any]:
    """What plain PEFT computes for each row alone: nll [rows] and hits [rows], by whether it is adapted."""
    found = {}
    for adapted in (False, True):
        nll, hits = [], []
        with side(tuned, adapted), load.compute(precision):
            for ids, mask in rows.rows:
                nll.append(float(plain_sum(tuned, [(ids, mask)])))
                tokens = torch.from_numpy(ids)
                first = tuned(input_ids=tokens[None], use_cache=False).logits[0, :-1].argmax(-1)
                hits.append(int((first == tokens[1:])[torch.from_numpy(mask[1:])].sum()))
        found[adapted] = (np.array(nll), np.array(hits))
    return found


def both(scorer: Scorer, rows: MemoryRows) -> dict[bool, Sums]:
    return {adapted: scorer.sums(rows, adapted) for adapted in (False, True)}


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma3", "phi3", "gpt2", "gemma2"])
def test_sums_are_those_of_plain_peft(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)
    tuned = make(QUICK[family] if family in QUICK else PLAIN[family][0]).eval()
    rows = half_expected(tuned)
    wanted = plain(tuned, rows)
    with Scorer(tuned, "fp32", rows.lengths, 64) as scorer:
        assert scorer.quick.packed == (family in QUICK)
        assert not scorer.alone
        found = both(scorer, rows)
    for adapted, (nll, hits) in wanted.items():
        assert np.abs(found[adapted].nll - nll).max() < 1e-4
        assert found[adapted].hits.tolist() == hits.tolist()
        assert found[adapted].tokens.tolist() == rows.trained.tolist()
    assert wanted[True][1].sum() > 20  # half of the tokens are what the tuned model expects
    assert np.abs(found[True].nll - found[False].nll).max() > 0.1


@pytest.mark.parametrize("precision", ["bf16", "nf4", "fp8"])
def test_quantised_bases_too(precision: str) -> None:
    tuned = make(QUICK["llama3"], dtype=torch.bfloat16, convert=CONVERT[precision]).eval()
    rows = half_expected(tuned, precision)
    wanted = plain(tuned, rows, precision)
    with Scorer(tuned, precision, rows.lengths, 64) as scorer:
        assert scorer.quick.packed
        found = both(scorer, rows)
    for adapted, (nll, hits) in wanted.items():
        assert found[adapted].nll.sum() == pytest.approx(nll.sum(), rel=0.01)
        assert np.abs(found[adapted].hits - hits).sum() <= 3  # bf16 leaves ties
    change = found[True].nll.sum() - found[False].nll.sum()
    assert change == pytest.approx(wanted[True][0].sum() - wanted[False][0].sum(), rel=0.05)
    assert abs(change) > 0.05 * wanted[True][0].sum()


def test_bins_do_not_matter() -> None:
    tuned = make(QUICK["llama3"]).eval()
    rows = half_expected(tuned)
    found = []
    for tokens in (40, 121):
        told: list[int] = []
        with Scorer(tuned, "fp32", rows.lengths, tokens) as scorer:
            found.append(scorer.sums(rows, True, told.append))
        assert sum(told) == sum(LENGTHS)
        assert len(told) == {40: 4, 121: 1}[tokens]
    assert np.abs(found[0].nll - found[1].nll).max() < 1e-4
    assert found[0].hits.tolist() == found[1].hits.tolist()


def test_the_model_is_left_as_it_was() -> None:
    tuned = make(QUICK["llama3"], dropout=0.1, dtype=torch.bfloat16, convert=fp8.convert)
    ids = torch.arange(3, 30)[None]

    def said() -> Any:
        tuned.eval()
        with torch.no_grad(), load.compute("fp8"):
            answer = tuned.generate(
                input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=True
            )
            logits = tuned(input_ids=ids).logits
        tuned.train()
        return answer, logits

    answer, logits = said()
    tuned.requires_grad_(False)
    frozen = [p.requires_grad for p in tuned.parameters()]
    with Scorer(tuned, "fp8", np.array([40]), 64) as scorer:
        assert scorer.quick.packed
        assert not tuned.training
        assert tuned.config._attn_implementation == attention.NAME
        scorer.sums(MemoryRows(some(9)), False)
    assert tuned.training
    assert [p.requires_grad for p in tuned.parameters()] == frozen
    assert tuned.config._attn_implementation != attention.NAME
    again, logits_again = said()
    assert torch.equal(again, answer)
    assert torch.equal(logits_again, logits)


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    attention.register()
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_compiled_layers_switch_the_adapter_off(precision: str, compiled_anew: None) -> None:
    """A graph for each side, which all layers share; on and off and on again compiles nothing anew."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    described = QUICK["llama3"] | {"num_hidden_layers": 3}
    tuned = make(described, dtype=dtype, convert=CONVERT[precision])
    rows = half_expected(tuned.eval(), precision)
    with Scorer(tuned, precision, rows.lengths, 128) as scorer:
        AttentionInterface.register(
            attention.NAME, masked
        )  # which the compiler can follow on a CPU
        scorer.shape = Shape(40, False, 128)
        eager = both(scorer, rows)
        scorer.quick.layers = [
            (layer, torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager"))
            for layer, step in scorer.quick.layers
        ]
        scorer.quick.arrange(0)
        found = [both(scorer, rows), both(scorer, rows)]
    assert counters["stats"]["unique_graphs"] == 2
    close = 1e-4 if precision == "fp32" else 0.5
    for adapted in (False, True):
        assert np.abs(found[0][adapted].nll - eager[adapted].nll).max() < close
        assert found[0][adapted].nll.tolist() == found[1][adapted].nll.tolist()
    change = [sums[True].nll.sum() - sums[False].nll.sum() for sums in (found[0], eager)]
    assert change[0] == pytest.approx(change[1], rel=0.05)
    assert abs(change[1]) > 5


def test_a_loss_that_is_no_number_marks_its_rows_alone() -> None:
    tuned = make(QUICK["llama3"]).eval()
    rows = MemoryRows(
        [(np.array([3, 4, 100, 6]), np.ones(4, bool)), (np.array([7, 8]), np.ones(2, bool))]
    )
    with torch.no_grad():
        tuned.get_input_embeddings().weight[100] = torch.nan
    with Scorer(tuned, "fp32", rows.lengths, 64) as scorer:
        found = scorer.sums(rows, True)
    assert np.isnan(found.nll).tolist() == [True, False]


def test_sums_are_read_from_whole_numbers() -> None:
    total = torch.tensor([[int(1.5 * UNIT), 2, 3, 0], [7, 0, 1, 1]])
    found = Sums.of(total)
    assert found.nll[0] == 1.5
    assert np.isnan(found.nll[1])
    assert (found.hits.tolist(), found.tokens.tolist()) == ([2, 0], [3, 1])


def test_a_model_whose_rows_see_each_other_reads_them_one_by_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A state-space model knows no positions."""
    described = {"model_type": "mamba", "state_size": 4, "num_hidden_layers": 1}
    tuned = make(described, targets=["in_proj"]).eval()
    rows = half_expected(tuned)
    wanted = plain(tuned, rows)
    with Scorer(tuned, "fp32", rows.lengths, 64) as scorer:
        found = both(scorer, rows)
    assert "one by one" in capfd.readouterr().err
    for adapted, (nll, _) in wanted.items():
        assert np.abs(found[adapted].nll - nll).max() < 1e-4
