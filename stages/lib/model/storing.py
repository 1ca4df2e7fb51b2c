"""What a training run writes, in bytes, from a base's config. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.plan import MASTER, OPTIMIZER, adapter_parameters
from stages.lib.run import checkpoints, volume

AT_MOST = checkpoints.KEEP + 2  # and the best one, and the one that is being written
COPIES = 2  # of the adapter: the best and the last


def needs(
    run_dir: Path, scratch: Path, config: Mapping[str, Any], setup: Setup
) -> list[tuple[str, Path, int]]:
    """What is still to be written, where, and its bytes, for `preflight.room`; nothing if it cannot be told.

    Args:
        config: of the base, as its file has it.
    """
    shape = Architecture.of(config)
    if shape is None:
        return []
    parameters = adapter_parameters(shape, setup)
    one = int(parameters * (MASTER + OPTIMIZER[setup.optimizer]))
    there = volume.size(run_dir / "checkpoints")
    adapter = COPIES * MASTER * parameters
    return [
        ("checkpoints", run_dir, max(AT_MOST * one - there, one)),
        ("adapter", run_dir, adapter),
        ("scratch", scratch, one + adapter),
    ]
