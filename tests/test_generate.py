"""generate and chat through the command line: what is asked, what is answered, and what a stop leaves."""

import hashlib
import json
import os
import pty
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forking import Forking, forking, lines, read_until
from tests.refusals import refused, write_preset

RECIPE = {
    "MAX_LENGTH": 64, "BASE_PRECISION": "fp32", "LORA_RANK": 4, "LORA_ALPHA": 8, "BATCH_TOKENS": 128,
    "MAX_STEPS": 1, "OPTIMIZER": "adamw_torch", "MAX_NEW_TOKENS": 6, "RUN_DIR": "run",
}  # fmt: skip
KEYS = ["answer", "prompt_tokens", "tokens", "finish", "seed"]
FILE = "run/generations/generations.jsonl"
# Enough work that a signal comes in the middle of it.
MANY = [f"Question {n}: " + "and " * (n % 5) + "why?" for n in range(24)]
SETTLE = 0.3  # seconds from a prompt to readline's wait for keys; a signal between waits for the next key
LONG = ("--temperature", "1", "--max-new-tokens", "24", "--batch-prompts", "2", "--seed", "3")


@pytest.fixture(scope="module")
def made(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """A finished run of a tiny model, and what runs commands beside it."""
    folder = tmp_path_factory.mktemp("generate")
    write_preset(folder / "tiny.env", BASE_MODEL=tiny, DATASET=rows, **RECIPE)
    (folder / "many.txt").write_text("\n".join(MANY))
    with forking(folder) as stages:
        for stage in ("prepare-data", "train"):
            done = stages("--env-file", "tiny.env", stage)
            assert done.returncode == 0, done.stderr
        yield stages


@pytest.fixture
def generate(made: Forking) -> Iterator[Any]:
    """`generate` in that run, which has no generations before and after."""
    yield lambda *args, **how: made("--env-file", "tiny.env", "generate", *args, **how)
    shutil.rmtree(made.folder / "run" / "generations", ignore_errors=True)


def written(made: Forking) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = lines(made.folder / FILE)
    return sorted(found, key=lambda line: line["number"])


def manifest(made: Forking) -> dict[str, Any]:
    return dict(json.loads((made.folder / "run/generations/manifest.json").read_text()))


# --- one prompt ------------------------------------------------------------------------------------


@pytest.mark.case("D10")
def test_a_prompt_is_answered_in_text_or_json_and_leaves_nothing(
    made: Forking, generate: Any
) -> None:
    before = sorted((made.folder / "run").rglob("*"))
    holder = made.folder / "run" / "holder.json"  # of another stage, on another host
    holder.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "now", "beat": 0}))
    asked = 'What\'s "1 + 1"?\n$HOME'
    text = generate("--prompt", asked)
    found = generate("--json", stdin=f"{asked}\n")
    holder.unlink()
    assert text.returncode == found.returncode == 0, text.stderr
    (line,) = [json.loads(line) for line in found.stdout.splitlines()]
    assert list(line) == ["number", "prompt", *KEYS]
    assert line["prompt"] == asked
    assert line["answer"] == text.stdout.strip()
    assert (line["tokens"], line["finish"], line["seed"]) == (6, "length", 0)
    assert line["prompt_tokens"] > 6
    assert sorted((made.folder / "run").rglob("*")) == before


def test_sampling_and_stops_change_what_is_said(made: Forking, generate: Any) -> None:
    def said(*args: str, **env: str) -> dict[str, Any]:
        done = generate("--prompt", "Hi", "--json", *args, env=env)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    greedy = said()
    assert said("--temperature", "2", "--top-k", "1")["answer"] == greedy["answer"]
    drawn = said("--temperature", "2", SEED="7")  # not the seed that the training had
    assert drawn["answer"] != greedy["answer"]
    assert drawn["seed"] == 7
    assert said("--temperature", "2", "--seed", "7") == drawn
    assert said("--temperature", "2", "--seed", "8")["answer"] != drawn["answer"]
    assert said("--system", "Be brief.")["prompt_tokens"] > greedy["prompt_tokens"]
    end = greedy["answer"][4:7]
    for stopped in (said("--stop", "\n", "--stop", end), said(STOP=json.dumps(["\n", end]))):
        assert stopped["answer"] == greedy["answer"].split(end)[0].strip()
        assert (stopped["finish"], stopped["tokens"] < 6) == ("stop", True)


def test_a_setting_that_changes_nothing_is_told(generate: Any) -> None:
    done = generate("--prompt", "Hi", "--top-p", "0.5")
    assert "TEMPERATURE is 0, so TOP_P change" in done.stderr


@pytest.mark.case("H4", "H5")
@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--stop", ""], "empty"), (["--stop", '["a", "b"'], "no JSON list"), (["--top-p", "0"], "top-p"),
        (["--stop", '["a", 1]'], "what is none"), (["--temperature", "nan"], "temperature"),
        (["--temperature", "-0.1"], "temperature"), (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--max-new-tokens", "1000000000"], "512 tokens"),
    ],
)  # fmt: skip
def test_what_sampling_cannot_be(generate: Any, args: list[str], word: str) -> None:
    refused(generate("--prompt", "Hi", *args), 2, word)


