"""Bases that ask for more than the usual."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.lib.model import load
from stages.lib.model.base import Base
from tests.decoders import PLAIN, SIZES


def test_a_base_that_sdpa_cannot_serve_is_loaded_too(tmp_path: Path) -> None:
    described = SIZES | PLAIN["gemma2"][0]  # its attention has soft caps
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = Base(str(tmp_path / "base"), None)
    base.fetch()
    assert load.load(base, "bf16").config._attn_implementation == "eager"


def test_fp8_is_what_was_asked_for(tiny: Path) -> None:
    base = Base(str(tiny), None)
    base.fetch()
    model = load.load(base, "fp8")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
