"""Benchmarks: the harness scores both sides as arithmetic by hand does, and refuses in a sentence."""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib.data import formats
from stages.lib.data.tokens import Tokens
from stages.lib.model import adapter, benchmarks, load, tasks
from stages.lib.model.base import Base
from stages.lib.run import preemption
from stages.lib.run.exits import StageError, TryAgain
from tests.conftest import ROOT

CHOICES = ["red", "green or so", "blue", "none"]
ASKED = [f"What is {n} and {n + 1}?" for n in range(16)]
CHOOSING = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{best}}"
metric_list: [{metric: acc}]
"""
SAYING = """
output_type: generate_until
doc_to_target: "{{said}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


def write_task(path: Path, data: Path, kind: str, **more: object) -> Path:
    """A task file over a JSONL file."""
    common = {
        "task": path.stem, "dataset_path": "json", "dataset_kwargs": {"data_files": str(data)},
        "test_split": "train", "doc_to_text": "{{question}}\nAnswer:", "metadata": {"version": 2.0},
    } | more  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}" for key, value in common.items()]
    path.write_text("\n".join(lines) + "\n" + kind)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_probability(model: Any, tokens: Tokens, question: str, choice: str) -> float:
    """Of a choice behind a question, by hand."""
    start = len(tokens.backend.encode(f"{question}\nAnswer:").ids)
    ids = tokens.backend.encode(f"{question}\nAnswer: {choice}").ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    found = logits.log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]
    return float(found.sum())


def best(model: Any, tokens: Tokens, question: str) -> int:
    scores = [log_probability(model, tokens, question, choice) for choice in CHOICES]
    return scores.index(max(scores))


def said(model: Any, tokens: Tokens, question: str) -> str:
    ids = torch.tensor([tokens.backend.encode(f"{question}\nAnswer:").ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
        pad_token_id=tokens.pad, eos_token_id=tokens.eos, use_cache=True,
    )  # fmt: skip
    return tokens.decode(out[0, ids.shape[1] :].tolist()).split("\n")[0]


@dataclass
class Made:
    """A model whose adapter changes its answers, and tasks that hold the tuned one's answers to be right."""

    tuned: Any
    tokens: Tokens
    folder: Path
    base_right: dict[str, list[bool]]
    tasks: tasks.Tasks
    result: dict[str, Any]


def changed(tiny: Path, precision: str = "fp32") -> Any:
    """The tiny model with an adapter that changes much."""
    base = Base(str(tiny), None)
    base.fetch()
    model = load.load(base, precision)
    tuned = adapter.attach(model, base, 4, 8, 0.0, ("q_proj", "v_proj", "o_proj"), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.5, generator=generator)
    return tuned


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned, tokens = changed(tiny), Tokens(tiny)
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": q, "choices": CHOICES, "best": best(tuned, tokens, q), "said": said(tuned, tokens, q)}
        for q in ASKED
    ]  # fmt: skip
    with tuned.disable_adapter():
        right = {
            "choosing": [best(tuned, tokens, row["question"]) == row["best"] for row in rows],
            "saying": [said(tuned, tokens, row["question"]) == row["said"] for row in rows],
        }
    data = write_rows(folder / "rows.jsonl", rows)
    write_task(folder / "choosing.yaml", data, CHOOSING)
    write_task(folder / "saying.yaml", data, SAYING)
    found = tasks.prepare([f"{folder}/"])
    result = benchmarks.run(tuned, tokens, "fp32", found, None, None)
    yield Made(tuned, tokens, folder, right, found, result)
    torch.set_num_threads(before)


def scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["task"]: score for score in result["scores"]}


