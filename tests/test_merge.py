"""The stage `merge` on a tiny run: what it writes, what it refuses, and what is left when it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stages.lib.data.formats import Format
from stages.lib.data.tokens import Tokens
from stages.lib.model import adapter, load, merging
from stages.lib.model.adapter_files import CONFIG, WEIGHTS
from stages.lib.model.base import Base
from stages.lib.run import artifact
from stages.lib.run.exits import (
    BadData,
    BadSetting,
    CannotWrite,
    GateFailed,
    Missing,
    Reported,
    StageError,
)
from tests.conftest import clean_environment
from tests.test_bad_input import mounted

ADAPTER = {"steps": 3, "epochs": 1.0, "tokens": 90, "trained_tokens": 40, "base_precision": "bf16"}
FILES = {
    "README.md", "LICENSE.txt", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merge_report.json",
    "manifest.json",
}  # fmt: skip
Stage = Callable[..., None]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Run a command in this process; what it raises travels."""
    from stages.__main__ import stages

    folder = tmp_path_factory.mktemp("here")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, clean_environment(folder), clear=True):
        yield lambda *args: stages.main(
            [str(arg) for arg in args], standalone_mode=False, obj=Reported()
        )
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The tiny model with a card and a licence of its own."""
    folder = tmp_path_factory.mktemp("models") / "small"
    shutil.copytree(tiny, folder)
    (folder / "README.md").write_text("---\nlicense: llama2\nlicense_link: LICENSE.txt\n---\n# S\n")
    (folder / "LICENSE.txt").write_text("the terms\n")
    found = Base(str(folder), None)
    found.fetch()
    return found


def trained(base: Base, data: Path, folder: Path, seed: int, **changed: Any) -> Path:
    """A run directory whose adapter was made on `data`, its B drawn from `seed`, or as `changed` says."""
    out = folder / "unpublished"
    rank, targets = changed.get("rank", 4), changed.get("targets", ("q_proj", "v_proj"))
    model = adapter.attach(load.load(base, "fp32"), base, rank, 8, 0.0, targets, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=changed.get("std", 0.05))
    adapter.save(model, out)
    tokens = Tokens(base.folder)
    chat_format = Format.load(data, tokens)
    chat_format.save(out)
    tokens.save(out, chat_format.source)
    known = artifact.load(data)
    assert known
    shutil.copytree(data, folder / "data")
    manifest = {
        "stage": "train", "inputs": {"data": known.digest, "base": base.identity()},
        "settings": {"LORA_RANK": {"value": rank, "from": "flag"}},
        "metrics": ADAPTER | {"held_out_loss": 2.5},
    }  # fmt: skip
    artifact.publish(out, folder / "adapter", manifest)
    shutil.rmtree(out)
    return folder


@pytest.fixture(scope="module")
def data(here: Stage, base: Base, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data."""
    run = tmp_path_factory.mktemp("prepared")
    here("prepare-data", "--base-model", base.name, "--dataset", rows, "--max-length", 64,
         "--run-dir", run, "--validation-fraction", 0.2)  # fmt: skip
    return run / "data"


