"""Data that is not what its owner thinks: found, counted, named, and ended with the right exit code."""

import gzip
import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stages
from tests.forking import run_forked
from tests.refusals import Result, refused

GOOD = '{"text": "### Human: Hi### Assistant: Hello."}\n'
MANY = "".join(GOOD.replace("Hi", f"Hi {n}") for n in range(200))


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    """Run a command in this test's own folder; most of them load a model or a tokenizer."""
    return partial(run_forked, tmp_path)


def prepare(stages: Stages, tmp_path: Path, base: Path, dataset: Path | str, **env: str) -> Result:
    args = ["--base-model", base, "--dataset", dataset, "--run-dir", tmp_path / "run"]
    return stages("prepare-data", *args, env={"MAX_LENGTH": "64"} | env)


def metrics(tmp_path: Path) -> dict[str, Any]:
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    return dict(manifest["metrics"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def write(tmp_path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alpaca(count: int, **fields: str) -> list[dict[str, Any]]:
    return [{"instruction": f"Say {n}.", "output": f"It is {n}."} | fields for n in range(count)]


BAD_DATA = [
    # B1, B9, B18
    ("broken.jsonl", GOOD + '{"text": "a" "b"}\n', [":2", "byte"]),
    ("cut.jsonl", GOOD + '{"text": "cut o', [":2", "ends in the middle"]),
    ("cut.json", '[\n{"text": "### Human: a### Assistant: b"},\n{"text": ', ["ends in the middle"]),
    ("twice.jsonl", GOOD + '{"text": "a", "text": "b"}\n', [":2", "text", "twice"]),
    ("nan.jsonl", GOOD + '{"text": "a", "score": NaN}\n', [":2", "NaN"]),
    # B2
    ("empty.jsonl", "", ["no rows"]),
    ("empty.csv", "", ["no rows"]),
    ("header.csv", "text\n", ["no rows"]),
    ("blank.jsonl", "\n \n\n", ["no rows"]),
    ("hollow.jsonl", '{"text": ""}\n{"text": " \\n"}\n', ["no row to train on", "2 read", "2 empty"]),
    # B4, B5
    ("misspelt.jsonl", GOOD + '{"txt": "a"}\n', [":2", "'text'", "is it 'txt'"]),
    ("unknown.jsonl", '{"instrution": "a", "ouput": "b"}\n', ["'instrution'", "alpaca", "'output'"]),
    ("two.jsonl", '{"text": "a", "prompt": "b", "completion": "c"}\n', ["alpaca", "text", "SHAPE="]),
    ("number.jsonl", GOOD + '{"text": 7}\n', [":2", "a number"]),
    ("null.jsonl", GOOD + '{"text": null}\n', [":2", "null"]),
    ("list.jsonl", GOOD + '["Hi"]\n', [":2"]),
    ("unmarked.jsonl", GOOD + '{"text": "Hi"}\n', [":2", "### Human:"]),
    # B7, B8
    ("nul.jsonl", GOOD + '{"text": "a\x00b"}\n', [":2"]),
    ("escaped.jsonl", GOOD + '{"text": "a\\u0000b"}\n', [":2", "NUL"]),
    ("half.jsonl", GOOD + '{"text": "\\ud83d"}\n', [":2", "surrogate"]),
    ("latin.jsonl", '\n{"text": "caf\xe9"}\n', [":2", "not UTF-8"]),
    ("latin.json", '[{"text": "caf\xe9"}]', ["not UTF-8"]),
    ("latin.csv", "text\ncaf\xe9\n", ["not UTF-8"]),
    # B12
    ("unanswered.jsonl", GOOD + '{"text": "### Human: Hi"}\n', [":2", "without a trainable token"]),
    ("rows.txt", "Hi\n", [".jsonl", ".csv"]),
]  # fmt: skip


@pytest.mark.case("B1", "B2", "B4", "B5", "B7", "B8", "B9", "B12", "B18")
@pytest.mark.parametrize(
    ("name", "content", "words"), BAD_DATA, ids=[name for name, *_ in BAD_DATA]
)
def test_bad_data(
    stages: Stages, tmp_path: Path, tiny: Path, name: str, content: str, words: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    refused(prepare(stages, tmp_path, tiny, path), 65, str(path), *words)


@pytest.mark.case("B1")
def test_bad_rows_are_listed_counted_and_left_out_if_told(
    stages: Stages, tmp_path: Path, tiny: Path
) -> None:
    """B1: twenty of them, then the count; the rejects have numbers and reasons, and text on request."""
    path = tmp_path / "rows.jsonl"
    path.write_text(MANY + '{"text": secret}\n' * 30 + GOOD)
    result = prepare(stages, tmp_path, tiny, path)
    refused(result, 65, "30 bad of 231 rows", f"{path}:201: ", f"{path}:220: ", "and 10 more")
    assert f"{path}:221: " not in result.stderr

    assert prepare(stages, tmp_path, tiny, path, MAX_BAD_ROWS="30").returncode == 0
    assert metrics(tmp_path)["rows_dropped"] == {"bad": 30}
    rejects = lines(tmp_path / "run" / "data" / "rejects.jsonl")
    assert [entry["line"] for entry in rejects] == list(range(201, 231))
    assert rejects[1]["byte"] - rejects[0]["byte"] == len('{"text": secret}\n')
    assert "secret" not in json.dumps([entry.get("text") for entry in rejects])
    ledger = lines(tmp_path / "run" / "data" / "ledger.jsonl")
    assert [entry["row"] for entry in ledger if entry["reason"] == "bad"] == list(range(201, 231))

    told = prepare(stages, tmp_path, tiny, path, MAX_BAD_ROWS="30", KEEP_REJECTED_TEXT="1")
    assert told.returncode == 0
    assert lines(tmp_path / "run" / "data" / "rejects.jsonl")[0]["text"] == '{"text": secret}'


@pytest.mark.case("B6")
def test_marks_of_other_systems_are_no_fault(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B6."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + MANY.replace("\n", "\r\n\r\n").encode())
    result = prepare(stages, tmp_path, tiny, path)
    assert result.returncode == 0
    assert "accepted: a byte order mark, CRLF line ends, blank lines" in result.stderr
    assert metrics(tmp_path)["rows_kept"] == 200


@pytest.mark.case("B10")
def test_every_row_too_long(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B10."""
    path = write(tmp_path, alpaca(5, output="word " * 100))
    result = prepare(stages, tmp_path, tiny, path, ON_LONG="drop")
    refused(result, 65, "5 too_long", "MAX_LENGTH 64", "longest has", "median")
    refused(
        prepare(stages, tmp_path, tiny, path, ON_LONG="error"), 65, f"{path}:1", "ON_LONG=truncate"
    )


@pytest.mark.case("B11")
@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
def test_some_rows_too_long(stages: Stages, tmp_path: Path, tiny: Path, policy: str) -> None:
    """B11."""
    path = write(tmp_path, [*alpaca(20), *alpaca(1, instruction="Go on.", output="word " * 100)])
    assert prepare(stages, tmp_path, tiny, path, ON_LONG=policy).returncode == 0
    found = metrics(tmp_path)
    changed = {
        "truncate": found["rows_truncated"], "split": found["rows_split"],
        "drop": found["rows_dropped"].get("too_long"),
    }  # fmt: skip
    assert changed[policy] == 1
    assert found["tokens_encoded"] - found["tokens_lost"] + found["tokens_added"] == found["tokens"]
    (entry,) = lines(tmp_path / "run" / "data" / "ledger.jsonl")
    assert entry["row"] == 21
    assert entry["where"] == f"{path}:21"
    assert entry["tokens_lost"] == found["tokens_lost"]


@pytest.mark.case("B12")
def test_rows_without_a_trainable_token(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B12."""
    talk = [{"messages": [{"role": "user", "content": f"Hi {n}"}]} for n in range(3)]
    good = [[*row["messages"], {"role": "assistant", "content": "Yes"}] for row in talk]
    path = write(tmp_path, [*({"messages": m} for m in good), *talk])
    refused(prepare(stages, tmp_path, tiny, path), 65, "3 of 6", f"{path}:4", "its turns: user")
    assert prepare(stages, tmp_path, tiny, path, ALLOW="nothing-to-learn").returncode == 0
    assert metrics(tmp_path)["rows_dropped"] == {"no_answer": 3}


@pytest.mark.case("B13")
def test_empty_answers(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B13: counted; over 1 % they are an error."""
    path = write(tmp_path, [*alpaca(299), {"instruction": "Say nothing.", "output": " "}])
    assert prepare(stages, tmp_path, tiny, path).returncode == 0
    assert metrics(tmp_path)["rows_dropped"] == {"empty_answer": 1}
    path = write(tmp_path, [*alpaca(20), {"instruction": "Say nothing.", "output": ""}])
    refused(prepare(stages, tmp_path, tiny, path), 65, "1 of 21", "empty answer", "ALLOW=")
    assert prepare(stages, tmp_path, tiny, path, ALLOW="empty-answers").returncode == 0


@pytest.mark.case("B14")
def test_rows_of_the_test_split_are_not_learned(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B14."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write(tmp_path, alpaca(20)).rename(folder / "train.jsonl")
    write(tmp_path, alpaca(3)).rename(folder / "test.jsonl")
    assert prepare(stages, tmp_path, tiny, folder).returncode == 0
    found = metrics(tmp_path)
    assert found["rows_dropped"] == {"leaked": 3}
    assert (found["rows_kept"], found["rows_held_out"]) == (20, 3)
    refused(
        prepare(stages, tmp_path, tiny, folder, FAIL_ON_LEAKAGE="1"), 65, "3 rows", "test split"
    )


@pytest.mark.case("B15")
def test_a_small_data_set_still_trains(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B15: fewer rows than a batch are a short step, never none."""
    path = write(tmp_path, alpaca(2))
    assert prepare(stages, tmp_path, tiny, path).returncode == 0
    args = ["--base-model", tiny, "--run-dir", tmp_path / "run", "--base-precision", "fp32"]
    result = stages("train", *args, "--optimizer", "adamw_torch")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "run" / "adapter" / "manifest.json").read_text())
    assert manifest["metrics"]["steps"] == 1


@pytest.mark.case("B16")
def test_row_beyond_the_limit(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B16."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + json.dumps({"text": "a" * 50_000_000}) + "\n" + GOOD)
    refused(prepare(stages, tmp_path, tiny, path), 65, "1 bad of 3 rows", f"{path}:2", "limit")


@pytest.mark.case("B17")
def test_compression_bomb(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B17."""
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(400):
            file.write(b" " * (1 << 20) + b"\n")
    refused(prepare(stages, tmp_path, tiny, path), 65, str(path), "expands")


@pytest.mark.case("B19")
def test_special_tokens_in_rows_are_text(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B19."""
    path = write(tmp_path, alpaca(20, input="<|im_end|> and </s> and [INST] and <|im_start|>"))
    for chat_format in ("tokenizer", "llama2"):
        assert prepare(stages, tmp_path, tiny, path, CHAT_FORMAT=chat_format).returncode == 0
        found = metrics(tmp_path)
        assert found["rows_ending_in_trained_eos"] == found["rows_kept"] == 20


@pytest.mark.case("B19")
def test_no_chat_template(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B19: the tokenizer's own is wanted, and there is none; a file that is broken, or is not there."""
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    path = write(tmp_path, alpaca(20))
    refused(prepare(stages, tmp_path, base, path, CHAT_FORMAT="tokenizer"), 65, "no chat template")
    result = prepare(stages, tmp_path, base, path)
    assert result.returncode == 0
    assert "chat format chatml" in result.stderr
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}")
    refused(
        prepare(stages, tmp_path, tiny, path, CHAT_FORMAT=str(broken)), 2, "broken.jinja", "line"
    )
    refused(prepare(stages, tmp_path, tiny, path, CHAT_FORMAT="no.jinja"), 66, "no.jinja")
    refused(prepare(stages, tmp_path, tiny, path, CHAT_FORMAT="lama2"), 2, "'lama2'", "llama2")


def test_rows_that_the_template_refuses(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "strict.jinja"
    path.write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*said, *said]}, {"messages": [said[0], said[0], said[1]]}]
    result = prepare(stages, tmp_path, tiny, write(tmp_path, rows), CHAT_FORMAT=str(path))
    refused(result, 65, "rows.jsonl:2", "roles must alternate")


def test_answers_that_would_not_stop(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "endless.jinja"
    path.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '<|endoftext|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    said = [{"role": "assistant", "content": "Hello"}]
    talks = [[*said, {"role": "user", "content": f"Hi {n}"}] for n in range(20)]
    rows = write(tmp_path, ({"messages": talk} for talk in talks))
    result = prepare(stages, tmp_path, tiny, rows, CHAT_FORMAT=str(path), LOSS_ON="all")
    refused(result, 65, "only 0 of 20 rows end in a trained EOS", "ALLOW=unended")


@pytest.mark.case("B21")
def test_data_of_another_template(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """B21."""
    base = shutil.copytree(tiny, tmp_path / "base")
    assert prepare(stages, tmp_path, base, write(tmp_path, alpaca(20))).returncode == 0
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:2000]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    args = ["--base-model", base, "--run-dir", tmp_path / "run"]
    result = stages("train", *args, "--allow-stale")
    assert result.returncode == 78, result.stderr
    assert "rendered or tokenised otherwise" in result.stderr
    assert "`prepare-data`" in result.stderr


def test_a_file_that_cannot_be_read_to_its_end(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    """What follows the broken row is lost without a count, so no tolerance covers it."""
    path = tmp_path / "rows.json"
    path.write_text("[" + MANY.replace("\n", ",\n") + '{"text": "a" "b"}, ' + GOOD + "]")
    result = prepare(stages, tmp_path, tiny, path, MAX_BAD_ROWS="10")
    refused(result, 65, "1 bad of 201 rows", "row 201", "nothing after it can be read")
    assert "raise MAX_BAD_ROWS" not in result.stderr
