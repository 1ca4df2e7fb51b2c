"""A merge is refused when it says something else."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.lib.model import adapter, load, merging
from stages.lib.model.base import Base
from stages.lib.run.exits import GateFailed


@pytest.fixture
def tuned(tiny: Path, tmp_path: Path) -> Path:
    """A saved adapter that changes what the tiny model says."""
    base = Base(str(tiny), None)
    base.fetch()
    model = adapter.attach(load.load(base, "fp32"), base, 4, 8, 0.0, ("q_proj", "v_proj"), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapter.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_good_merge_agrees_and_loads_plainly(tiny: Path, tuned: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = Base(str(tiny), None)
    base.fetch()
    found = merging.merge(base, tuned, list(range(5, 60)), tmp_path / "merged")
    assert found["mean_kl"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("damage", ["base alone", "nan"])
def test_a_merge_gone_wrong_is_caught(tiny: Path, tuned: Path, tmp_path: Path, damage: str) -> None:
    base = Base(str(tiny), None)
    base.fetch()
    ids = list(range(5, 60))
    model = adapter.load(load.load(base, "fp32", merging.CPU), tuned, base)
    reference = merging._log_probabilities(model, ids)
    merging.merge(base, tuned, ids, tmp_path / "merged")
    weights = tmp_path / "merged" / "model.safetensors"
    if damage == "base alone":
        shutil.copy(tiny / "model.safetensors", weights)
    else:
        tensors = load_file(weights)
        tensors["model.norm.weight"][0] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(GateFailed, match="not published"):
        merging.compare(reference, tmp_path / "merged", ids)


def test_the_adapters_files_have_the_same_bytes_in_every_process(
    tiny: Path, tmp_path: Path
) -> None:
    import os
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path\n"
        "from stages.lib.model import adapter, load; from stages.lib.model.base import Base\n"
        "base = Base(sys.argv[1], None); base.fetch()\n"
        "names = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj')\n"
        "model = adapter.attach(load.load(base, 'fp32'), base, 4, 8, 0.0, names, 0)\n"
        "adapter.save(model, Path(sys.argv[2]))\n"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tiny), str(tmp_path / seed)],
            env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True,
        )  # fmt: skip
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