# --- the format ------------------------------------------------------------------------------------


def test_another_format_is_refused_unless_forced(made: Forking, generate: Any, tiny: Path) -> None:
    same = generate("--prompt", "Hi", "--json", "--chat-format", "guanaco")
    assert same.returncode == 0, same.stderr
    own = made.folder / "own.jinja"
    own.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]")
    for name in ("alpaca", "text", "tokenizer", str(own)):
        words = ("guanaco", f"CHAT_FORMAT is {name}", "--force-format")
        refused(generate("--prompt", "Hi", "--chat-format", name), 78, *words)
    assert "alpaca" in generate("--prompt", "Hi", env={"CHAT_FORMAT": "alpaca"}).stderr
    forced = generate("--prompt", "Hi", "--json", "--force-format", "--chat-format", str(own))
    assert forced.returncode == 0, forced.stderr
    assert "has not learned it" in forced.stderr
    line = json.loads(forced.stdout)
    assert line["forced_format"] == str(own)
    assert line["prompt_tokens"] != json.loads(same.stdout)["prompt_tokens"]


# --- a foreign or broken adapter -------------------------------------------------------------------


def republish(folder: Path, **inputs: Any) -> None:
    """Let a manifest agree with changed files."""
    path = folder / "manifest.json"
    known = json.loads(path.read_text())
    for name, entry in known["files"].items():
        content = (folder / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(known | {"inputs": known["inputs"] | inputs}))


