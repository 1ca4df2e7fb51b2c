"""A merge says what base plus adapter says, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.lib.model import adapter, load, merging, proving, shards
from stages.lib.model.adapter_files import CONFIG, WEIGHTS
from stages.lib.model.base import Base
from stages.lib.model.folding import Trained, empty
from stages.lib.model.shards import Shards
from stages.lib.run.exits import BadData, CannotRun, GateFailed

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [list(range(5, 60)), list(range(90, 120)), [7, 8]]
CPU = torch.device("cpu")


@pytest.fixture
def base(tiny: Path) -> Base:
    """The tiny model."""
    found = Base(str(tiny), None)
    found.fetch()
    return found


@pytest.fixture
def tuned(base: Base, tmp_path: Path) -> Path:
    """A saved adapter that changes what the tiny model says."""
    model = adapter.attach(load.load(base, "fp32"), base, 4, 8, 0.0, ("q_proj", "v_proj"), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapter.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def written(job: merging.Merge, folder: Path) -> Path:
    """A whole merged model."""
    folder.mkdir(exist_ok=True)
    job.write(folder, lambda path: None)
    merging.describe(job, [2], folder)
    return folder


@pytest.mark.parametrize("limit", [2 * 2**30, 20_000])
def test_it_is_what_peft_makes_of_it_in_one_file_or_in_many(
    base: Base, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Against peft's own merge in fp32, and loaded by plain transformers."""
    monkeypatch.setattr(shards, "LARGEST", limit)
    job = merging.Merge(base, tuned, "bf16", "original")
    folder = written(job, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == 2
    whole = adapter.load(load.load(base, "fp32"), tuned, base).merge_and_unload()
    for name, weight in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16)), name
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) is (limit > 20_000)
    if len(files) > 1:
        index = json.loads((folder / shards.INDEX).read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(job.sizes.values())
    report = job.prove(folder, ROWS, 0.5)
    assert report["fold"]["kl"] < 0.01 * report["effect"]["kl"]
    assert report["tokens"] == sum(map(len, ROWS))


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp8"])
def test_a_quantised_run_is_told_which_base_is_closer(
    base: Base, tuned: Path, tmp_path: Path, precision: str
) -> None:
    job = merging.Merge(base, tuned, precision, "dequantized")
    folder = written(job, tmp_path / "merged")
    report = job.prove(folder, ROWS, 0.5)
    near, far = (report["from_as_trained"][kind]["kl"] for kind in ("dequantized", "original"))
    assert near < 1e-6
    assert near < 0.5 * far
    assert report["closer"].startswith(
        f"MERGE_BASE=dequantized is closer to what was trained in {precision}"
    )
    assert merging.summary(report)["mean_kl"] == near
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    with pytest.raises(GateFailed, match="MERGE_MOST_KL is 1e-12"):
        merging.Merge(base, tuned, precision, "original").prove(
            written(merging.Merge(base, tuned, precision, "original"), tmp_path / "other"),
            ROWS,
            1e-12,
        )


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp8", "bf16"])
def test_the_trained_base_is_the_one_that_was_loaded(base: Base, precision: str) -> None:
    """The numbers of every weight as a run holds them."""
    from tests.decoders import _numbers

    model = load.load(base, precision, CPU)
    trained = Trained(Shards(base.folder), empty(base.folder), precision)
    rounded = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = _numbers(module)
            known = trained.get(f"{name}.weight")
            if known is not None:
                assert torch.equal(known.double(), weight.to(torch.bfloat16).double()), name
                rounded += bool(
                    (known != Shards(base.folder)[f"{name}.weight"].to(known.dtype)).any()
                )
    assert (rounded > 0) is (precision != "bf16")


@pytest.mark.parametrize("damage", ["base alone", "nan", "twice"])
def test_a_merge_gone_wrong_is_caught(base: Base, tuned: Path, tmp_path: Path, damage: str) -> None:
    job = merging.Merge(base, tuned, "bf16", "original")
    folder = written(job, tmp_path / "merged")
    path = folder / "model.safetensors"
    tensors, plain = load_file(path), load_file(base.folder / "model.safetensors")
    for name in tensors:
        if damage == "base alone":
            tensors[name] = plain[name]
        elif damage == "twice":
            tensors[name] = 2 * tensors[name] - plain[name]
    if damage == "nan":
        tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(GateFailed, match="not published"):
        job.prove(folder, ROWS, 0.5)


def test_weights_that_are_no_numbers_are_not_written(
    base: Base, tuned: Path, tmp_path: Path
) -> None:
    factors = load_file(tuned / WEIGHTS)
    name = next(name for name in factors if "lora_B" in name)
    factors[name][0, 0] = torch.inf
    save_file(factors, tuned / WEIGHTS)
    with pytest.raises(GateFailed, match="is not finite once merged"):
        written(merging.Merge(base, tuned, "bf16", "original"), tmp_path / "merged")


def test_adapters_for_other_models_or_of_other_kinds_are_refused(base: Base, tuned: Path) -> None:
    factors = load_file(tuned / WEIGHTS)
    other = {name.replace("q_proj", "w_proj"): factor for name, factor in factors.items()}
    save_file(other, tuned / WEIGHTS)
    with pytest.raises(
        BadData, match=r"made for another base: .* has no model.layers.0.self_attn.w_proj"
    ):
        merging.Merge(base, tuned, "bf16", "original")
    config = json.loads((tuned / CONFIG).read_text())
    (tuned / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CannotRun, match="DoRA"):
        merging.Merge(base, tuned, "bf16", "original")


@pytest.mark.parametrize("side", ["base", "adapter"])
def test_what_is_computed_part_by_part_is_the_model(base: Base, tuned: Path, side: str) -> None:
    """To the last bit; rows that were padded say what they say alone."""
    whole: Any = load.load(base, "fp32", CPU)
    folder = None
    if side == "adapter":
        whole, folder = adapter.load(whole, tuned, base), tuned
    model = proving.streamed(base.folder, Shards(base.folder), folder, CPU)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    found = proving.logits(model, ROWS, CPU).split([len(row) for row in ROWS])
    for row, part in zip(ROWS, found, strict=True):
        with torch.no_grad():
            wanted = whole(input_ids=torch.tensor([row])).logits[0].float()
        assert torch.allclose(part, wanted, atol=1e-5)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