@pytest.fixture(scope="module")
def runs(base: Base, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs on one base: `a`, and `b` with other targets and another rank."""
    folder = tmp_path_factory.mktemp("runs")
    other = {"rank": 2, "targets": ("v_proj", "o_proj", "up_proj")}
    return {
        "a": trained(base, data, folder / "a", 1), "b": trained(base, data, folder / "b", 2, **other)
    }  # fmt: skip


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run of this test's own."""
    shutil.copytree(runs["a"], tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def merged(here: Stage, runs: dict[str, Path]) -> Path:
    """The merged model of run `a`, which has an evaluation."""
    made = artifact.load(runs["a"] / "adapter")
    assert made
    evaluation = runs["a"] / "unpublished"
    evaluation.mkdir()
    (evaluation / "evaluation.json").write_text("{}")
    sides = {"base": {"loss": 3.25, "answers": None}, "tuned": {"loss": 2.125, "answers": None}}
    manifest = {"inputs": {"adapter": made.digest}, "settings": {}, "metrics": sides}
    artifact.publish(evaluation, runs["a"] / "evaluation", manifest)
    here("merge", "--run-dir", runs["a"])
    return runs["a"] / "merged"


def test_it_stands_alone(merged: Path, base: Base, runs: dict[str, Path]) -> None:
    """Plain transformers finds a whole model there, with the vocabulary and the padding of its base."""
    assert {path.name for path in merged.iterdir()} == FILES
    assert (merged / "LICENSE.txt").read_text() == "the terms\n"
    model = AutoModelForCausalLM.from_pretrained(merged)
    plain = AutoModelForCausalLM.from_pretrained(base.folder)
    found, own = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(base.folder)
    assert found.get_vocab() == own.get_vocab()
    assert found.special_tokens_map == own.special_tokens_map
    assert found.pad_token_id == own.pad_token_id == own.eos_token_id  # so its makers chose
    assert found.encode("Größe </s>?") == own.encode("Größe </s>?")
    assert model.config.vocab_size == plain.config.vocab_size
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    known = json.loads((runs["a"] / "adapter" / "prompt_format.json").read_text())
    asked = [{"role": "user", "content": "Why?"}]
    text = found.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "### Human: Why?### Assistant:"
    assert GenerationConfig.from_pretrained(merged).eos_token_id == known["stop_ids"][0]
    assert (merged / "generation_config.json").read_text().count("pad_token_id") == (
        base.folder / "generation_config.json"
    ).read_text().count("pad_token_id")


def test_its_report_has_every_side(merged: Path) -> None:
    report = json.loads((merged / merging.REPORT).read_text())
    metrics = json.loads((merged / "manifest.json").read_text())["metrics"]
    assert report["weights"]["changed"] == 4
    assert report["fold"]["kl"] < 0.1 * report["effect"]["kl"]
    change = report["from_as_trained"]["original"]["perplexity"] / report["perplexity_as_trained"]
    assert metrics["perplexity_change"] == pytest.approx(change - 1)
    assert len(report["answers"]) == 4
    assert all(entry["prompt"].startswith("### Human: ") for entry in report["answers"])
    assert 0 < metrics["answers_equal"] <= 1


def test_its_card_says_what_made_it(merged: Path, rows: Path, base: Base) -> None:
    card = ModelCard.load(merged / "README.md")
    assert card.data.license == "llama2"
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # the hub takes no folder
    assert card.data.to_dict()["license_link"] == "LICENSE.txt"
    for said in (
        f"`{base.name}`", str(rows), "40 rows of 40", "LORA_RANK=4", "MAX_LENGTH=64", "2.5000",
        "| loss | 3.25 | 2.125 |", "perplexity of this model", "MERGE_BASE was original",
        "the text `### Human:`", "peft 0.",
    ):  # fmt: skip
        assert said in card.text, said
    assert "LICENSE.txt" in card.text
    for path in merged.glob("*.[jm][sd]*"):
        assert os.environ["SCRATCH_DIR"] not in path.read_text(), path


def test_adapters_are_added_up_exactly_and_anew_when_one_changes(
    here: Stage, runs: dict[str, Path], base: Base, data: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """W + a - b / 2, of different ranks and targets; the run directory has no adapter itself."""
    other = tmp_path / "b"
    shutil.copytree(runs["b"], other)
    args = ("merge", "--run-dir", tmp_path / "sum", "--merge-adapters", f"{runs['a']},{other}=-0.5")
    here(*args)
    found = load_file(tmp_path / "sum" / "merged" / "model.safetensors")
    wanted = {name: w.float() for name, w in load_file(base.folder / "model.safetensors").items()}
    for folder, weight in ((runs["a"], 1.0), (other, -0.5)):
        factors = load_file(folder / "adapter" / WEIGHTS)
        config = json.loads((folder / "adapter" / CONFIG).read_text())
        for name in (n for n in factors if "lora_A" in n):
            delta = factors[name.replace("lora_A", "lora_B")] @ factors[name]
            own = name.removeprefix("base_model.model.").replace(".lora_A", "")
            wanted[own] += weight * config["lora_alpha"] / config["r"] * delta
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), wanted[name], rtol=2**-8, atol=1e-6)
    changed = json.loads((tmp_path / "sum" / "merged" / merging.REPORT).read_text())["weights"]
    assert changed["changed"] == 2 * 4
    made = json.loads((tmp_path / "sum" / "merged" / "manifest.json").read_text())
    assert len(made["inputs"]["adapters"]) == 2
    card = (tmp_path / "sum" / "merged" / "README.md").read_text()
    assert "1 times an adapter" in card
    assert "-0.5 times an adapter" in card

    capfd.readouterr()
    here(*args)
    assert "finished and nothing changed" in capfd.readouterr().err
    shutil.rmtree(other)
    trained(base, data, other, 3)
    here(*args)
    assert "input adapters is another" in capfd.readouterr().err
    again = load_file(tmp_path / "sum" / "merged" / "model.safetensors")
    assert any(not torch.equal(tensor, found[name]) for name, tensor in again.items())


@pytest.mark.case("C13")
def test_a_sum_that_is_wrong_is_caught(base: Base, runs: dict[str, Path], tmp_path: Path) -> None:
    """The weights are held against what each adapter adds, not against their sum as peft wrote it."""
    from stages.lib.model import combining

    parts = [(runs["a"] / "adapter", 1.0), (runs["b"] / "adapter", 0.5)]
    out = combining.one(base, parts, tmp_path / "scratch")
    factors = load_file(out / WEIGHTS)
    name = next(name for name in factors if "o_proj.lora_A" in name)
    save_file(factors | {name: factors[name] * 1.5}, out / WEIGHTS)
    job = merging.Merge(base, out, "bf16", "original", parts)
    job.write(tmp_path, lambda path: None)
    with pytest.raises(
        GateFailed, match=r"o_proj.weight as it was written is not base plus adapter"
    ):
        job.check(tmp_path)


def spoil(run: Path, number: float) -> None:
    """Put a number into all B of a run's adapter and publish it again."""
    made = artifact.load(run / "adapter")
    assert made
    shutil.copytree(run / "adapter", run / "spoiled")
    factors = load_file(run / "spoiled" / WEIGHTS)
    for name, factor in factors.items():
        if "lora_B" in name:
            factor.fill_(number)
    save_file(factors, run / "spoiled" / WEIGHTS)
    (run / "spoiled" / "manifest.json").unlink()
    kept = ("stage", "inputs", "settings", "metrics")
    artifact.publish(run / "spoiled", run / "adapter", {key: made.manifest[key] for key in kept})


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("number", "sentence"), [(torch.nan, "not finite"), (0.0, "never trained")]
)
def test_a_sick_adapter_is_refused(
    here: Stage, run: Path, runs: dict[str, Path], listed: bool, number: float, sentence: str
) -> None:
    spoil(run, number)
    args = ["--merge-adapters", f"{runs['a']},{run}=0.5"] if listed else []
    with pytest.raises(GateFailed, match=sentence) as refused:
        here("merge", "--run-dir", run, *args)
    assert str(run / "adapter") in str(refused.value)
    assert not (run / "merged").exists()


