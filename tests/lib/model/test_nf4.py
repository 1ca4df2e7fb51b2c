"""NF4: dequantised at every product, or once, it is bitsandbytes' own product."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from stages.lib.model import load, nf4
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
    """A projection double quantised, as transformers does it."""
    made = bnb.nn.Linear4bit(
        source.in_features,
        source.out_features,
        source.bias is not None,
        compute_dtype=torch.bfloat16,
    )
    made.weight = bnb.nn.Params4bit(
        source.weight.data.clone(), requires_grad=False, quant_type="nf4", module=made
    )
    made.bias = source.bias
    made.support_avx512bf16_for_cpu = False
    return made.to(source.weight.device).requires_grad_(False)


def layer(bias: bool) -> Any:
    """A quantised projection."""
    torch.manual_seed(0)
    return quantised(nn.Linear(256, 384, bias=bias, dtype=torch.bfloat16))


def convert(base: Any) -> None:
    """Quantise every projection of a model, but its head."""
    replace_projections(base, quantised)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_both_are_the_product_of_bitsandbytes(bias: bool, dtype: torch.dtype) -> None:
    """Under autocast, whatever a norm before it hands on."""
    own, each, once = (layer(bias) for _ in range(3))
    nf4.lighten(each)
    nf4.unpack(once)
    torch.manual_seed(1)
    x = torch.randn(2, 20, 256, dtype=dtype)
    upstream = torch.randn(2, 20, 384, dtype=torch.bfloat16)
    found = []
    for one in (own, each, once):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = one(given).to(torch.bfloat16)
        y.backward(upstream)
        found.append((y, given.grad))
    for y, of_x in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(of_x, found[0][1])


def test_the_weight_is_that_of_bitsandbytes() -> None:
    own = layer(False)
    state = own.weight.quant_state
    wanted = bnb.functional.dequantize_4bit(own.weight.data, state)
    found = nf4.dequantise(
        nf4.stored(own), 384, state.blocksize, state.state2.blocksize, torch.bfloat16
    )
    assert torch.equal(found, wanted)
    assert wanted.dtype == torch.bfloat16
    assert error(found, nn.Linear(256, 384).weight) > 0.5, "the comparison tells nothing"


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "phi", "phi3"])
def test_unpacked_is_dequantised_at_every_product_bit_for_bit(family: str) -> None:
    rows = some(40, 23, 5)
    found = []
    for unpacked in (False, True):
        tuned = make(QUICK[family], dtype=torch.bfloat16, convert=convert)
        with load.compute("nf4"):
            plain = plain_sum(tuned, rows)
        of_plain = gradients(tuned, plain)
        quick = Quick(tuned, "nf4", unpacked=unpacked)
        quick.arrange(False)
        assert not quick.remarks
        with load.compute("nf4"):
            loss = quick_sum(quick, rows, 128)
        found.append((loss, gradients(tuned, loss)))
    (each, of_each), (once, of_once) = found
    assert torch.equal(each, once)
    for name, gradient in of_each.items():
        assert torch.equal(of_once[name], gradient), name
    assert error(each, plain) < 1e-5
    assert error(of_each, of_plain) < 0.02  # 0.0104 was seen: the branch is in bf16
