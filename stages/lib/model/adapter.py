"""The LoRA adapter, through peft: attached, loaded, saved, and checked to belong to its base."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from stages.lib.model.adapter_files import CONFIG, WEIGHTS, find
from stages.lib.model.base import Base
from stages.lib.run import artifact
from stages.lib.run.artifact import Artifact
from stages.lib.run.exits import BadData, BadSetting, GateFailed


def attach(
    model: Any,
    base: Base,
    rank: int,
    alpha: float,
    dropout: float,
    targets: tuple[str, ...],
    seed: int,
) -> Any:
    """A fresh adapter on a frozen base, its A drawn from `seed`, its B zero.

    Args:
        targets: names of the linear modules, or `all-linear`.

    Raises:
        BadSetting: a target is no module of this base.
    """
    from peft import LoraConfig, get_peft_model

    modules = _modules(model, targets)
    name, revision = base.adapter_name()
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha)
        if alpha == int(alpha)
        else alpha,  # as peft's and vLLM's types have it
        lora_dropout=dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    tuned = get_peft_model(model, config)
    _name_base(tuned, name, revision)
    return tuned


def _modules(model: Any, targets: tuple[str, ...]) -> list[str]:
    """The names of the linear modules that get an adapter; `all-linear` is all but the head."""
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    wanted = linear if targets == ("all-linear",) else set(targets)
    absent = sorted(wanted - linear)
    if absent:
        known = ", ".join(sorted(linear))
        raise BadSetting(
            f"LORA_TARGETS names {absent[0]}, which this base has not; it has {known}, or all-linear"
        )
    return sorted(wanted)


def _name_base(tuned: Any, name: str, revision: str | None) -> None:
    config = tuned.peft_config["default"]
    config.base_model_name_or_path, config.revision = name, revision


def load(
    model: Any, folder: Path, base: Base, trainable: bool = False, dropout: float | None = None
) -> Any:
    """An adapter's weights on its base, every tensor in its place.

    Args:
        dropout: instead of its own, to train it on.

    Raises:
        BadData: cut off, or made for a base of another shape. GateFailed: a weight is not finite.
    """
    from peft import LoraConfig, PeftModel
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        config = LoraConfig.from_pretrained(str(folder))
        config.lora_dropout = config.lora_dropout if dropout is None else dropout
    except (SafetensorError, ValueError, TypeError) as error:
        raise BadData(
            f"the adapter in {folder} cannot be read ({error}); train it again"
        ) from error
    try:
        tuned = PeftModel.from_pretrained(
            model,
            str(folder),
            config=config,
            is_trainable=trainable,
            torch_device=str(model.device),  # peft would choose the GPU for a base on the CPU
        )
    except (RuntimeError, ValueError) as error:
        if "size mismatch" not in str(error) and "not found in the base" not in str(error):
            raise
        raise BadData(
            f"the adapter in {folder} was made for another base: {str(error).splitlines()[0]}"
        ) from error
    live = {name: tuple(t.shape) for name, t in tensors(tuned).items()}
    if live != saved:
        odd = sorted(live.items() ^ saved.items())
        raise BadData(
            f"the adapter in {folder} was made for another base: {odd[0][0]} does not match"
        )
    check_finite(((name, p) for name, p in tuned.named_parameters() if "lora_" in name), folder)
    _name_base(tuned, *base.adapter_name())
    return tuned


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Refuse an adapter by its tensors and their names.

    Raises:
        GateFailed: one is not finite.
    """
    for name, tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise GateFailed(
                f"the adapter in {folder} has a weight that is not finite, {name}; train it again"
            )


def check_base(made: Artifact, base: Base) -> None:
    """Refuse an adapter that was trained on another base than the one that was fetched.

    Raises:
        BadData: another name, commit or contents.
    """
    was, now = made.manifest["inputs"]["base"], base.identity()
    if was != now:
        key = next(k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k))
        raise BadData(
            f"the adapter in {made.path} belongs to another base: {key} was {was.get(key)}, "
            f"is now {now.get(key)}; use the base that it was trained on, or train again"
        )


def continued(
    model: Any,
    path: Path,
    base: Base,
    rank: int,
    alpha: float,
    dropout: float,
    targets: tuple[str, ...],
) -> Any:
    """A finished adapter, to be trained on; `path` is itself or its run directory.

    Raises:
        BadSetting: its rank, alpha or targets differ. BadData: it has another base.
    """
    folder = find(path)
    made = artifact.load(folder, deep=True)
    if made:
        check_base(made, base)
    modules = _modules(model, targets)
    tuned = load(model, folder, base, trainable=True, dropout=dropout)
    config = tuned.peft_config["default"]
    for name, old, new in (
        ("LORA_RANK", config.r, rank),
        ("LORA_ALPHA", config.lora_alpha, alpha),
        ("LORA_TARGETS", sorted(config.target_modules), modules),
    ):
        if old != new:
            raise BadSetting(
                f"INIT_ADAPTER {folder} has {name} {old}, the settings say {new}; make them agree"
            )
    return tuned


def save(tuned: Any, folder: Path) -> None:
    """Write the adapter as plain peft reads it, the same bytes for the same weights."""
    # Without this argument peft may ask the hub for the base's config.
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)  # peft writes a set, in the order of the day's hashes
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def assemble(best: Path, last: Path, out: Path) -> None:
    """The folder that users get: the best adapter, and the last one in `last/`."""
    for source, target in ((best, out), (last, out / "last")):
        target.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG):
            shutil.copy(source / name, target)


def trainable(tuned: Any) -> list[torch.nn.Parameter]:
    """The adapter's parameters."""
    return [parameter for parameter in tuned.parameters() if parameter.requires_grad]


def tensors(tuned: Any) -> dict[str, torch.Tensor]:
    """The adapter in memory, under the names that its file has."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(tuned, save_embedding_layers=False))


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file."""
    from safetensors.torch import load_file

    return dict(load_file(folder / WEIGHTS))


def take(tuned: Any, folder: Path) -> None:
    """Put the weights of a saved adapter into the one in memory, which has the same shape."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(tuned, read(folder))
