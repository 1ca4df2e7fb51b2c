"""The base model in memory, in the precision that was asked for."""

import contextlib
import logging
from typing import Any

import torch

from stages.lib.model import fp8
from stages.lib.model.base import Base
from stages.lib.run import gpu, progress
from stages.lib.run.exits import BadData, CannotRun

# What transformers says of a base that it cannot make a causal language model of.
UNKNOWN = ("Unrecognized configuration class", "does not recognize this architecture", "model_type")


def device() -> torch.device:
    """The GPU, where there is one."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def describe_device() -> dict[str, Any]:
    """What the run was computed on, for a manifest."""
    if device().type == "cpu":
        return {"type": "cpu", "name": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device())
    return {"type": "cuda", "name": properties.name, "memory_bytes": properties.total_memory}


def peak_gpu_bytes() -> int | None:
    """Most GPU memory that tensors held so far."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def config(base: Base) -> dict[str, Any]:
    """The base's config, all keys filled in."""
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(base.folder, local_files_only=True).to_dict())
    except ValueError as error:
        _check_known(base, error)
        raise


@progress.phase("loading")
def load(base: Base, precision: str, place: torch.device | None = None) -> Any:
    """The base model, frozen.

    Args:
        base: fetched with its weights.
        precision: `nf4` (4 bit, double quantised, bf16 compute), `fp8`, `int8`, `bf16` or `fp32`.
        place: where; the GPU if there is one, unless told.

    Raises:
        CannotRun: the GPU lacks bf16. BadData: the weights do not fill the model.
    """
    place = place or device()
    _check_device(precision, place)
    model = _read(base, element(precision), place, _quantisation(precision))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes repacks a 4-bit weight in the first evaluation, with its scales rounded to
            # bf16, and training goes on from another base than it began with.
            module.support_avx512bf16_for_cpu = False
    if precision == "fp8":
        fp8.convert(model)
    return model


def on_host(base: Base, precision: str) -> Any:
    """The base model as its files have it, frozen, in the host's memory: it is theirs, shared by all processes.

    Projections have their weight, of the type that is on file, as `raw`, and an empty one for peft, so that it
    makes the adapter that it would make without sharding; see `sharding`.

    Raises:
        As `load`.
    """
    _check_device(precision, device())
    model = _read(base, None, torch.device("cpu"), None)
    model.config.dtype = element(precision)
    # peft makes an adapter in this type, but for int8, whose weights have none to offer.
    whole = torch.int8 if precision == "int8" else element(precision)
    for layer in model.model.layers:
        for module in layer.modules():
            if type(module) is torch.nn.Linear:
                module.raw = module.weight.detach()
                module.weight = torch.nn.Parameter(torch.empty(0, dtype=whole), requires_grad=False)
    return model


def element(precision: str) -> torch.dtype:
    """The type of what is not quantised."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _stored(base: Base) -> torch.dtype:
    """The type of a base's weights on file; its files are read without a copy in that type alone."""
    from safetensors import safe_open

    with safe_open(min(base.folder.glob("*.safetensors")), "pt") as file:
        return max(map(file.get_tensor, file.keys()), key=torch.Tensor.numel).dtype


def _check_known(base: Base, error: ValueError) -> None:
    """Where transformers says that it does not know a base, say so, too."""
    if any(words in str(error) for words in UNKNOWN):
        raise CannotRun(
            f"{base.name} is no causal language model that this transformers knows "
            f"(model_type {base.config.get('model_type')!r}); choose another base"
        ) from error


def _check_device(precision: str, place: torch.device) -> None:
    if place.type == "cuda":
        name = torch.cuda.get_device_name(place)
        why = gpu.lacks(precision, name, torch.cuda.get_device_capability(place))
        if why:
            raise CannotRun("; ".join(why))


def _read(base: Base, dtype: torch.dtype | None, place: torch.device, quantisation: Any) -> Any:
    """The base model, frozen, as transformers reads it; in the type on file, if none is named."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every product in int8
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=dtype or _stored(base),
            quantization_config=quantisation,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            device_map={"": place},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be refused below, in a sentence
        )
    except SafetensorError as error:
        raise BadData(
            f"the weights of {base.name} cannot be read ({error}); fetch it again"
        ) from error
    except ValueError as error:
        _check_known(base, error)
        raise
    odd = sorted(str(key) for key in report["mismatched_keys"])
    if odd:
        raise BadData(
            f"the weights of {base.name} have other shapes than its config: {odd[0]}; fetch it again"
        )
    absent = sorted(report["missing_keys"])
    if absent:
        raise BadData(
            f"the weights of {base.name} lack {len(absent)} tensors of its config, {absent[0]} first; "
            "fetch it again"
        )
    model.requires_grad_(False)
    progress.measure(peak_gpu_bytes)
    model.config.use_cache = False  # a cache would hide that rows are packed
    return model.eval()


def _quantisation(precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if precision == "int8" else None


def compute(precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast that a forward pass in this precision runs under; the adapter's masters stay fp32."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision != "fp32")


def recompute(model: Any) -> None:
    """Keep no activations between layers; the backward pass computes them again, to the same numbers."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
