"""The five stages on a real model, and what others can do with what they leave."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stages.lib.run.fields import MEASURED
from tests.conftest import REAL_ROWS, ROOT, clean_environment, run_stages
from tests.forking import run_forked
from tests.refusals import refused

SMOKE = ("--env-file", str(ROOT / "env" / "smoke.env"))
STAGES = ("prepare-data", "train", "evaluate", "merge")
NAMES = dict(zip(STAGES, ("data", "adapter", "evaluation", "merged"), strict=True))
FILES = {
    "data": {
        "train.arrow", "held_out.arrow", "prompts.jsonl", "prompt_format.json", "ledger.jsonl",
        "rejects.jsonl", "preview.html",
    },
    "adapter": {
        "README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja", "prompt_format.json", "last/adapter_model.safetensors",
        "last/adapter_config.json",
    },
    "evaluation": {"evaluation.json", "evaluation.md", "evaluation.html"},
    "merged": {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "merge_report.json",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the preset `smoke` on the embedded model."""
    folder = tmp_path_factory.mktemp("smoke")
    for stage in STAGES:
        done = run_stages(folder, *SMOKE, stage, "--run-dir", "run")
        assert done.returncode == 0, done.stderr
    return folder


def manifest(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def test_every_artifact_is_whole_and_says_what_made_it(smoke: Path) -> None:
    for name, expected in FILES.items():
        folder = smoke / "run" / name
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert found == expected | {"manifest.json"}
        made = manifest(folder)
        assert made["files"].keys() == expected
        assert {"stage", "inputs", "settings", "metrics", "versions", "wall_seconds"} <= made.keys()
        for file, entry in made["files"].items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == entry["sha256"]
    assert not list((smoke / "scratch").iterdir())
    assert {p.name for p in (smoke / "run").iterdir()} == {
        *FILES,
        "checkpoints",
        "attempts",
        "tensorboard",
    }


@pytest.mark.case("G10")
@pytest.mark.promise("P10")
def test_a_rerun_with_nothing_changed_says_so_within_two_seconds(smoke: Path) -> None:
    for stage in STAGES:
        began = time.perf_counter()
        done = run_stages(
            smoke, *SMOKE, stage, "--run-dir", "run", env={"PYTHONPROFILEIMPORTTIME": "1"}
        )
        seconds = time.perf_counter() - began
        assert done.returncode == 0, done.stderr
        assert "finished and nothing changed" in done.stderr
        assert " torch\n" not in done.stderr
        assert seconds < 2


def test_verify_hashes_again_and_force_makes_anew(smoke: Path) -> None:
    path = smoke / "run" / "evaluation" / "evaluation.md"
    before = (smoke / "run" / "data" / "manifest.json").stat().st_mtime_ns
    content = path.read_bytes()
    path.write_bytes(content.replace(b"base", b"bose", 1))
    assert run_forked(smoke, *SMOKE, "evaluate", "--run-dir", "run").returncode == 0
    done = run_forked(smoke, *SMOKE, "evaluate", "--run-dir", "run", "--verify")
    assert done.returncode == 65
    assert "evaluation.md" in done.stderr
    path.write_bytes(content)
    done = run_forked(smoke, *SMOKE, "prepare-data", "--run-dir", "run", "--force")
    assert done.returncode == 0
    assert (smoke / "run" / "data" / "manifest.json").stat().st_mtime_ns > before
    # The same contents: nothing after it has become stale.
    assert run_forked(smoke, *SMOKE, "evaluate", "--run-dir", "run").returncode == 0


def test_the_adapter_loads_in_plain_peft_with_equal_logits(smoke: Path, sample_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.lib.model import adapter, load
    from stages.lib.model.base import Base

    folder = smoke / "run" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(sample_model)
    ids = AutoTokenizer.from_pretrained(folder)("### Human: Hi### Assistant:", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, folder).eval()
    base = Base("sample", None)
    base.fetch()
    ours = adapter.load(load.load(base, "fp32", torch.device("cpu")), folder, base).eval()
    with torch.no_grad():
        theirs, found = plain(**ids).logits, ours(**ids).logits
        with ours.disable_adapter():
            without = ours(**ids).logits
    assert torch.equal(theirs, found)
    assert not torch.allclose(found, without)


@pytest.mark.case("C11")
def test_the_merged_model_loads_plainly_and_says_the_same(smoke: Path, sample_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smoke / "run" / "merged"
    merged, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    text = "### Human: What does len do?### Assistant: It returns the number of items."
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32)
    with torch.no_grad():
        alone = base(**ids).logits
        tuned = PeftModel.from_pretrained(base, smoke / "run" / "adapter").eval()(**ids).logits
        found = merged(**ids).logits
    assert (found - tuned).norm() < 0.2 * (alone - tuned).norm()
    assert torch.equal(found.argmax(-1), tuned.argmax(-1))


def test_evaluation_holds_both_sides(smoke: Path) -> None:
    found = json.loads((smoke / "run" / "evaluation" / "evaluation.json").read_text())
    assert found["tuned"]["loss"] < found["base"]["loss"]
    assert len(found["answers"]) == 2
    for entry in found["answers"]:
        assert {"question", "prompt", "reference", "base", "tuned"} <= entry.keys()
    for side in ("base", "tuned"):
        assert 0 < found[side]["accuracy"] < 1
        assert found[side]["perplexity"] > 1
    assert (
        found["held_out_conversations"]
        == manifest(smoke / "run" / "data")["metrics"]["rows_held_out"]
    )
    assert [part["source"] for part in found["by_source"]] == ["sample"]
    made = manifest(smoke / "run" / "adapter")
    assert found["tuned"]["loss"] == pytest.approx(made["metrics"]["held_out_loss"], abs=0.02)
    text = (smoke / "run" / "evaluation" / "evaluation.md").read_text()
    assert found["answers"][0]["question"] in text
    assert found["sentence"] in text


@pytest.mark.promise("P9")
def test_a_gate_that_is_not_met_ends_with_82_again_and_again(smoke: Path) -> None:
    """What was measured stays, is not measured anew, and says what became of the gate."""
    folder = smoke / "run" / "evaluation"
    before = manifest(folder)
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["gate"] is None
    bound = round(result["tuned"]["loss"], 3) - 0.1
    args = (*SMOKE, "evaluate", "--run-dir", "run")
    for _ in range(2):
        began = time.perf_counter()
        done = run_forked(smoke, *args, env={"GATE": f"loss_difference<0,loss<{bound:.3f}"})
        assert time.perf_counter() - began < 2
        assert done.returncode == 82, done.stderr
        assert f"asked is <{bound:.3f}".rstrip("0") in done.stderr
        assert json.loads((smoke / "run" / "error.json").read_text())["code"] == "gate-failed"
        now, judged = manifest(folder), json.loads((folder / "evaluation.json").read_text())
        assert judged == result | {"gate": now["metrics"]["gate"]}
        assert [c["met"] for c in judged["gate"]["conditions"]] == [True, False]
        assert "not met" in (folder / "evaluation.html").read_text()
        for name in ("inputs", "settings", "versions", "device", "wall_seconds"):
            assert now[name] == before[name]
    few = run_forked(smoke, *args, "--gate", "better")
    assert few.returncode == 82
    assert "fewer than 6 held-out conversations" in few.stderr
    done = run_forked(smoke, *args)
    assert done.returncode == 0, done.stderr
    assert manifest(folder)["files"] == before["files"]
    assert not (smoke / "run" / "error.json").exists()


def test_the_report_shows_what_the_evaluation_holds(smoke: Path) -> None:
    result = json.loads((smoke / "run" / "evaluation" / "evaluation.json").read_text())
    done = run_forked(smoke, *SMOKE, "report", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    words = "held-out loss, nats a token"
    assert result["summary"][0] == [words, *(f"{result[s]['loss']:.3f}" for s in ("base", "tuned"))]
    line = next(line for line in done.stdout.splitlines() if words in line)
    assert line.split()[-2:] == result["summary"][0][1:]
    assert result["summary"][2][0] == result["answers"][0]["question"]
    page = (smoke / "run" / "report.html").read_text()
    assert len(page) < 3_000_000
    assert "<script" not in page
    # All but what a CPU, two steps and the stages that were not run leave out.
    notes = [
        note for note in page.split('<p class="missing">')[1:] if "not recorded" not in note[:80]
    ]
    assert [note.split(":")[0] for note in notes] == ["There is no prediction to compare"]
    for name in STAGES:
        made = manifest(smoke / "run" / NAMES[name])
        assert all(entry["sha256"] in page for entry in made["files"].values())
        assert all(setting in page for setting in made["settings"])


def test_the_account_of_the_adapters_health_is_kept(smoke: Path) -> None:
    found = [
        manifest(smoke / "run" / name)["metrics"]["health"] for name in ("adapter", "evaluation")
    ]
    trained, evaluated = found
    first = trained["first_gradients"]
    assert (first["step"], first["modules"], first["without_input"]) == (1, 60, [])
    assert len(trained["b_norms"]) == 60
    assert min(trained["b_norms"].values()) > 0
    assert trained["unmoved"] == []
    assert min(trained["logit_change"], evaluated["logit_change"]) > 0
    assert evaluated | {"logit_change": None} == trained | {"logit_change": None}


@pytest.mark.case("H8")
@pytest.mark.parametrize(
    ("factor", "value", "words"),
    [("lora_A", torch.nan, "not finite, "),
     ("lora_B", 0.0, "the adapter changes nothing: no B matrix has moved from zero")],
)  # fmt: skip
def test_a_dead_adapter_is_not_evaluated(
    smoke: Path, tmp_path: Path, factor: str, value: float, words: str
) -> None:
    """Published whole, so that only a look at its numbers can tell."""
    from safetensors.torch import load_file, save_file

    from stages.lib.run import artifact

    for name, target in (("data", "run/data"), ("adapter", "made")):
        shutil.copytree(smoke / "run" / name, tmp_path / target)
    made = manifest(tmp_path / "made")
    (tmp_path / "made" / "manifest.json").unlink()
    path = tmp_path / "made" / "adapter_model.safetensors"
    changed = {n: t.fill_(value) if factor in n else t for n, t in load_file(path).items()}
    save_file(changed, path)
    artifact.publish(tmp_path / "made", tmp_path / "run" / "adapter", made)
    done = run_forked(tmp_path, *SMOKE, "evaluate", "--run-dir", "run")
    refused(done, 82, words)


def test_prompts_from_a_file_and_from_standard_input(smoke: Path) -> None:
    (smoke / "prompts.txt").write_text("What is a list?\n\nWhat is `$(touch x)`?\n")
    args = (*SMOKE, "generate", "--run-dir", "run", "--prompts-file", "prompts.txt")
    done = run_forked(smoke, *args)
    assert done.returncode == 0, done.stderr
    path = smoke / "run" / "generations" / "generations.jsonl"
    assert done.stdout.strip() == "run/generations/generations.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    found.sort(key=lambda entry: entry["number"])
    assert [entry["prompt"] for entry in found] == ["What is a list?", "What is `$(touch x)`?"]
    assert all(entry["finish"] in ("stop", "length") for entry in found)
    assert "nothing changed" in run_forked(smoke, *args).stderr

    one = run_forked(smoke, *SMOKE, "generate", "--run-dir", "run", stdin="What is a list?\n")
    assert one.returncode == 0
    assert one.stdout.strip() == found[0]["answer"]
    shutil.rmtree(smoke / "run" / "generations")


def test_the_classic_recipe_to_the_letter(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """The preset as it ships, on a tiny Llama in 4 bit; only base, data and the length differ."""
    preset = ("--env-file", str(ROOT / "env" / "llama2-7b.env"))
    env = {"BASE_MODEL": str(tiny), "DATASET": str(rows), "MAX_LENGTH": "512", "RUN_DIR": "run"}
    for stage in ("prepare-data", "train", "evaluate"):
        done = run_forked(tmp_path, *preset, stage, env=env)
        assert done.returncode == 0, done.stderr
    made = manifest(tmp_path / "run" / "adapter")
    values = {name: entry["value"] for name, entry in made["settings"].items()}
    assert values["BASE_PRECISION"] == "nf4"
    assert values["OPTIMIZER"] == "adamw_8bit"
    assert values["LORA_TARGETS"] == "q_proj,v_proj"
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 16, 0.05)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    data = manifest(tmp_path / "run" / "data")
    assert data["settings"]["MAX_ROWS"] == {"value": 1000, "from": "preset"}
    counts = data["metrics"]
    # Everything is learned but each row's first token, and EOS ends every row.
    assert counts["trainable_tokens"] == counts["tokens"] - counts["rows_kept"]
    assert counts["rows_ending_in_trained_eos"] == counts["rows_kept"] == 40


def test_the_fast_recipe_goes_all_the_way(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """`llama2-7b-fp8` as it ships; on a CPU its products are those of the same numbers in fp32."""
    preset = ("--env-file", str(ROOT / "env" / "llama2-7b-fp8.env"))
    env = {"BASE_MODEL": str(tiny), "DATASET": str(rows), "MAX_LENGTH": "512", "RUN_DIR": "run"}
    for stage in ("prepare-data", "train", "evaluate", "merge"):
        done = run_forked(tmp_path, *preset, stage, env=env | {"MAX_NEW_TOKENS": "4"})
        assert done.returncode == 0, done.stderr
    said = run_forked(tmp_path, *preset, "generate", "--prompt", "Why?", env=env)
    assert said.returncode == 0, said.stderr
    metrics = manifest(tmp_path / "run" / "adapter")["metrics"]
    assert metrics["base_precision"] == "fp8"
    assert metrics["recomputed_layers"] == 0
    assert metrics["predicted_gpu_bytes"] is None  # nothing is planned without a GPU
    assert metrics["predicted_tokens_per_second"] is None
    assert metrics["matmul_ceiling_share"] is None
    assert metrics["model_flops_per_second"] > 0
    assert metrics["step_seconds"] > 0
    told = run_forked(tmp_path, *preset, "plan", "--json", env=env)
    assert told.returncode == 0, told.stderr
    planned = json.loads(told.stdout)
    assert planned["amount"]["steps"] == metrics["steps"]
    assert planned["amount"]["tokens"] == metrics["tokens"]
    assert planned["adapter"]["parameters"] == metrics["trainable_parameters"]
    assert planned["off"]["beside"] == []
    steps = [entry for entry in metrics["history"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, metrics["steps"] + 1))
    known = {"step", "loss", "learning_rate", "grad_norm"}
    assert all(known <= entry.keys() <= known | set(MEASURED) for entry in steps)


def test_a_run_that_offloads_ends_in_the_same_adapter(smoke: Path, tmp_path: Path) -> None:
    """Byte for byte, and its manifest says how it went."""
    shutil.copytree(smoke / "run" / "data", tmp_path / "run" / "data")
    done = run_forked(
        tmp_path, *SMOKE, "train", "--run-dir", "run", "--recompute", "offload",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, wanted = (manifest(folder / "run" / "adapter") for folder in (tmp_path, smoke))
    assert (found["metrics"]["offloaded_layers"], wanted["metrics"]["offloaded_layers"]) == (30, 0)
    assert found["metrics"]["lean_layers"] == found["metrics"]["recomputed_layers"] == 0
    name = "adapter_model.safetensors"
    assert found["files"][name] == wanted["files"][name]


def test_the_base_is_nf4_double_quantised_computing_in_bf16(tiny: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    from stages.lib.model import load
    from stages.lib.model.base import Base

    base = Base(str(tiny), None)
    base.fetch()
    layer = load.load(base, "nf4").model.layers[0].self_attn.q_proj
    assert isinstance(layer, Linear4bit)
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16


@pytest.fixture(scope="module")
def prepared(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run` with data for the tiny model, in rows of 128 tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    data = ("--dataset", str(rows), "--base-model", str(tiny), "--max-length", "128")
    done = run_forked(folder, "prepare-data", "--run-dir", "run", *data)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_rows_that_are_too_long_for_the_base_are_refused(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    common = ("--run-dir", "run", "--base-model", str(tiny))
    assert run_forked(tmp_path, "prepare-data", *common, "--dataset", str(rows)).returncode == 2


@pytest.mark.parametrize("precision", ["int8", "bf16", "auto"])
def test_other_precisions_train(tiny: Path, prepared: Path, tmp_path: Path, precision: str) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    done = run_forked(
        tmp_path, "train", "--run-dir", "run", "--base-model", str(tiny), "--base-precision", precision,
        "--batch-tokens", "256", "--learning-rate", "1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    history = manifest(tmp_path / "run" / "adapter")["metrics"]["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_warm_start_begins_where_the_adapter_ended(
    tiny: Path, prepared: Path, tmp_path: Path
) -> None:
    common = ("--base-model", str(tiny), "--base-precision", "fp32", "--batch-tokens", "256")
    for run in ("one", "two"):
        shutil.copytree(prepared, tmp_path / run)
    first = run_forked(tmp_path, "train", "--run-dir", "one", *common, "--learning-rate", "1e-2")
    assert first.returncode == 0, first.stderr
    args = (
        "train",
        "--run-dir",
        "two",
        *common,
        "--init-adapter",
        "one",
        "--learning-rate",
        "1e-7",
    )
    done = run_forked(tmp_path, *args, "--max-steps", "1")
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    one, two = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
        for run in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert any(not torch.equal(tensor, two[name]) for name, tensor in one.items())  # it did move
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-6)
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, ...], bytes]:
    """A recipe of forty steps, and the adapter that it makes in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = (
        "train", "--base-model", str(tiny), "--base-precision", "nf4", "--rank", "16",
        "--batch-tokens", "512", "--micro-batch-tokens", "128", "--max-steps", "40",
    )  # fmt: skip
    shutil.copytree(prepared, folder / "whole")
    assert run_forked(folder, *recipe, "--run-dir", "whole").returncode == 0
    return recipe, (folder / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.sweep
@pytest.mark.promise("P2", "P9")
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.promise("P2", "P3")
def test_stopped_and_started_again_it_is_the_same_adapter(
    prepared: Path,
    uninterrupted: tuple[tuple[str, ...], bytes],
    tmp_path: Path,
    kill: signal.Signals,
) -> None:
    """Through the command line: stopped once a checkpoint is there, then the same command."""
    recipe, whole = uninterrupted
    shutil.copytree(prepared, tmp_path / "cut")
    command = [sys.executable, "-m", "stages", *recipe, "--run-dir", "cut"]
    with subprocess.Popen(
        command, env=clean_environment(tmp_path), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        while not list((tmp_path / "cut" / "checkpoints").glob("step-*/manifest.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(kill)
        process.wait()
    assert process.returncode == (75 if kill == signal.SIGTERM else -kill)
    assert not (tmp_path / "cut" / "adapter").exists()
    done = run_forked(tmp_path, *recipe, "--run-dir", "cut")
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    assert (tmp_path / "cut" / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert manifest(tmp_path / "cut" / "adapter")["metrics"]["resumed_from_step"] > 0
    kept = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert kept[-1] == "step-00000040"
    assert len(kept) <= 3


def trained(folder: Path, tiny: Path, rows: Path, **changed: str) -> dict[str, str]:
    """A finished run on the tiny model in `folder`; the environment that made it."""
    env = {
        "BASE_MODEL": str(tiny), "DATASET": str(rows), "MAX_LENGTH": "128", "BASE_PRECISION": "fp32",
        "BATCH_TOKENS": "256", "RUN_DIR": "run",
    } | changed  # fmt: skip
    for stage in ("prepare-data", "train"):
        done = run_forked(folder, stage, env=env)
        assert done.returncode == 0, done.stderr
    return env


@pytest.fixture(scope="module")
def four_steps(
    tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A finished run of four steps, to be copied, and the environment that made it."""
    folder = tmp_path_factory.mktemp("four steps")
    env = trained(folder, tiny, rows, MAX_STEPS="4")
    return folder / "run", env


@pytest.mark.sweep
def test_a_forced_run_that_is_stopped_goes_on(
    four_steps: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    run, env = four_steps
    shutil.copytree(run, tmp_path / "run")
    # As a forced run leaves it when it is stopped behind its third step.
    for name in ("adapter", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "run" / name)
    done = run_forked(tmp_path, "train", "--force", env=env)
    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stderr
    done = run_forked(tmp_path, "train", "--force", env=env)
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stderr
    other = run_forked(tmp_path, "train", "--learning-rate", "1e-3", env=env)
    assert other.returncode == 78
    assert "LEARNING_RATE was 0.0002, is now 0.001" in other.stderr


@pytest.mark.parametrize("damage", ["flipped", "cut"])
@pytest.mark.case("A10", "A11")
def test_a_corrupt_checkpoint_is_passed_over_and_made_again(
    four_steps: tuple[Path, dict[str, str]], tmp_path: Path, damage: str
) -> None:
    run, env = four_steps
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(weights.parent)
    path = tmp_path / "run" / "checkpoints" / "step-00000004" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-1])
    done = run_forked(tmp_path, "train", env=env)
    assert done.returncode == 0, done.stderr
    assert "passing over a corrupt checkpoint" in done.stderr
    assert "going on from step 3" in done.stderr
    assert weights.read_bytes() == before


def test_corrupt_artifacts_are_mended_as_their_error_says(
    four_steps: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    run, env = four_steps
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = run_forked(tmp_path, "train", env=env)
    assert done.returncode == 65
    assert "--force" in done.stderr
    assert run_forked(tmp_path, "train", "--force", env=env).returncode == 0
    assert "nothing changed" in run_forked(tmp_path, "train", env=env).stderr

    path = tmp_path / "run" / "data" / "train.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    done = run_forked(tmp_path, "prepare-data", env=env)
    assert done.returncode == 65
    assert "--force" in done.stderr
    assert run_forked(tmp_path, "prepare-data", "--force", env=env).returncode == 0


@pytest.mark.case("H7")
def test_without_held_out_rows_it_trains_and_evaluate_says_so(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    env = trained(tmp_path, tiny, rows, MAX_STEPS="2", VALIDATION_FRACTION="0")
    assert manifest(tmp_path / "run" / "adapter")["metrics"]["held_out_loss"] is None
    done = run_forked(tmp_path, "evaluate", env=env)
    assert done.returncode == 66
    assert "VALIDATION_FRACTION" in done.stderr


@pytest.mark.case("G14")
@pytest.mark.promise("P5")
def test_data_that_was_edited_since_is_not_trained_on(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    shutil.copy(rows, tmp_path / "mine.jsonl")
    common = ("--base-model", str(tiny), "--run-dir", "run")
    data = ("--dataset", "mine.jsonl", "--max-length", "128")
    assert run_forked(tmp_path, "prepare-data", *common, *data).returncode == 0
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.write(json.dumps({"text": "### Human: x### Assistant: y"}) + "\n")
    done = run_forked(tmp_path, "train", *common)
    assert done.returncode == 78
    assert "its input dataset was" in done.stderr
    assert "prepare-data" in done.stderr


@pytest.mark.skipif(
    not REAL_ROWS.is_file(), reason=f"the real conversations are not at {REAL_ROWS}"
)
def test_the_loss_falls_on_real_conversations(sample_model: Path, tmp_path: Path) -> None:
    env = {
        "BASE_MODEL": "sample", "BASE_PRECISION": "bf16", "LOSS_ON": "all", "MAX_ROWS": "16",
        "MAX_LENGTH": "128", "BATCH_TOKENS": "512", "EPOCHS": "3", "LEARNING_RATE": "2e-3",
        "SCHEDULE": "constant", "RUN_DIR": "run",
    }  # fmt: skip
    for args in (("prepare-data", "--dataset", str(REAL_ROWS)), ("train",)):
        done = run_forked(tmp_path, *args, env=env)
        assert done.returncode == 0, done.stderr
    metrics = manifest(tmp_path / "run" / "adapter")["metrics"]
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    third = len(losses) // 3
    assert sum(losses[-third:]) < 0.95 * sum(losses[:third])


def test_a_terminal_gets_a_bar_and_the_answer_as_it_is_said(smoke: Path) -> None:
    import pty

    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "stages", *SMOKE, "generate", "--run-dir", "run"]
    with subprocess.Popen(
        command, env=clean_environment(smoke) | {"PROMPT": "Hi", "TERM": "xterm"}, cwd=smoke,
        stdin=subprocess.DEVNULL, stdout=writer, stderr=writer,
    ) as process:  # fmt: skip
        os.close(writer)
        shown = b""
        while True:
            try:
                block = os.read(reader, 1024)
            except OSError:
                break
            if not block:
                break
            shown += block
    os.close(reader)
    assert process.returncode == 0
    lines = shown.decode().splitlines()
    assert lines[0].startswith("generate: preset ")
    assert not lines[0].startswith("{")
    assert any(line.strip() for line in lines[1:]), lines
