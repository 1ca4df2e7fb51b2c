"""LLM.int8 on the quick path is bitsandbytes' own product."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from stages.lib.model import int8, load
from stages.lib.model.quick import Quick
from tests.decoders import (
    QUICK,
    error,
    gradients,
    make,
    plain_sum,
    quick_sum,
    replace_projections,
    some,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def quantised(source: nn.Linear) -> Any:
    """A projection in int8, as transformers does it."""
    made = bnb.nn.Linear8bitLt(
        source.in_features, source.out_features, source.bias is not None,
        has_fp16_weights=False, threshold=6.0,
    )  # fmt: skip
    values, scales, _ = bnb.functional.int8_vectorwise_quant(source.weight.data.half())
    made.weight = bnb.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scales)
    made.bias = source.bias
    return made.requires_grad_(False)


def convert(base: Any) -> None:
    """Quantise every projection of a model, but its head."""
    replace_projections(base, quantised)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_it_is_the_product_of_bitsandbytes(bias: bool, dtype: torch.dtype, used: bool) -> None:
    """Under autocast; also of a layer that has computed before."""
    torch.manual_seed(0)
    source = nn.Linear(256, 384, bias=bias, dtype=torch.bfloat16)
    own, ours = quantised(source), quantised(source)
    x = torch.randn(2, 20, 256, dtype=dtype)
    x[:, 3, 7] = 50.0
    upstream = torch.randn(2, 20, 384, dtype=torch.bfloat16)
    if used:
        ours(x.to(torch.bfloat16))
    int8.lighten(ours)
    found = []
    for one in (own, ours):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = one(given.to(torch.bfloat16)).to(torch.bfloat16)
        y.backward(upstream)
        found.append((y, given.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert error(found[1][0], source(x.to(torch.bfloat16))) < 0.01


@pytest.mark.parametrize("family", ["llama3", "qwen2", "phi"])
def test_loss_and_gradients_are_those_of_plain_peft(family: str) -> None:
    rows = some(40, 23, 5)
    tuned = make(QUICK[family], dtype=torch.bfloat16, convert=convert)
    with load.compute("int8"):
        plain = plain_sum(tuned, rows)
    of_plain = gradients(tuned, plain)
    quick = Quick(tuned, "int8")
    quick.arrange(False)
    assert not quick.remarks
    with load.compute("int8"):
        loss = quick_sum(quick, rows, 128)
    assert error(loss, plain) < 1e-5
    assert error(gradients(tuned, loss), of_plain) < 0.02  # the branch is in bf16


def test_the_compiler_takes_it_whole() -> None:
    """Forward and backward in one graph each, with the same numbers."""
    torch.manual_seed(0)
    layer = quantised(nn.Linear(64, 96, dtype=torch.bfloat16))
    int8.lighten(layer)
    found = []
    for compute in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = torch.ones(4, 64, dtype=torch.bfloat16).requires_grad_()
        y = compute(x * 2)
        y.sum().backward()
        found.append((y, x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_without_outliers_a_row_does_not_depend_on_the_others() -> None:
    """So that a comparison of two ways to batch rows compares nothing else."""
    torch.manual_seed(0)
    layer = quantised(nn.Linear(64, 96, dtype=torch.bfloat16)).eval()
    layer.state.is_training = False  # else, on the CPU, it is multiplied in 16 bit
    x = torch.randn(8, 64).to(torch.bfloat16)
    x[7, 3] = 50  # makes a column of all rows one with outliers

    def apart() -> float:
        with torch.no_grad():
            return float((layer(x)[:1] - layer(x[:1])).abs().max())

    assert apart() > 0
    with int8.without_outliers(layer):
        assert apart() == 0
    assert apart() > 0