@pytest.mark.case("C3")
@pytest.mark.parametrize(
    ("change", "code", "word"),
    [("nan", 82, "not finite"), ("shape", 65, "another base"), ("base", 65, "belongs to another base")],
)  # fmt: skip
def test_an_adapter_that_is_not_right(
    made: Forking, change: str, code: int, word: str, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(made.folder / "run" / "adapter", tmp_path / "run" / "adapter")
    folder, inputs = tmp_path / "run" / "adapter", {}
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[0]
    if change == "nan":
        weights[name][0, 0] = torch.nan
    elif change == "shape":
        weights[name] = weights[name][:, :32].contiguous()
    else:
        base = json.loads((folder / "manifest.json").read_text())["inputs"]["base"]
        inputs = {"base": base | {"fingerprint": "0" * 64}}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    republish(folder, **inputs)
    run, asked = tmp_path / "run", made.folder / "many.txt"
    for args in (("--prompt", "Hi"), ("--prompts-file", asked)):
        done = made("--env-file", "tiny.env", "generate", *args, "--run-dir", run)
        refused(done, code, word)


# --- a file of prompts -----------------------------------------------------------------------------


def test_a_file_of_prompts_and_conversations(made: Forking, generate: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    asked = [
        {"prompt": "Hi", "other": 1}, {"messages": messages, "id": "b"},
        {"prompt": "Hi", "system": "Be brief."}, {"prompt": messages[1:2], "id": 4},
    ]  # fmt: skip
    (made.folder / "asked.jsonl").write_text("\n\n".join(json.dumps(line) for line in asked))
    done = generate("--prompts-file", "asked.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == FILE
    found = written(made)
    assert [list(line) for line in found] == [
        ["number", "prompt", *KEYS], ["number", "id", "messages", *KEYS],
        ["number", "system", "prompt", *KEYS], ["number", "id", "messages", *KEYS],
    ]  # fmt: skip
    assert found[1]["messages"] == messages
    assert found[3]["answer"] == found[0]["answer"]
    counts = [line["prompt_tokens"] for line in found]
    assert counts[0] == counts[3] < counts[2] < counts[1]
    known = manifest(made)
    assert list(known["files"]) == ["generations.jsonl"]
    assert {p.name for p in (made.folder / "run/generations").iterdir()} == {
        "generations.jsonl", "manifest.json",
    }  # fmt: skip
    assert known["metrics"] | {"tokens_per_second": 0} == {
        "prompts": 4, "stopped": 0, "tokens": 24, "prompt_tokens": sum(counts), "resumed": 0,
        "tokens_per_second": 0,
    }  # fmt: skip
    again = generate("--prompts-file", made.folder / "asked.jsonl", "--batch-prompts", "1")
    assert "nothing changed" in again.stderr
    assert (
        "was 6, is now 7"
        in generate("--prompts-file", "asked.jsonl", "--max-new-tokens", "7").stderr
    )


@pytest.mark.case("H2", "H4")
def test_a_prompt_that_is_too_long_is_named_before_the_weights_are_read(
    made: Forking, generate: Any, tiny: Path
) -> None:
    (made.folder / "long.txt").write_text(f"Hi\n\n{'why ' * 510}\n")
    done = generate("--prompts-file", "long.txt")
    refused(done, 2, "long.txt:3 of 5", "MAX_NEW_TOKENS 6", "512 tokens")
    assert not (made.folder / "run" / "generations").exists()


# --- stopped and started again ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(made: Forking) -> list[dict[str, Any]]:
    """All lines of a run that nobody stopped."""
    done = made("--env-file", "tiny.env", "generate", *LONG, "--prompts-file", "many.txt")
    assert done.returncode == 0, done.stderr
    found = written(made)
    assert [line["prompt"] for line in found] == MANY
    shutil.rmtree(made.folder / "run" / "generations")
    return found


def cut_off(made: Forking, kill: signal.Signals) -> int:
    """Stop a run once some of its lines are there; how many there are."""
    pid = made.start("--env-file", "tiny.env", "generate", *LONG, "--prompts-file", "many.txt")
    while len(lines(made.folder / FILE)) < 3:
        time.sleep(0.005)
    os.kill(pid, kill)
    done = made.wait()
    assert done.returncode == (75 if kill == signal.SIGTERM else -kill), done.stderr
    assert not (made.folder / "run/generations/manifest.json").exists()
    return len(lines(made.folder / FILE))


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_started_again_it_says_the_same(
    made: Forking, generate: Any, whole: list[dict[str, Any]], kill: signal.Signals
) -> None:
    kept = cut_off(made, kill)
    assert 3 <= kept < len(MANY)
    with (made.folder / FILE).open("a") as file:
        file.write('{"number": 23, "prompt": "Quest')  # torn
    # Another number at a time is no other setting.
    done = generate(*LONG[:-4], "--batch-prompts", "5", "--seed", "3", "--prompts-file", "many.txt")
    assert done.returncode == 0, done.stderr
    assert f"going on: {kept} of {len(MANY)}" in done.stderr
    assert written(made) == whole
    known = manifest(made)
    assert known["metrics"]["resumed"] == kept
    content = (made.folder / FILE).read_bytes()
    assert known["files"]["generations.jsonl"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert known["metrics"]["tokens"] == sum(line["tokens"] for line in whole)


def test_what_was_begun_otherwise_is_begun_anew(made: Forking, generate: Any) -> None:
    cut_off(made, signal.SIGKILL)
    done = generate(*LONG[:-2], "--seed", "4", "--prompts-file", "many.txt")
    assert done.returncode == 0, done.stderr
    assert "begun otherwise (SEED was 3, is now 4): starting afresh" in done.stderr
    assert {line["seed"] for line in written(made)} == {4}
    assert manifest(made)["metrics"]["resumed"] == 0


# --- chat ------------------------------------------------------------------------------------------


def test_a_talk_through_a_pipe(made: Forking, generate: Any) -> None:
    said = "Hi\n/reset\nHi\n\nAnd?\n/sistem x\n/system Be brief.\n/reset\nHi\n/quit\nHi\n"
    done = made("--env-file", "tiny.env", "chat", stdin=said)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 4
    assert answers[0] == answers[1] == generate("--prompt", "Hi").stdout.strip()
    assert "no /sistem" in done.stderr
    assert "/system?" in done.stderr
    # The whole talk is what the next answer continues.
    talk = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": answers[1]},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    (made.folder / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    assert generate("--prompts-file", "talk.jsonl").returncode == 0
    assert written(made)[0]["answer"] == answers[2]
    assert generate("--prompt", "Hi", "--system", "Be brief.").stdout.strip() == answers[3]
    assert not (made.folder / "run" / "holder.json").exists()


def test_a_talk_forgets_what_does_not_fit(made: Forking) -> None:
    asked = f"{'why ' * 170}\n" * 3 + f"{'why ' * 600}\nHi\n"
    done = made("--env-file", "tiny.env", "chat", stdin=asked)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert "full: 1 of the oldest" in done.stderr
    assert "506 are left beside MAX_NEW_TOKENS" in done.stderr


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_talk(made: Forking) -> None:
    ours, theirs = pty.openpty()
    made.start(
        "--env-file", "tiny.env", "chat", "--max-new-tokens", "450", "--temperature", "1",
        terminal=os.ttyname(theirs),
    )  # fmt: skip
    read_until(ours, "> ")
    os.write(ours, b"half a question")
    read_until(ours, "question")
    time.sleep(SETTLE)
    os.write(ours, b"\x03")
    read_until(ours, "> ")
    os.write(ours, b"/help\n")
    read_until(ours, "/reset ", "> ")
    os.write(ours, b"Hi\n")
    began = time.monotonic()
    streamed = read_until(ours, "Hi\r\n") + os.read(ours, 100).decode(errors="replace")
    assert streamed.split("Hi\r\n")[1].strip()
    os.write(ours, b"\x03")
    shown = streamed + read_until(ours, "> ")
    assert len(shown.split()) < 400, time.monotonic() - began
    time.sleep(SETTLE)
    os.write(ours, b"\x04")
    assert made.wait().returncode == 0
    os.close(ours)
    os.close(theirs)


@pytest.mark.case("G8")
def test_a_talk_ends_on_sigterm(made: Forking) -> None:
    ours, theirs = pty.openpty()
    pid = made.start("--env-file", "tiny.env", "chat", terminal=os.ttyname(theirs))
    read_until(ours, "> ")
    time.sleep(SETTLE)
    os.kill(pid, signal.SIGTERM)
    assert made.wait().returncode == 75
    os.close(ours)
    os.close(theirs)
