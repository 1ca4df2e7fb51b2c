"""FlashAttention 3 or 4 instead of torch's kernel for rows of many lengths, where one is there and right."""

import torch

from stages.lib.model import attention

KINDS = {
    9: ("FA3", "FA4"),
    10: ("FA4",),
}  # by the GPU's major compute capability, the better one first
LENGTHS = (40, 1, 23)
CLOSE = 0.02  # relative error of results and gradients in bf16


def adopt(
    heads: int, key_heads: int, width: int, window: int | None, place: torch.device
) -> str | None:
    """Have torch call it from now on, if it computes what attention is for a model's heads.

    Args:
        width: of a head. window: tokens that one sees, itself among them.

    Returns:
        A sentence on what was found, or None if none is installed.
    """
    from torch.nn import attention as torchs

    for name in KINDS.get(torch.cuda.get_device_capability(place)[0], ()):
        try:
            torchs.activate_flash_attention_impl(name)
        except (
            ImportError,
            AttributeError,
            ValueError,
        ):  # it is not installed, or torch has no place for it
            continue
        try:
            off = _off(heads, key_heads, width, window, place)
        except RuntimeError as error:
            why = f"fails ({str(error).splitlines()[0][:80]})"
        else:
            if off <= CLOSE:
                return f"attention over rows of many lengths is that of {name}"
            why = f"is {off:.2g} off"
        torchs.restore_flash_attention_impl()
        return f"{name} is installed but {why}: attention is torch's own"
    return None


def _off(heads: int, key_heads: int, width: int, window: int | None, place: torch.device) -> float:
    """The largest relative error of its result and gradients, against row by row in fp32."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(place, torch.int32)
    many = (heads, key_heads, key_heads)
    given = [torch.randn(1, n, tokens, width, generator=generator).to(place) for n in many]
    upstream = torch.randn(1, tokens, heads, width, generator=generator).to(place)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = inputs = [t.to(dtype).requires_grad_() for t in given]
        result, _ = attention.attend(
            None, q, k, v, None, bounds=bounds, longest=max(LENGTHS), uniform=False, sliding_window=window
        )  # fmt: skip
        of_inputs = torch.autograd.grad(result, inputs, upstream.to(dtype))
        found.append([t.detach().float() for t in (result, *of_inputs)])
    errors = [(near - far).norm() / far.norm() for far, near in zip(*found, strict=True)]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())
