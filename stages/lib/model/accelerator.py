"""The GPU as torch finds it."""

import torch

from stages.lib.run import gpu, gpu_errors
from stages.lib.run.checks import Check, failed
from stages.lib.run.exits import CannotRun, TryAgain

SIDE = 256


def check() -> Check:
    """Whether a product is right on the GPU: CUDA may fail where the driver is well."""
    name = "torch"
    try:
        capability = torch.cuda.get_device_capability()
        kind = torch.bfloat16 if capability >= gpu.BF16 else torch.float32
        ones = torch.ones(SIDE, SIDE, device="cuda", dtype=kind)
        right = bool((ones @ ones == SIDE).all())
    except RuntimeError as error:
        failure = TryAgain if gpu_errors.lost(error) else CannotRun
        said = str(error).strip().splitlines()[0]
        return failed(name, failure, said, "see what nvidia-smi says on the host")
    if not right:
        return failed(name, TryAgain, "a product on the GPU is wrong", "take another GPU")
    version, cuda = torch.__version__, torch.version.cuda
    return Check(name, f"{version}, CUDA {cuda}, multiplies on {torch.cuda.get_device_name()}")
