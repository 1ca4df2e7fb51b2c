"""Projections of one input as one product, for answers: no gradients, the adapter's first factors below."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from stages.lib.model import fp8, nf4

ROOM = 1.3  # of free GPU memory to what dequantised NF4 takes, so that the cache has some too


class Unknown(Exception):
    """What about a model is not known here."""


class Seconds(NamedTuple):
    """What an adapter has for projections of one input.

    Attributes:
        downs: first factors, [ranks, in]. ups: second factors, [rank, out]. columns: see `decode_ops`.
    """

    downs: torch.Tensor
    ups: torch.Tensor
    columns: tuple[int, ...]


class Group:
    """Projections of one input.

    Args:
        layers: transformers' or peft's modules. unpack: dequantise NF4 once.

    Attributes:
        sizes: outputs of each. ups, columns: see `Seconds`; None and -1 without an adapter.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, unpack: bool) -> None:
        self.bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.sizes = tuple(base.out_features for base in self.bases)
        self.out = sum(self.sizes)
        found = _seconds(layers, self.sizes, dtype)
        self.ups = found and found.ups
        self.columns = found.columns if found else (-1,) * len(layers)
        self.downs = found and found.downs
        self.bias = self._bias(dtype)
        self.scales: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        kinds = {type(base) for base in self.bases}
        if kinds == {torch.nn.Linear}:
            self._together(dtype)
        elif kinds == {fp8.Fp8Linear}:
            self._in_eight_bits()
        elif self.bases[0].weight.is_cuda and not all(map(nf4.is_nested, self.bases)):
            # bitsandbytes asks the GPU for an int8 product's outliers, which no graph can hold.
            raise Unknown("a base in int8, or in several types")
        elif unpack and all(nf4.is_nested(base) for base in self.bases):
            parts = [nf4.whole(base).to(dtype) for base in self.bases]
            self.weight = torch.cat([*parts, *([] if found is None else [found.downs])])

    def _bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        if all(base.bias is None for base in self.bases):
            return None
        none = [torch.zeros(size, device=self.bases[0].weight.device) for size in self.sizes]
        pairs = zip(self.bases, none, strict=True)
        parts = [zeros if base.bias is None else base.bias for base, zeros in pairs]
        more = 0 if self.downs is None else len(self.downs)
        return F.pad(torch.cat([part.to(dtype) for part in parts]), (0, more))

    def _together(self, dtype: torch.dtype) -> None:
        """One weight; the modules go on with their parts of it, so that nothing is there twice."""
        parts = [base.weight.detach() for base in self.bases]
        if parts[0].dtype != dtype:
            raise Unknown(f"weights in {parts[0].dtype}")
        if len(parts) > 1 or self.downs is not None:
            more = [] if self.downs is None else [self.downs]
            self.weight = torch.cat([*parts, *more])
            own = self.weight[: self.out].split(self.sizes)
            for base, part in zip(self.bases, own, strict=True):
                base.weight.data = part
        else:
            self.weight = parts[0]

    def _in_eight_bits(self) -> None:
        together = getattr(self.bases[0], "together", None)
        if together is not None and together.sizes == self.sizes:
            self.weight, self.scales = together.rows, together.scales
            return
        self.weight = torch.cat([base.weight.detach() for base in self.bases])
        self.scales = torch.cat([base.scales for base in self.bases])
        parts = zip(self.weight.split(self.sizes), self.scales.split(self.sizes), strict=True)
        for base, (weight, scales) in zip(self.bases, parts, strict=True):
            base.weight.data, base.scales = weight, scales

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs [rows, out] side by side, and those of the adapter's first factors [rows, ranks]."""
        if self.weight is None:
            y = torch.cat([base(x) for base in self.bases], -1)
            return y, None if self.downs is None else product(x, self.downs)
        if self.scales is not None:
            own = None if self.bias is None else self.bias[: self.out]
            y = _product_in_eight_bits(x, self.weight, self.scales, own)
            return y, None if self.downs is None else product(x, self.downs)
        both = product(x, self.weight, self.bias)
        return both[:, : self.out], None if self.downs is None else both[:, self.out :]


def _seconds(layers: Sequence[Any], sizes: tuple[int, ...], dtype: torch.dtype) -> Seconds | None:
    """The adapter's factors for some projections, its first ones one under the other."""
    downs: list[torch.Tensor] = []
    columns: list[int] = []
    ups: list[torch.Tensor | None] = []
    for layer in layers:
        adapted = isinstance(layer, LoraLayer)
        columns.append(sum(map(len, downs)) if adapted else -1)
        if adapted:
            (name,) = layer.active_adapters
            downs.append(layer.lora_A[name].weight.detach().to(dtype))
        ups.append(layer.lora_B[name].weight.detach().to(dtype) if adapted else None)
    if not downs:
        return None
    rank = len(downs[0])
    empty = [torch.zeros(size, rank, dtype=dtype, device=downs[0].device) for size in sizes]
    whole = [zero if up is None else up for up, zero in zip(ups, empty, strict=True)]
    return Seconds(torch.cat(downs), torch.cat(whole).t().contiguous(), tuple(columns))


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [rows, in] @ weight.T, [rows, out]."""
    if x.is_cuda and len(x) == 1:
        from stages.lib.model.kernels import decode

        return decode.vector(x, weight, None, bias)
    return F.linear(x, weight, bias)


def _product_in_eight_bits(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As training multiplies, input and weight in e4m3."""
    if x.is_cuda:
        from stages.lib.model.kernels import decode

        if len(x) == 1:
            return decode.vector(x, weight, scales, bias)
        quantised = decode.quantise(x)
    else:
        quantised = fp8.quantise(x)
    y = fp8.product(*quantised, weight, scales, x.dtype)
    return y if bias is None else y + bias


def has_room_unpacked(causal: Any) -> bool:
    """Whether a GPU has room for NF4's weights in bf16, and for answers."""
    if causal.device.type != "cuda":
        return False
    needed = sum(2 * m.in_features * m.out_features for m in nf4.layers(causal))
    return torch.cuda.mem_get_info()[0] > ROOM * needed
