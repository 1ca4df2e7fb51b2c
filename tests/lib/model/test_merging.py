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


@pytest.mark.case("C14")
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


DAMAGES = (
    "base alone",
    "twice",
    "half",
    "transposed",
    "a layer missed",
    "in fp8",
    "another weight",
    "nan",
)


def damage(tensors: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], how: str) -> None:
    """Spoil a merged model as a wrong merge would; `plain`: the base's weights."""
    changed = [name for name in tensors if not torch.equal(tensors[name], plain[name])]
    assert len(changed) == 4
    if how == "another weight":
        tensors["model.norm.weight"][3] *= 1.01
    if how == "nan":
        tensors["model.norm.weight"][0] = torch.nan
    for number, name in enumerate(changed):
        own = plain[name].float()
        delta = tensors[name].float() - own
        if how == "base alone" or (how == "a layer missed" and "layers.1" in name):
            tensors[name] = plain[name]
        elif how in ("twice", "half"):
            tensors[name] = (own + {"twice": 2, "half": 0.5}[how] * delta).bfloat16()
        elif how == "transposed" and "q_proj" in name:
            tensors[name] = (own + delta.T).bfloat16()
        elif how == "in fp8" and number == 0:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn).bfloat16()


@pytest.mark.case("C13")
@pytest.mark.parametrize("how", DAMAGES)
def test_a_merge_gone_wrong_is_caught(base: Base, tuned: Path, tmp_path: Path, how: str) -> None:
    """By its weights, each of which is named, and where it says something else, by what it says."""
    job = merging.Merge(base, tuned, "bf16", "original")
    folder = written(job, tmp_path / "merged")
    assert job.check(folder) == {
        "changed": 4,
        "kept": 16,
        "roundings": pytest.approx(0.5, abs=0.02),
    }
    path = folder / "model.safetensors"
    tensors, plain = load_file(path), load_file(base.folder / "model.safetensors")
    damage(tensors, plain, how)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        GateFailed, match=r"(q_proj|norm).weight as it was written is not base plus"
    ):
        job.check(folder)
    # Rounding moves it as much, or its q_proj hardly matters, as it is random.
    if how not in ("in fp8", "another weight", "transposed"):
        with pytest.raises(GateFailed, match="not published"):
            job.prove(folder, ROWS, 0.5)


def test_numbers_that_are_not_finite_are_not_merged(
    base: Base, tuned: Path, tmp_path: Path
) -> None:
    """In the adapter, or only once they are added."""
    factors = load_file(tuned / WEIGHTS)
    name = next(name for name in factors if "lora_B" in name)
    for number in (torch.inf, torch.nan):
        save_file(factors | {name: torch.full_like(factors[name], number)}, tuned / WEIGHTS)
        with pytest.raises(GateFailed, match=f"not finite in {name}, so it was not merged"):
            merging.Merge(base, tuned, "bf16", "original")
    large = {end: factor * (100 if "lora_A" in end else 1) for end, factor in factors.items()}
    save_file(large | {name: torch.full_like(factors[name], 3e38)}, tuned / WEIGHTS)
    job = merging.Merge(base, tuned, "bf16", "original")
    with pytest.raises(GateFailed, match="is not finite once merged"):
        written(job, tmp_path / "merged")


def test_an_adapter_that_was_never_trained_is_not_merged(base: Base, tmp_path: Path) -> None:
    model = adapter.attach(load.load(base, "fp32"), base, 4, 8, 0.0, ("q_proj", "v_proj"), 0)
    adapter.save(model, tmp_path / "adapter")
    with pytest.raises(GateFailed, match=r"was never trained \(every B is zero\)"):
        merging.Merge(base, tmp_path / "adapter", "bf16", "original")


