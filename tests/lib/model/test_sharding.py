"""A base in parts on two processes computes what the whole one does, to the last bit."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from stages.lib.model import adapter, attention, load, offload, sharding
from stages.lib.model.base import Base
from stages.lib.model.loss import Shape, lay_out, nll_sum, unlearned
from stages.lib.model.quick import Quick
from stages.lib.model.ranks import Ranks
from tests.decoders import QUICK, SIZES, gradients, some
from tests.lib.model.test_compiled import TOKENS, masked
from tests.lib.model.test_ranks import together

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 3
# Tied and untied, with biases and without, on file as they are computed in and otherwise.
CASES = [
    ("llama3", "fp8", torch.float16), ("smollm", "bf16", torch.float32), ("qwen2", "nf4", torch.bfloat16),
]  # fmt: skip
MORE = [
    ("qwen2", "fp8", torch.bfloat16), ("qwen2", "nf4", torch.float16), ("llama2", "int8", torch.bfloat16),
    ("gemma3", "fp32", torch.float32), ("phi", "nf4", torch.bfloat16), ("phi3", "fp8", torch.float32),
]  # fmt: skip


def written(family: str, dtype: torch.dtype, folder: Path) -> Base:
    """A base of random weights as files."""
    described = SIZES | QUICK[family] | {"num_hidden_layers": LAYERS}
    if family == "gemma3":
        described |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return Base(str(folder), None)


def built(base: Base, precision: str, ranks: Ranks | None = None) -> Quick:
    """The base with an adapter that does something, whole or in parts."""
    base.fetch()
    model = load.on_host(base, precision) if ranks else load.load(base, precision)
    tuned = adapter.attach(model, base, 4, 8, 0.1, ("all-linear",), seed=0)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(p)))
    if ranks:
        sharding.spread(tuned, precision, ranks)
    quick = Quick(tuned.train(), precision, sharded=bool(ranks))
    assert not quick.remarks
    quick.seed.fill_(12345)
    return quick


def walk(quick: Quick, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The loss of a bin, and its gradients."""
    with load.compute(quick.precision):
        loss = nll_sum(quick.tuned, batch)
    return [loss.detach(), *gradients(quick.tuned, loss).values()]


@pytest.mark.parametrize(
    ("family", "precision", "dtype"),
    CASES + [pytest.param(*case, marks=pytest.mark.sweep) for case in MORE],
)
def test_parts_compute_what_the_whole_does(
    family: str, precision: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    base = written(family, dtype, tmp_path)

    def work(ranks: Ranks) -> Any:
        whole, parts = built(base, precision), built(base, precision, ranks)
        bins = [lay_out(rows, Shape(40)) for rows in (some(40, 23, 5), some(9 + ranks.number))]
        idle = lay_out([unlearned(some(7)[0])], Shape(40))
        found = []
        for kept in ((0,), (2,), (0, LAYERS)):  # all; recomputed; offloaded
            whole.arrange(*kept)
            parts.arrange(*kept)
            for batch in bins:
                pairs = zip(walk(parts, batch), walk(whole, batch), strict=True)
                found.append(all(torch.equal(ours, theirs) for ours, theirs in pairs))
            found.append(not any(one.any() for one in walk(parts, idle)))
        return all(found), sharding.base_bytes(parts.tuned), sharding.base_bytes(whole.tuned)[0]

    for same, (size, here), whole in together(work):
        assert same
        assert here < 0.53 * size
        assert size <= 1.01 * whole


def test_a_process_that_is_gone_in_a_pass_is_noticed(tmp_path: Path) -> None:
    base = written("llama3", torch.bfloat16, tmp_path)

    def work(ranks: Ranks) -> Any:
        parts = built(base, "bf16", ranks)
        batch = lay_out(some(5), Shape(40))
        walk(parts, batch)
        if ranks.number:
            os._exit(1)
        with ranks.passing():
            walk(parts, batch)

    assert together(work)[0] == "Lost"


@pytest.mark.sweep
def test_parts_are_compiled_as_one_graph(tmp_path: Path) -> None:
    """For all layers; two more where one of them is lean, and all give the same numbers."""
    base = written("llama3", torch.bfloat16, tmp_path)

    def work(ranks: Ranks) -> Any:
        torch._dynamo.reset()
        counters.clear()
        parts = built(base, "nf4", ranks)
        AttentionInterface.register(attention.NAME, masked)
        batch = lay_out(some(40, 23, 5), Shape(40, False, TOKENS))
        torch._dynamo.mark_dynamic(batch["bounds"], 0)
        parts.arrange(0)
        wanted = walk(parts, batch)
        parts.compiles, parts.backend = True, "aot_eager"
        found = []
        for kept in ((1,), (0, LAYERS, 1)):
            parts.arrange(*kept)
            pairs = zip(walk(parts, batch), wanted, strict=True)
            found.append(all(torch.equal(one, other) for one, other in pairs))
            found.append(counters["stats"]["unique_graphs"])
        return found

    assert together(work, seconds=120) == [[True, 1, True, 3]] * 2
