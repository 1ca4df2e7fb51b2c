"""Mistakes of a user: one sentence with the remedy, the right exit code, and nothing half-written."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stages, clean_environment
from tests.forking import run_forked
from tests.refusals import Result, refused, run_dir_of, sentences, whole, write_preset

# What the finished run was made with; its folder is read by every test and changed by none.
RECIPE = {
    "MAX_LENGTH": 64, "BASE_PRECISION": "fp32", "LORA_RANK": 4, "LORA_ALPHA": 8, "BATCH_TOKENS": 128,
    "MAX_STEPS": 2, "OPTIMIZER": "adamw_torch", "VALIDATION_FRACTION": 0.1, "MAX_NEW_TOKENS": 4,
}  # fmt: skip
SHORT = ["--max-length", "64"]  # the tiny model's context is less than the default


@pytest.fixture(autouse=True)
def scratch_is_left_empty(tmp_path: Path) -> Iterator[None]:
    yield
    scratch = tmp_path / "scratch"
    assert not scratch.exists() or list(scratch.iterdir()) == []


@pytest.fixture(scope="module")
def preset(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("presets") / "tiny.env"
    return write_preset(path, BASE_MODEL=tiny, DATASET=rows, **RECIPE)


def make_run(preset: Path, folder: Path) -> Path:
    for stage in ("prepare-data", "train"):
        result = run_forked(folder, "--env-file", preset, stage, "--run-dir", folder / "run")
        assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Where commands that load torch run behind the tests that do not, one at a time."""
    with ThreadPoolExecutor(1) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def making(
    pool: ThreadPoolExecutor, preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> "Future[Path]":
    return pool.submit(make_run, preset, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def finished(making: "Future[Path]") -> Path:
    """A run directory with data and an adapter."""
    return making.result()


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def data_run(finished: Path, tmp_path: Path) -> Path:
    """A run directory with data and nothing else."""
    shutil.copytree(finished / "data", tmp_path / "run" / "data")
    return tmp_path / "run"


# --- settings and presets --------------------------------------------------------------------------


WRONG_FLAGS = [
    (["train", "--learnin-rate", "1e-3"], ["--learnin-rate", "--learning-rate"]),
    (["trian"], ["trian", "train"]),
    (["train", "--rank", "0"], ["'0'", "LORA_RANK", "at least 1"]),
    (["train", "--rank", "1.5"], ["'1.5'", "LORA_RANK", "integer"]),
    (["train", "--dropout", "1"], ["'1'", "LORA_DROPOUT", "at most 0.99"]),
    (["train", "--learning-rate", "nan"], ["'nan'", "LEARNING_RATE", "finite"]),
    (["train", "--learning-rate", "inf"], ["'inf'", "LEARNING_RATE", "finite"]),
    (["train", "--learning-rate", "-1e-4"], ["'-1e-4'", "LEARNING_RATE", "above 0"]),
    (
        ["train", "--base-model", "sample", "--seed", "4294967296"],
        ["'4294967296'", "SEED", "at most"],
    ),  # numpy takes 32 bits
    (["train", "--epochs", "many"], ["'many'", "EPOCHS", "number"]),
    (["train", "--targets", "q_proj,,v_proj"], ["'q_proj,,v_proj'", "LORA_TARGETS", "empty name"]),
    (["train", "--base-precision", "fp4"], ["'fp4'", "BASE_PRECISION", "nf4"]),
    (["train"], ["BASE_MODEL", "--base-model"]),
    (["prepare-data", "--base-model", "sample"], ["DATASET", "--dataset"]),
    (["prepare-data", "--dataset", "sample"], ["BASE_MODEL", "--base-model"]),
]


@pytest.mark.promise("P9")
@pytest.mark.case("D1", "D2", "D3")
@pytest.mark.parametrize(
    ("args", "words"), WRONG_FLAGS, ids=[" ".join(args) for args, _ in WRONG_FLAGS]
)
def test_wrong_flag(stages: Stages, tmp_path: Path, args: list[str], words: list[str]) -> None:
    result = stages(*args, *(["--run-dir", tmp_path / "run"] if len(args) > 1 else []))
    refused(result, 2, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.case("D2")
@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf", "1e999"])
def test_number_that_is_not_finite_in_environment_or_preset(
    stages: Stages, tmp_path: Path, value: str
) -> None:
    refused(
        stages("train", env={"BASE_MODEL": "sample", "WARMUP": value}), 2, repr(value), "WARMUP"
    )
    path = write_preset(tmp_path / "odd.env", BASE_MODEL="sample", WARMUP=value)
    refused(stages("--env-file", path, "train"), 2, repr(value), "WARMUP")


@pytest.mark.case("D1")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("LEARNIN_RATE=1e-3\n", ["LEARNIN_RATE", "Did you mean LEARNING_RATE?"]),
        ("lora_rank=8\n", ["lora_rank", "no setting"]),
        ("LORA_RANK\n", ["LORA_RANK", "without a value", "LORA_RANK=VALUE"]),
        ("LORA RANK=8\n", ["LORA RANK"]),
        ("HF_TOKEN=hf_canary\n", ["HF_TOKEN", "env/secrets.env"]),
        ("SEED=\xff\n", ["UTF-8"]),
    ],
    ids=["misspelt", "lower case", "no value", "no line of the form", "secret", "not UTF-8"],
)
def test_wrong_preset(stages: Stages, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "wrong.env"
    path.write_bytes(f"BASE_MODEL=sample\n{text}".encode("latin-1"))
    result = stages("--env-file", path, "train", "--run-dir", tmp_path / "run")
    refused(result, 2, str(path), *words)
    assert "hf_canary" not in result.stdout + result.stderr
    assert not (tmp_path / "run").exists()


def test_missing_preset_names_the_nearest(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "llama2-7b.env").touch()
    refused(
        stages("--env-file", tmp_path / "llama-7b.env", "train"),
        2,
        "llama-7b.env",
        "Did you mean llama2-7b.env?",
    )
    refused(stages("--env-file", tmp_path / "no" / "folder.env", "train"), 2, "folder.env")
    refused(stages("--env-file", tmp_path, "train"), 2, str(tmp_path))


def test_secrets_file_that_is_not_utf8(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "secrets.env").write_bytes(b"HF_TOKEN=hf_canary\xff\n")
    result = stages("train", "--base-model", "sample")
    refused(result, 2, "secrets.env", "UTF-8")
    assert "hf_canary" not in result.stdout + result.stderr


@pytest.mark.case("D5")
def test_make_override_that_is_no_setting(stages: Stages) -> None:
    overrides = {"MAKE_GIVEN": "LEARNIN_RATE PRESET"}
    refused(stages("train", env=overrides), 2, "LEARNIN_RATE", "Did you mean LEARNING_RATE?")


def test_usage_error_in_a_run_is_recorded(stages: Stages, tmp_path: Path) -> None:
    """A scheduler that reads `error.json` must not find the last failure's there."""
    run = tmp_path / "run"
    run.mkdir()
    result = stages("train", "--base-model", "sample", "--rank", "0", "--run-dir", run)
    refused(result, 2, "LORA_RANK")
    assert json.loads((run / "error.json").read_text())["exit"] == 2


# --- data ------------------------------------------------------------------------------------------


def prepare(stages: Stages, tmp_path: Path, base: Path, dataset: Path | str, **env: str) -> Result:
    args = ["--base-model", base, "--dataset", dataset, "--run-dir", tmp_path / "run"]
    return stages("prepare-data", *args, env={"MAX_LENGTH": "64"} | env)


GOOD = '{"text": "### Human: Hi### Assistant: Hello."}\n'


@pytest.mark.case("B3")
@pytest.mark.parametrize("name", ["none.jsonl", "no/such/folder", "empty", "none*.jsonl"])
def test_missing_data(stages: Stages, tmp_path: Path, tiny: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    refused(prepare(stages, tmp_path, tiny, tmp_path / name), 66, str(tmp_path / name))


def test_link_to_nowhere_among_the_data(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "gone.jsonl").symlink_to(tmp_path / "moved away")
    refused(prepare(stages, tmp_path, tiny, folder), 66, str(folder / "gone.jsonl"))


def without_root_powers(tmp_path: Path, *args: str | Path) -> Result:
    """Run a command to which file permissions apply, whoever runs the tests."""
    prefix: list[str] = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            warnings.warn(
                "not tested: root is bound by no permission, and there is no setpriv", stacklevel=1
            )
            pytest.skip("no setpriv")
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    return subprocess.run(
        [*prefix, sys.executable, "-m", "stages", *map(str, args)],
        env=clean_environment(tmp_path), cwd=tmp_path, input="",
        text=True, capture_output=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.case("A9")
@pytest.mark.case("B3")
def test_data_that_may_not_be_read(tmp_path: Path, tiny: Path) -> None:
    """It is not the run directory that is at fault, so 73 and its advice would mislead."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    path.chmod(0)
    args = ["prepare-data", "--base-model", tiny, *SHORT, "--run-dir", tmp_path / "run"]
    refused(without_root_powers(tmp_path, *args, "--dataset", path), 66, str(path), "read")


# --- the base model --------------------------------------------------------------------------------


def changed_base(tiny: Path, folder: Path, weights: bool = False, **config: Any) -> Path:
    """A copy of the tiny model with another config."""
    shutil.copytree(
        tiny, folder, ignore=None if weights else shutil.ignore_patterns("*.safetensors")
    )
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_missing_base_model(stages: Stages, tmp_path: Path, rows: Path) -> None:
    refused(
        prepare(stages, tmp_path, tmp_path / "no-model", rows),
        66,
        str(tmp_path / "no-model"),
        "hub id",
    )


@pytest.mark.case("C7")
def test_base_that_needs_its_own_code(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    base = changed_base(
        tiny, tmp_path / "base", auto_map={"AutoModelForCausalLM": "modeling.Model"}
    )
    refused(prepare(stages, tmp_path, base, rows), 78, str(base), "code of its own", "another base")


@pytest.mark.case("C9")
def test_encoder_decoder(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    from transformers import T5Config

    base = changed_base(tiny, tmp_path / "base")
    T5Config().save_pretrained(base)
    refused(prepare(stages, tmp_path, base, rows), 78, str(base), "encoder-decoder", "causal")


def test_config_that_is_cut_off(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    base = changed_base(tiny, tmp_path / "base")
    (base / "config.json").write_text('{"model_type": "lla')
    refused(prepare(stages, tmp_path, base, rows), 65, str(base / "config.json"), "not valid JSON")


def test_tokenizer_that_is_cut_off(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    base = changed_base(tiny, tmp_path / "base")
    (base / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    refused(prepare(stages, tmp_path, base, rows), 65, str(base), "tokenizer")


@pytest.mark.case("B20")
def test_vocabulary_beyond_the_embeddings(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    base = changed_base(tiny, tmp_path / "base", vocab_size=100)
    refused(prepare(stages, tmp_path, base, rows), 65, "49152", "100")


@pytest.mark.case("D4")
def test_max_length_over_the_context(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    refused(prepare(stages, tmp_path, tiny, rows, MAX_LENGTH="513"), 2, "MAX_LENGTH 513", "512")


@pytest.mark.case("C6")
def test_weights_that_are_no_safetensors(
    stages: Stages, preset: Path, data_run: Path, tiny: Path
) -> None:
    base = changed_base(tiny, data_run.parent / "base")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    result = stages("--env-file", preset, "train", "--base-model", base, "--run-dir", data_run)
    refused(result, 65, str(base), "safetensors")


# --- the run directory -----------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, which binds root too."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        warnings.warn(f"not tested, mount refused: {done.stderr.strip()}", stacklevel=1)
        pytest.skip(f"mount refused: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.promise("P9")
@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_file_in_the_way_of_the_run_directory(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path, below: str
) -> None:
    (tmp_path / "file").write_text("mine\n")
    run = tmp_path / "file" / below
    result = stages(
        "prepare-data", "--base-model", tiny, "--dataset", rows, *SHORT, "--run-dir", run
    )
    refused(result, 73, str(run))
    assert (tmp_path / "file").read_text() == "mine\n"


def test_file_in_the_way_of_an_artifact(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data").write_text("mine\n")
    refused(prepare(stages, tmp_path, tiny, rows), 73, str(tmp_path / "run" / "data"))


def test_file_in_the_way_of_scratch(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    (tmp_path / "file").write_text("mine\n")
    result = prepare(stages, tmp_path, tiny, rows, SCRATCH_DIR=str(tmp_path / "file"))
    refused(result, 73, str(tmp_path / "file"), "SCRATCH_DIR")


@pytest.mark.case("A9")
def test_run_directory_that_may_not_be_written(tmp_path: Path, tiny: Path, rows: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)
    args = [
        "prepare-data",
        "--base-model",
        tiny,
        "--dataset",
        rows,
        *SHORT,
        "--run-dir",
        folder / "run",
    ]
    refused(without_root_powers(tmp_path, *args), 73, str(folder / "run"), "RUN_DIR")


@pytest.mark.case("A7")
def test_read_only_run_directory(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    with mounted(tmp_path / "volume", "ro,size=1m") as volume:
        result = stages(
            "prepare-data",
            "--base-model",
            tiny,
            "--dataset",
            rows,
            *SHORT,
            "--run-dir",
            volume / "run",
        )
        refused(result, 73, str(volume / "run"), "RUN_DIR")


@pytest.mark.case("A7")
def test_run_directory_that_became_read_only(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    with mounted(tmp_path / "volume", "size=1m") as volume:
        (volume / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
        result = stages(
            "prepare-data",
            "--base-model",
            tiny,
            "--dataset",
            rows,
            *SHORT,
            "--run-dir",
            volume / "run",
        )
    assert result.returncode == 73, result.stderr
    assert "Traceback" not in result.stderr
    assert str(volume) in sentences(result)[0]


@pytest.mark.case("A5")
def test_full_volume_and_then_room(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    with mounted(tmp_path / "volume", "size=16k") as volume:
        run = volume / "run"
        args = ["prepare-data", "--base-model", tiny, "--dataset", rows, *SHORT, "--run-dir", run]
        result = stages(*args)
        assert result.returncode == 73, result.stderr
        assert "Traceback" not in result.stderr
        (said,) = sentences(result)
        assert str(run / "data") in said
        assert " KiB free" in said
        assert "KiB are needed" in said
        assert not (run / "data" / "manifest.json").exists()  # what else there is, is debris
        subprocess.run(["mount", "-o", "remount,size=1m", str(volume)], check=True)
        again = stages(*args)
        assert again.returncode == 0, again.stderr
        assert whole(run / "data")
        assert not (run / "error.json").exists()


@pytest.mark.case("A5")
def test_full_scratch(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    with mounted(tmp_path / "small", "size=8k") as small:
        result = prepare(stages, tmp_path, tiny, rows, SCRATCH_DIR=str(small))
        refused(result, 73, "No space left", "SCRATCH_DIR")
        assert list(small.iterdir()) == []


# --- what one stage leaves to the next -------------------------------------------------------------


@pytest.mark.case("G13")
@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("stage", "first"),
    [("train", "prepare-data"), ("evaluate", "train"), ("generate", "train"), ("merge", "train")],
)  # fmt: skip
def test_stage_before_its_input(
    stages: Stages, tmp_path: Path, preset: Path, stage: str, first: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    asked = ["--prompt", "Hi"] if stage == "generate" else []
    refused(
        stages("--env-file", preset, stage, *asked, "--run-dir", run),
        66,
        str(run),
        f"run `{first}` first",
    )


@pytest.mark.promise("P9")
@pytest.mark.case("A10")
def test_cut_off_file_in_data(stages: Stages, preset: Path, run: Path) -> None:
    path = run / "data" / "train.arrow"
    os.truncate(path, path.stat().st_size - 8)
    for stage in ("train", "evaluate"):
        refused(
            stages("--env-file", preset, stage, "--run-dir", run),
            65,
            str(path),
            "corrupt",
            "--force",
        )


def test_file_gone_from_data(stages: Stages, preset: Path, run: Path) -> None:
    (run / "data" / "held_out.arrow").unlink()
    result = stages("--env-file", preset, "train", "--run-dir", run)
    assert result.returncode == 65, result.stderr
    assert str(run / "data" / "held_out.arrow") in sentences(result)[0]


@pytest.mark.parametrize("stage", ["evaluate", "generate", "merge"])
@pytest.mark.case("A11")
def test_flipped_byte_in_the_adapter(stages: Stages, preset: Path, run: Path, stage: str) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    asked = ["--prompt", "Hi"] if stage == "generate" else []
    result = stages("--env-file", preset, stage, *asked, "--run-dir", run)
    refused(result, 65, str(path), "sha256", "corrupt", "--force")


def test_flipped_byte_in_data_is_found_by_verify(stages: Stages, preset: Path, run: Path) -> None:
    path = run / "data" / "train.arrow"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = stages("--env-file", preset, "train", "--verify", "--run-dir", run)
    refused(result, 65, str(path), "sha256")


@pytest.mark.case("A26")
def test_manifest_that_leaves_its_folder(stages: Stages, preset: Path, run: Path) -> None:
    path = run / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../adapter/adapter_config.json"] = manifest["files"].pop("prompts.jsonl")
    path.write_text(json.dumps(manifest))
    result = stages("--env-file", preset, "train", "--run-dir", run)
    refused(result, 65, str(path), "../adapter/adapter_config.json", "leaves the artifact")


@pytest.mark.case("A4")
def test_debris_is_no_input(stages: Stages, preset: Path, run: Path) -> None:
    """What a killed stage leaves, a folder whose manifest was cut off, does not count as made."""
    os.truncate(run / "data" / "manifest.json", 100)
    result = stages("--env-file", preset, "train", "--run-dir", run)
    assert result.returncode == 66, result.stderr
    assert "run `prepare-data` first" in sentences(result)[0]


@pytest.mark.case("G14")
def test_stale_data(stages: Stages, tmp_path: Path, tiny: Path, rows: Path, run: Path) -> None:
    other = write_preset(
        tmp_path / "other.env", BASE_MODEL=tiny, DATASET=rows, **(RECIPE | {"MAX_LENGTH": 32})
    )
    args = ["--env-file", other, "train", "--run-dir", run]
    refused(stages(*args), 78, str(run / "data"), "MAX_LENGTH was 64, is now 32", "--allow-stale")
    accepted = stages(*args, "--allow-stale")
    assert accepted.returncode == 0, accepted.stderr
    assert "although it is stale: MAX_LENGTH was 64, is now 32" in accepted.stderr


@pytest.mark.case("G14")
@pytest.mark.promise("P5")
def test_adapter_made_from_other_data(stages: Stages, preset: Path, run: Path) -> None:
    again = stages("--env-file", preset, "prepare-data", "--seed", "1", "--run-dir", run)
    assert again.returncode == 0, again.stderr
    result = stages("--env-file", preset, "evaluate", "--run-dir", run)
    refused(result, 78, str(run / "adapter"), "stale", "data was", "is now", "--allow-stale")


@pytest.mark.promise("P5", "P9")
def test_run_that_belongs_to_other_settings(stages: Stages, preset: Path, run: Path) -> None:
    result = stages("--env-file", preset, "train", "--rank", "8", "--run-dir", run)
    refused(result, 78, str(run / "adapter"), "LORA_RANK was 4, is now 8", "--force")
    assert whole(run / "adapter")


@pytest.mark.promise("P5")
def test_checkpoints_that_belong_to_other_settings(stages: Stages, preset: Path, run: Path) -> None:
    shutil.rmtree(run / "adapter")
    result = stages("--env-file", preset, "train", "--rank", "8", "--run-dir", run)
    refused(result, 78, "step-", "LORA_RANK was 4, is now 8", "--force")


@pytest.mark.promise("P5")
@pytest.mark.case("C3")
def test_data_of_another_base(
    stages: Stages, preset: Path, data_run: Path, bases: dict[str, Path]
) -> None:
    result = stages(
        "--env-file", preset, "train", "--base-model", bases["other"], "--run-dir", data_run
    )
    refused(result, 78, str(data_run / "data"), "stale", "base was", "is now", "--allow-stale")


def test_missing_init_adapter(stages: Stages, preset: Path, data_run: Path) -> None:
    result = stages(
        "--env-file", preset, "train", "--init-adapter", data_run / "none", "--run-dir", data_run
    )
    refused(result, 66, str(data_run / "none"), "adapter")


# --- training: these load torch, so they run two at a time behind the other tests ------------------


@dataclass(frozen=True)
class Training:
    """A `train` that must fail: with `args`, in a finished data folder of `base`, for the reason in `words`.

    In `args` and `words`, {finished} is the finished run, {base} the base model's folder.
    """

    code: int
    words: list[str]
    args: list[str] = field(default_factory=list)
    base: str = "tiny"


MODULES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
TRAININGS = {
    "targets that name no module": Training(
        2, ["LORA_TARGETS", "query", MODULES], ["--targets", "q_proj,query"]
    ),
    "bin that does not divide a step": Training(
        2,
        ["BATCH_TOKENS 128", "no multiple of MICRO_BATCH_TOKENS 100"],
        ["--micro-batch-tokens", "100"],
    ),
    "bin that is less than the longest row": Training(
        2, ["MICRO_BATCH_TOKENS 32", "longest row", "raise it"], ["--micro-batch-tokens", "32"]
    ),
    "adapter of another rank": Training(
        2,
        ["{finished}", "LORA_RANK", "settings say 8", "agree"],
        ["--rank", "8", "--init-adapter", "{finished}"],
    ),
    "adapter of another base": Training(
        65, ["{finished}", "another base"], ["--init-adapter", "{finished}"], base="other"
    ),
    "weights that are cut off": Training(65, ["{base}", "fetch it again"], base="cut"),
    "weights of fewer layers": Training(
        65, ["{base}", "lack 9 tensors", "layers.2."], base="layers"
    ),
    "weights of another shape": Training(65, ["{base}"], base="shape"),
    "scratch that fills": Training(73, ["SCRATCH_DIR"]),
}


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model and what it may be spoiled to."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("bases")
    made = {name: changed_base(tiny, folder / name, weights=True) for name in ("other", "cut")}
    made["layers"] = changed_base(tiny, folder / "layers", weights=True, num_hidden_layers=3)
    made["shape"] = changed_base(tiny, folder / "shape", weights=True, intermediate_size=256)
    weights = made["other"] / "model.safetensors"
    save_file(
        {name: 2 * tensor for name, tensor in load_file(weights).items()},
        weights,
        metadata={"format": "pt"},
    )
    os.truncate(made["cut"] / "model.safetensors", weights.stat().st_size - 1000)
    return {"tiny": tiny} | made


def refused_training(
    case: Training, folder: Path, preset: Path, making: "Future[Path]", base: Path
) -> Result:
    """Run a case in its own folder."""
    finished = making.result()
    common = ["--base-model", base, "--run-dir", folder / "run"]
    if case.base == "tiny":
        shutil.copytree(finished / "data", folder / "run" / "data")
    else:  # its tokenizer is good, so that data is prepared
        prepared = run_forked(folder, "--env-file", preset, "prepare-data", *common)
        assert prepared.returncode == 0, prepared.stderr
    args = [arg.format(finished=finished) for arg in case.args]
    with (
        mounted(folder / "small", "size=16k")
        if case.code == 73
        else contextlib.nullcontext() as small
    ):
        env = {"SCRATCH_DIR": str(small)} if small else {}
        result = run_forked(folder, "--env-file", preset, "train", *common, *args, env=env)
        assert not small or list(small.iterdir()) == []
    return result


@pytest.fixture(scope="module", autouse=True)
def trainings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, "Future[Result]"]:
    """The cases that were selected, running since the first test of this file."""
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [f for f in functions if f.originalname == "test_training_is_refused"]
    if not chosen:
        return {}
    pool, preset, making, bases = map(
        request.getfixturevalue, ("pool", "preset", "making", "bases")
    )
    started = {}
    for name in [function.callspec.params["name"] for function in chosen]:
        case, folder = TRAININGS[name], tmp_path_factory.mktemp("training")
        started[name] = pool.submit(
            refused_training, case, folder, preset, making, bases[case.base]
        )
    return started


@pytest.mark.case("C3", "C5", "D3")
@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_refused(
    trainings: dict[str, "Future[Result]"], finished: Path, bases: dict[str, Path], name: str
) -> None:
    case = TRAININGS[name]
    result = trainings[name].result()
    refused(
        result,
        case.code,
        *(word.format(finished=finished, base=bases[case.base]) for word in case.words),
    )
    run = run_dir_of(result)
    assert run is not None
    assert not (run / "adapter").exists()
    assert list((run.parent / "scratch").iterdir()) == []


# --- generation ------------------------------------------------------------------------------------


@pytest.mark.case("D10", "H1")
@pytest.mark.parametrize("asked", ["", "  \n"])
def test_no_prompt(stages: Stages, preset: Path, run: Path, asked: str) -> None:
    result = stages("--env-file", preset, "generate", "--run-dir", run, stdin=asked)
    refused(result, 2, "nothing is asked", "--prompt", "--prompts-file")


def test_prompt_and_prompts_file(stages: Stages, tmp_path: Path, preset: Path, run: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Hi\n")
    env = {"PROMPT": "Hi", "PROMPTS_FILE": str(tmp_path / "prompts.txt")}
    result = stages("--env-file", preset, "generate", "--run-dir", run, env=env)
    refused(result, 2, "PROMPT", "PROMPTS_FILE", "leave one out")


BAD_PROMPTS = [
    ("empty.txt", "", ["no prompt"]),
    ("blank.txt", "\n \n", ["no prompt"]),
    ("empty.jsonl", "", ["no prompt"]),
    ("column.jsonl", '{"prompt": "Hi"}\n{"text": "Hi"}\n', [":2", "`prompt`"]),
    ("cut.jsonl", '{"prompt": "Hi', [":1", "`prompt`"]),
    ("blank.jsonl", '{"prompt": " "}\n', [":1", "empty `prompt`"]),
    ("latin.txt", "caf\xe9\n", ["not UTF-8"]),
]


@pytest.mark.case("H1")
@pytest.mark.parametrize(
    ("name", "content", "words"), BAD_PROMPTS, ids=[name for name, *_ in BAD_PROMPTS]
)
def test_bad_prompts_file(
    stages: Stages,
    tmp_path: Path,
    preset: Path,
    run: Path,
    name: str,
    content: str,
    words: list[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    result = stages("--env-file", preset, "generate", "--prompts-file", path, "--run-dir", run)
    refused(result, 65, str(path), *words)


def test_prompt_that_is_not_utf8(stages: Stages, preset: Path, run: Path) -> None:
    result = stages(
        "--env-file", preset, "generate", "--prompt", os.fsdecode(b"caf\xe9"), "--run-dir", run
    )
    refused(result, 2, "PROMPT", "UTF-8")


def test_missing_prompts_file(stages: Stages, tmp_path: Path, preset: Path, run: Path) -> None:
    result = stages(
        "--env-file", preset, "generate", "--prompts-file", tmp_path / "none.txt", "--run-dir", run
    )
    refused(result, 66, str(tmp_path / "none.txt"))
