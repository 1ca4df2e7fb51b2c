"""The versions that shape a result."""

import contextlib
import platform
import sys

from stages import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)


def versions() -> dict[str, str]:
    """The versions that shaped a result."""
    from importlib import metadata  # a tenth of what `--help` may take

    found = {"lora-stages": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].__version__  # with its build, +cpu or +cu130
    return found
