"""What an error of CUDA says of the GPU: lost, or a fault of ours. By words: torch is not imported for it."""

# CUDA's own words. A failed launch may be a kernel's fault, too; three attempts without progress end that loop.
LOST = (
    "unspecified launch failure", "uncorrectable ecc error", "uncorrectable nvlink error", "unknown error",
    "hardware stack error", "no cuda-capable device", "no cuda gpus are available", "busy or unavailable",
    "system not yet initialized", "gpu is lost", "fallen off the bus",
)  # fmt: skip
KINDS = ("AcceleratorError", "RuntimeError", "CudaError")


def lost(error: BaseException | None) -> str | None:
    """The first line of what CUDA says if the GPU is lost; None for any other error.

    What a failed assert on the device says, such as an index out of bounds, is our own fault.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        words = str(error).lower()
        of_cuda = type(error).__name__ in KINDS and ("cuda" in words or "gpu" in words)
        if of_cuda and any(phrase in words for phrase in LOST):
            return str(error).strip().splitlines()[0]
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None
