"""What an adapter's files hold for others: plain peft, and vLLM by the rules of its source."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stages.lib.model import adapter, adapter_files, load
from stages.lib.model.adapter_files import CONFIG, WEIGHTS
from stages.lib.model.base import Base

# vllm/lora/peft_helper.py: what it demands, what it refuses, and the types of what it reads.
DEMANDED = {"r": int, "lora_alpha": int, "target_modules": list}
REFUSED = {"bias": "none", "modules_to_save": None, "use_dora": False}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
# vllm/lora/utils.py, parse_fine_tuned_lora_name
NAME = re.compile(r"base_model\.model\.(model\.layers\.\d+\.[a-z_.]+\.(\w+))\.lora_([AB])\.weight")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_vllm_and_peft_take_it(tiny: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Of a hub base its id and commit, no more than factors, and names that are parsed."""
    base = Base("owner/name", None)
    base.folder, base.commit = tiny, "a" * 40
    tuned = adapter.attach(load.load(base, "fp32"), base, 8, 16.0, 0.05, targets, 0)
    adapter.save(tuned, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "a" * 40)
    assert config["task_type"] == "CAUSAL_LM"
    for key, kind in DEMANDED.items():
        assert type(config[key]) is kind, key
    assert {key: config[key] for key in REFUSED} == REFUSED
    assert config["r"] in RANKS
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    factors = load_file(tmp_path / WEIGHTS)
    sides: dict[str, set[str]] = {}
    for name, factor in factors.items():
        parsed = NAME.fullmatch(name)
        assert parsed, name
        assert parsed[2] in config["target_modules"]
        sides.setdefault(parsed[1], set()).add(parsed[3])
        assert factor.shape[0 if parsed[3] == "A" else 1] == config["r"]
    assert all(found == {"A", "B"} for found in sides.values())
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(tmp_path).revision == "a" * 40


def test_a_weight_may_follow_a_path_that_has_an_equals_sign(tmp_path: Path) -> None:
    there = tmp_path / "rank=8"
    there.mkdir()
    assert adapter_files._weighted(str(there)) == (there, 1.0)
    assert adapter_files._weighted(f"{there}=-2") == (there, -2.0)
    assert adapter_files._weighted("a=0.25") == (Path("a"), 0.25)
