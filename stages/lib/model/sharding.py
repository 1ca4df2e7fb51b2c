"""A frozen base of which each GPU has a part: FSDP2 brings a layer together for its turn, and lets it go.

What is trained is whole on every GPU, as without sharding, and so are its gradients and their sum. A layer
comes from the files in the host's memory, is quantised on the GPU as it would be without sharding, and is cut
before the next one comes: no GPU ever has more than its parts and a few whole layers.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from stages.lib.model import fp8, int8, load, nf4, projections
from stages.lib.model.ranks import Ranks
from stages.lib.run.progress import say

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
BYTE = torch.float8_e4m3fn  # torch 2.11 shards floats alone, so that bytes are cut as these


def spread(tuned: Any, precision: str, ranks: Ranks) -> None:
    """Cut the base of a tuned model, read by `load.on_host`, over the GPUs of all processes.

    From here on each pass needs all of them. Norms between layers stay whole, they are small.
    """
    began = time.monotonic()
    causal, place = tuned.get_base_model(), load.device()
    mesh = DeviceMesh.from_group(distributed.group.WORLD, place.type)
    shard = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    embeddings, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    for module in (embeddings, head):
        _move(module, precision, place)
    if head.weight is embeddings.weight:
        head.weight = None
        head.forward = functools.partial(_head_of, embeddings, head)
    else:
        _shard(shard, head)
    _shard(shard, embeddings)
    for layer in causal.model.layers:
        _quantise(layer, precision, place)
        _move(layer, precision, place)
        _as_parameters(layer)
        _shard(shard, layer)
    _move(causal, precision, place)
    # The root, which lets layers know of each other; PEFT calls what is outside without its hooks.
    shard(causal.model, ignored_params=set(causal.model.parameters()))
    for module in causal.modules():
        # Else the compiler would not look whether one layer's graph is right for another.
        module._is_fsdp_managed_module = False
    ranks.joined = True
    whole, here = (size / 2**30 for size in base_bytes(tuned))
    seconds = time.monotonic() - began
    say(f"{here:.1f} GiB of a base of {whole:.1f} are on this GPU, after {seconds:.0f} s")


def _shard(shard: Any, module: nn.Module) -> None:
    """Cut what is frozen in a module."""
    shard(module, ignored_params={p for p in module.parameters() if p.requires_grad})


def _move(module: nn.Module, precision: str, place: torch.device) -> None:
    """Bring to the GPU what is not cut yet, in the type that it is computed in."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and parameter.numel():
            plain = not parameter.requires_grad and parameter.dtype in PLAIN
            kept = load.element(precision) if plain else parameter.dtype
            parameter.data = parameter.data.to(place, kept)
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            setattr(each, name, buffer.to(place))


def _quantise(layer: nn.Module, precision: str, place: torch.device) -> None:
    """Give a layer's projections their weights, on the GPU and as they are computed with."""
    for parent in list(layer.modules()):
        for name, module in list(parent.named_children()):
            if hasattr(module, "raw"):
                weight = module.raw.to(place).to(load.element(precision))
                del module.raw
                parent.add_module(name, _quantised(module, weight, precision))
    if precision == "fp8":
        projections.gather(layer)
    elif precision == "nf4":
        nf4.lighten(layer)
    elif precision == "int8":
        int8.lighten(layer)


def _quantised(plain: nn.Linear, weight: torch.Tensor, precision: str) -> nn.Linear:
    """A projection with this weight [out, in]."""
    if precision == "nf4":
        return nf4.linear(plain, weight)
    if precision == "int8":
        return int8.linear(plain, weight)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return fp8.Fp8Linear(plain) if precision == "fp8" and fp8.fits(plain) else plain


def _as_parameters(layer: nn.Module) -> None:
    """Have what a layer's projections compute with known as parameters, which alone are cut."""
    for module in layer.modules():
        held = module._buffers
        if isinstance(module, nn.Linear) and any(name in held for name in ("stored", "stored0")):
            module.weight = None  # it is what is stored
        if isinstance(module, fp8.Fp8Linear):
            module.weight = module.scales = None  # they are parts of what is computed together
        if isinstance(module, nn.Linear | projections.Together):
            for name in [n for n, b in held.items() if b is not None and b.dim()]:
                kept = held.pop(name)
                # Products view them as the integers that they are.
                kept = kept if kept.is_floating_point() else kept.view(BYTE)
                module.register_parameter(name, nn.Parameter(kept, requires_grad=False))


def _head_of(embeddings: Any, head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of a head that is the embeddings."""
    with gathered(embeddings):
        return F.linear(hidden, embeddings.weight, head.bias)


@contextlib.contextmanager
def gathered(module: Any) -> Iterator[None]:
    """A module's parameters brought together, if they are cut."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    yield
    module.reshard()


@contextlib.contextmanager
def head(causal: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """A model's last product: weight [vocabulary, width] and bias."""
    own = causal.get_output_embeddings()
    holder = causal.get_input_embeddings() if own.weight is None else own
    with gathered(holder):
        yield holder.weight, own.bias


def kind(module: nn.Module) -> type:
    """A module's class, as it was before it was cut."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def base_bytes(tuned: Any) -> tuple[int, int]:
    """Bytes of the base: of all its parts together, and of those that are here."""
    whole = here = 0
    for tensor in [*tuned.parameters(), *tuned.buffers()]:
        if not tensor.requires_grad:
            whole += tensor.numel() * tensor.element_size()
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            here += local.numel() * local.element_size()
    return whole, here