@pytest.mark.parametrize("task", ["choosing", "saying"])
def test_scores_are_those_found_by_hand(made: Made, task: str) -> None:
    found, right = scores(made.result)[task], made.base_right[task]
    share = sum(right) / len(right)
    assert 0 <= share < 1, "the adapter changes nothing that this test could see"
    assert (found["base"], found["tuned"]) == (share, 1.0)
    assert found["difference"] == 1 - share
    assert found["documents"] == len(ASKED)
    assert found["higher_is_better"] is True
    assert (found["version"], found["shots"], found["group"]) == (2.0, 0, None)
    assert found["metric"] == {"choosing": "acc", "saying": "exact_match"}[task]
    gains = [0.0 if was else 1.0 for was in right]
    spread = math.sqrt(sum((g - 1 + share) ** 2 for g in gains) / (len(gains) - 1) / len(gains))
    assert found["difference_stderr"] == pytest.approx(spread)
    assert found["tuned_stderr"] == 0


def test_what_it_was_made_by(made: Made) -> None:
    assert made.result["harness"].startswith("lm-eval 0.")
    assert made.result["limit"] is None
    assert made.result["truncated"] == 0
    json.dumps(made.result, allow_nan=False)


def test_a_limit_again_and_in_small_batches(
    made: Made, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same tasks serve twice; no forward pass is larger than allowed; nothing is printed as a result."""
    from stages.lib.model import harness

    monkeypatch.setitem(harness.MOST_LOGITS, "cpu", 49152 * 64)
    sizes: list[tuple[int, int]] = []
    hook = made.tuned.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].shape) if args else None
    )
    try:
        found = benchmarks.run(made.tuned, made.tokens, "fp32", made.tasks, 6, None)
    finally:
        hook.remove()
    for task, right in made.base_right.items():
        assert scores(found)[task]["base"] == sum(right[:6]) / 6
        assert scores(found)[task]["documents"] == 6
    assert max(rows for rows, _ in sizes) > 1
    assert max(rows * length for rows, length in sizes) <= 64
    assert capfd.readouterr().out == ""


def test_the_adapter_is_on_again_and_nothing_is_changed(made: Made) -> None:
    assert scores(made.result)["choosing"]["tuned"] == 1
    assert [best(made.tuned, made.tokens, q) for q in ASKED] == [
        json.loads(line)["best"] for line in (made.folder / "rows.jsonl").read_text().splitlines()
    ]
    assert made.tuned.config.use_cache is False


def test_probabilities_are_not_rounded_to_bf16(tiny: Path, made: Made) -> None:
    """bf16 has three digits: of -43.21 it would keep -43.25."""
    from lm_eval.api.instance import Instance

    from stages.lib.model.harness import Harness

    tuned = changed(tiny, "bf16")
    requests = [
        Instance("loglikelihood", {}, (f"{ASKED[0]}\nAnswer:", f" {choice}"), n)
        for n, choice in enumerate(CHOICES)
    ]
    found = Harness(tuned, made.tokens, "bf16", None).loglikelihood(requests)
    for (value, _), choice in zip(found, CHOICES, strict=True):
        with load.compute("bf16"):
            by_hand = log_probability(tuned, made.tokens, ASKED[0], choice)
        assert value == pytest.approx(by_hand, abs=0.02)


def test_requests_over_the_context_are_counted(made: Made, tmp_path: Path) -> None:
    long = {"question": "Why? " * 600, "choices": CHOICES, "best": 0, "said": ""}
    short = long | {"question": "Why?"}
    data = write_rows(tmp_path / "rows.jsonl", [long, short])
    names = [str(write_task(tmp_path / "long.yaml", data, SAYING))]
    names += [str(write_task(tmp_path / "choice.yaml", data, CHOOSING))]
    found = benchmarks.run(made.tuned, made.tokens, "fp32", tasks.prepare(names), None, None)
    assert found["truncated"] == 1 + len(CHOICES)


def test_a_chat_is_put_in_the_recorded_format(made: Made) -> None:
    """Every request begins as training rows did, few-shot turns among them; an answer ends at the next turn."""
    chat_format, _ = formats.choose("guanaco", made.tokens, ["guanaco"], "all")
    seen: list[str] = []
    hook = made.tuned.register_forward_pre_hook(
        lambda module, args: seen.append(made.tokens.fast.decode(args[0][0])) if args else None
    )
    chat = tasks.Chat(chat_format.continued, chat_format.stops)
    try:
        found = benchmarks.run(made.tuned, made.tokens, "fp32", made.tasks, 2, chat)
    finally:
        hook.remove()
    assert found["chat"] is True
    assert seen
    for text in seen:
        assert text.startswith("### Human: What is ")
        assert "Answer:### Assistant:" in text

    from stages.lib.model.harness import Harness

    harness = Harness(made.tuned, made.tokens, "fp32", chat)
    history = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " Because"}]
    opened = harness.apply_chat_template(history, add_generation_prompt=False)
    assert opened == harness.apply_chat_template(history[:1]) + " Because"


def test_an_answer_in_a_chat_ends_where_the_recorded_format_does(made: Made) -> None:
    from lm_eval.api.instance import Instance

    from stages.lib.model.harness import Harness

    options = {"until": ["\n"], "max_gen_toks": 4}
    request = Instance("generate_until", {}, (f"{ASKED[1]}\nAnswer:", options), 0)
    (whole,) = Harness(made.tuned, made.tokens, "fp32", None).generate_until([request])
    assert len(whole) > 6
    chat = tasks.Chat(str, formats.Stops((whole[3:6],), (made.tokens.eos,)))
    passes: list[int] = []
    hook = made.tuned.register_forward_pre_hook(lambda module, args: passes.append(1))
    (cut,) = Harness(made.tuned, made.tokens, "fp32", chat).generate_until([request])
    hook.remove()
    assert cut == whole.split(whole[3:6])[0]
    assert len(passes) < 4


def test_a_stop_signal_ends_it(made: Made) -> None:
    """Also where a task's own code swallowed what the signal raised: here nothing is raised by it at all."""
    hook = made.tuned.register_forward_pre_hook(lambda module, args: preemption.request("stopped"))
    try:
        with pytest.raises(TryAgain, match="stopped"):
            benchmarks.run(made.tuned, made.tokens, "fp32", made.tasks, 2, None)
    finally:
        hook.remove()
        preemption.listen()


def test_a_folder_with_a_group(
    made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its score stands for its tasks, which are not loaded twice."""
    for name, kind in (("choosing", CHOOSING), ("again", CHOOSING), ("saying", SAYING)):
        write_task(tmp_path / f"{name}.yaml", made.folder / "rows.jsonl", kind)
    together = [{"metric": "acc", "aggregation": "mean"}]
    group = {"group": "both", "task": ["choosing", "again"], "aggregate_metric_list": together}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    found = tasks.prepare([str(tmp_path)])
    assert sorted(found["tasks"]) == ["again", "choosing", "saying"]
    assert "benchmark again" not in capfd.readouterr().err
    result = benchmarks.run(made.tuned, made.tokens, "fp32", found, 4, None)
    share = sum(made.base_right["choosing"][:4]) / 4
    assert scores(result)["both"]["base"] == share
    assert {task: score["group"] for task, score in scores(result).items()} == {
        "again": "both", "choosing": "both", "saying": None, "both": None,
    }  # fmt: skip


def test_a_changed_task_is_another_input(made: Made, tmp_path: Path) -> None:
    path = write_task(tmp_path / "mine.yaml", made.folder / "rows.jsonl", SAYING)
    before = tasks.digest(["hellaswag", str(tmp_path)])
    assert before == tasks.digest([str(tmp_path), "mmlu"])
    path.write_text(path.read_text() + "num_fewshot: 1\n")
    assert before != tasks.digest(["hellaswag", str(tmp_path)])
    assert tasks.digest(["hellaswag"]) is None


def find(*names: str) -> None:
    tasks.digest(names)
    tasks.prepare(names)


def refusal(*names: str) -> StageError:
    with pytest.raises(StageError) as caught:
        find(*names)
    assert "\n" not in caught.value.format_message()
    return caught.value


def test_unknown_name() -> None:
    error = refusal("hellaswga")
    assert error.exit_code == 2
    assert "'hellaswga'" in error.format_message()
    assert "did you mean hellaswag" in error.format_message()


WRONG = [
    ({"unsafe_code": True}, SAYING, 2, "runs the code"),
    ({}, SAYING.replace("exact_match", "nobody/metric, aggregation: mean"), 2, "'nobody/metric'"),
    ({}, SAYING.replace("exact_match", "exact_mach"), 2, "none of the harness'"),
    ({"output_type": "guessing"}, "", 2, "guessing"),
    ({}, "metric_list: [", 2, "no task that can be run"),
    ({"doc_to_text": "!function none.at_all"}, SAYING, 2, "no task that can be run"),
    ({"dataset_kwargs": {"data_files": "/nowhere/rows.jsonl"}}, SAYING, 66, "/nowhere/rows.jsonl"),
]


@pytest.mark.parametrize(("more", "kind", "code", "word"), WRONG, ids=[w[3] for w in WRONG])
def test_a_task_that_cannot_be_run(
    made: Made, tmp_path: Path, more: dict[str, Any], kind: str, code: int, word: str
) -> None:
    path = write_task(tmp_path / "mine.yaml", made.folder / "rows.jsonl", kind, **more)
    path.write_text(path.read_text().replace('"!function none.at_all"', "!function none.at_all"))
    error = refusal(str(path))
    assert error.exit_code == code, error.format_message()
    assert word in error.format_message()
    assert "mine" in error.format_message()


def test_no_metric_is_fetched(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be code of others, and run."""
    import evaluate

    class Asked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            """Nothing."""

    paths: list[str] = []
    with HTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(evaluate.config, "HUB_EVALUATE_URL", f"{url}/{{path}}/{{name}}")
        monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
        kind = SAYING.replace("exact_match", "nobody/metric, aggregation: mean")
        refusal(str(write_task(tmp_path / "mine.yaml", made.folder / "rows.jsonl", kind)))
        server.shutdown()
    assert paths == []


def test_data_that_is_broken(made: Made, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "What')
    error = refusal(str(write_task(tmp_path / "mine.yaml", data, SAYING)))
    assert error.exit_code == 65, error.format_message()


def test_a_file_or_folder_that_is_not_there(tmp_path: Path) -> None:
    error = refusal(str(tmp_path / "nothing.yaml"))
    assert error.exit_code == 66
    assert "nothing.yaml" in error.format_message()
    (tmp_path / "empty").mkdir()
    assert "holds no task" in refusal(f"{tmp_path}/empty").format_message()


def test_data_on_a_hub_that_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = write_task(tmp_path / "mine.yaml", tmp_path, SAYING, dataset_path="owner/no-such-data")
    path.write_text(path.read_text().replace(f'{{"data_files": "{tmp_path}"}}', "{}"))
    error = refusal(str(path))
    assert error.exit_code == 66, error.format_message()
    assert "HF_HUB_OFFLINE" in error.format_message()


HIDDEN = """
import sys
class Without:
    def __init__(self, finder, names): self.finder, self.names = finder, names
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Without(finder, {"lm_eval", "openai"}) for finder in sys.meta_path]
"""


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("from stages.lib.model import tasks\nfrom stages.lib.run.exits import Reported\n"
         "with Reported(): tasks.prepare(['hellaswag'])", "BENCHMARKS"),
        ("from stages.__main__ import main\n"
         "sys.argv[1:] = 'evaluate --judge-url http://a/v1 --judge-model b'.split()\nmain()", "JUDGE_URL"),
    ],
)  # fmt: skip
def test_the_extra_is_not_installed(tmp_path: Path, code: str, word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN + code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(said) == 1
    assert word in said[0]
    assert "requirements-eval.txt" in said[0]