@pytest.mark.parametrize(
    ("word", "kind", "sentence"),
    [
        ("{a}=half", BadSetting, "=half"), ("{a}=0", BadSetting, "no finite number but zero"),
        ("{a}=inf", BadSetting, "PATH=0.5"), ("nowhere", Missing, "MERGE_ADAPTERS: there is no adapter"),
        ("{plain}", BadData, "no manifest of `train`"), ("{foreign}", BadData, "another base"),
        ("{a},{foreign}", BadData, "another base"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_up(
    here: Stage, runs: dict[str, Path], base: Base, tmp_path: Path, word: str,
    kind: type[StageError], sentence: str,
) -> None:  # fmt: skip
    plain, foreign = tmp_path / "plain", tmp_path / "foreign"
    shutil.copytree(runs["a"] / "adapter", plain)
    (plain / "manifest.json").unlink()
    shutil.copytree(runs["a"], foreign, ignore=shutil.ignore_patterns("merged"))
    path = foreign / "adapter" / "manifest.json"
    known = json.loads(path.read_text())
    known["inputs"]["base"]["fingerprint"] = "another"
    path.write_text(json.dumps(known))
    words = word.format(a=runs["a"], plain=plain, foreign=foreign)
    with pytest.raises(kind, match=sentence):
        here("merge", "--run-dir", tmp_path / "out", "--merge-adapters", words)
    assert not (tmp_path / "out" / "merged").exists()


@pytest.mark.case("C12")
@pytest.mark.parametrize(("size", "sentence"), [("5m", "MiB free"), ("11m", "No space left")])
@pytest.mark.case("A5")
def test_a_full_disk_leaves_nothing(
    here: Stage, run: Path, tmp_path: Path, size: str, sentence: str
) -> None:
    """Known before anything is written, or in the middle, when the weights are there and no tokenizer."""
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        shutil.copytree(run / "adapter", disk / "run" / "adapter")
        with pytest.raises(CannotWrite, match=sentence):
            here("merge", "--run-dir", disk / "run")
        assert not (disk / "run" / "merged").exists()


@pytest.mark.case("C12")
@pytest.mark.case("A5")
def test_a_full_scratch_folder_leaves_nothing(
    here: Stage, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "disk", "size=2m") as disk:
        monkeypatch.setenv("SCRATCH_DIR", str(disk))
        with pytest.raises(CannotWrite, match="SCRATCH_DIR"):
            here("merge", "--run-dir", run)
    assert not (run / "merged").exists()


@pytest.mark.case("A2")
def test_what_a_killed_merge_leaves_is_debris(here: Stage, run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages", "merge", "--run-dir", str(run)]
    with subprocess.Popen(
        command, env=clean_environment(tmp_path) | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    ) as process:
        while not list((run / "merged").glob("*.safetensors")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.kill()
    assert artifact.load(run / "merged") is None
    (run / "merged" / "model-00009-of-00009.safetensors").write_bytes(b"debris")
    here("merge", "--run-dir", run)
    assert {path.name for path in (run / "merged").iterdir()} == FILES
    assert artifact.load(run / "merged", deep=True)