@pytest.mark.case("C4")
def test_adapters_for_other_models_or_of_other_kinds_are_refused(base: Base, tuned: Path) -> None:
    factors = load_file(tuned / WEIGHTS)
    other = {name.replace("q_proj", "w_proj"): factor for name, factor in factors.items()}
    save_file(other, tuned / WEIGHTS)
    with pytest.raises(
        BadData, match=r"made for another base: .* has no model.layers.0.self_attn.w_proj"
    ):
        merging.Merge(base, tuned, "bf16", "original")
    wide = {
        name: factor.repeat(1, 2) if "lora_A" in name else factor
        for name, factor in factors.items()
    }
    save_file(wide, tuned / WEIGHTS)
    with pytest.raises(BadData, match=r"q_proj of shape \(64, 128\)"):
        merging.Merge(base, tuned, "bf16", "original")
    save_file(factors, tuned / WEIGHTS)
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
    assert not any(
        parameter.is_meta
        for parameter in proving.model(base.folder, Shards(base.folder), folder, CPU).parameters()
    )
    model = proving.streamed(base.folder, Shards(base.folder), folder, CPU)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    found = proving.logits(model, ROWS, CPU).split([len(row) for row in ROWS])
    for row, part in zip(ROWS, found, strict=True):
        with torch.no_grad():
            wanted = whole(input_ids=torch.tensor([row])).logits[0].float()
        assert torch.allclose(part, wanted, atol=1e-5)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("memory", ["whole", "streamed"])
def test_greedy_answers_are_those_of_generate_up_to_the_first_that_differs(
    base: Base, tuned: Path, memory: str
) -> None:
    """Prompts of several lengths in one batch, whole in memory or part by part."""
    prompts = [ROWS[0], ROWS[1][:9], [7]]
    stops = [2]
    make = getattr(proving, memory)
    model = make(base.folder, Shards(base.folder), tuned, CPU)
    said = proving.speak(model, prompts, stops, CPU)
    count = {"whole": proving.SPOKEN, "streamed": proving.SPOKEN_STREAMED}[memory]
    plain: Any = adapter.load(load.load(base, "fp32", CPU), tuned, base)
    alone: Any = load.load(base, "fp32", CPU)
    wanted, others = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for whole, found in ((plain, wanted), (alone, others)):
            out = whole.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                do_sample=False, eos_token_id=stops, pad_token_id=0, use_cache=True,
            )  # fmt: skip
            found.append(out[0, len(prompt) :].tolist())
    assert said == wanted
    assert proving.follow(model, prompts, said, CPU) == said
    followed = proving.follow(make(base.folder, Shards(base.folder), None, CPU), prompts, said, CPU)
    for one, other, own in zip(said, others, followed, strict=True):
        same = next((n for n in range(len(one)) if one[n] != other[n]), len(one))
        assert own == other[: same + 1]
    assert followed != said


def test_an_answer_ends_with_its_stop(base: Base, tuned: Path) -> None:
    model = proving.whole(base.folder, Shards(base.folder), tuned, CPU)
    prompts = [ROWS[0], [7]]
    free = proving.speak(model, prompts, [], CPU)
    assert [len(row) for row in free] == [proving.SPOKEN] * 2
    stops = [row[3] for row in free]
    for row, cut in zip(free, proving.speak(model, prompts, stops, CPU), strict=True):
        assert cut == row[: len(cut)]
        assert cut[-1] in stops
        assert not set(cut[:-1]) & set(stops)


def test_the_report_has_the_answers_of_both_sides(base: Base, tuned: Path, tmp_path: Path) -> None:
    """The same, and those of a model that has no adapter in it."""
    job = merging.Merge(base, tuned, "nf4", "dequantized")
    folder = written(job, tmp_path / "merged")
    prompts, decode = [ROWS[0], [7]], lambda ids: " ".join(map(str, ids))
    found = job.answers(folder, prompts, [2], decode)
    assert merging.share_equal(found) == 1
    assert all(entry["merged"] == entry["as_trained"] for entry in found)
    found = job.answers(base.folder, prompts, [2], decode)
    assert [entry["prompt"] for entry in found] == [" ".join(map(str, p)) for p in prompts]
    for entry in found:
        merged, trained = (entry[side].split() for side in ("merged", "as_trained"))
        same = entry["equal_tokens"]
        assert merged[:same] == trained[:same]
        assert len(merged) == entry["tokens"]
        assert trained[same:] != merged[same : same + 1] or same == entry["tokens"]
    share = merging.share_equal(found)
    assert share == sum(e["equal_tokens"] for e in found) / sum(e["tokens"] for e in found) < 1
