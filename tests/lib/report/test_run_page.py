"""A run's page: all that the run has is there, what it lacks leaves a note, and no text does anything."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from stages.lib.data import prepared
from stages.lib.report import comparison, pictures, run_page
from stages.lib.run import artifact
from tests.lib.report import runs
from tests.lib.report.test_preview import HOSTILE, Page

SECTIONS = (
    "Training", "Data", "Base against tuned", "Answers side by side", "Adapter", "Merge check",
    "Predicted against measured", "Stages", "Settings", "Versions and hashes",
)  # fmt: skip
LARGEST = 3_000_000


class Spaced(Page):
    """Cells are words of their own."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        self.text += " "


def page(run: Path) -> Page:
    return Spaced(run_page.page(runs.look(run)))


def words(of: Page) -> str:
    return " ".join(of.text.split())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.whole(tmp_path / "run")


def test_all_that_a_run_has_is_on_its_page(run: Path) -> None:
    shown = page(run)
    text = words(shown)
    for section in SECTIONS:
        assert section in text
    assert not [e for e in shown.elements if e[1].get("class") == "missing"]
    assert len([e for e in shown.elements if e[0] == "svg" and e[1].get("class") == "plot"]) >= 9
    result = json.loads((run / "evaluation" / comparison.FILE).read_text())
    assert result["sentence"] in text
    for entry in result["answers"]:
        assert entry["question"] in text
    for said in ("exit 75: stopped by SIGTERM", "99.75%", "+0.250%", "That base is the closer one.",
                 "NVIDIA H100", "rows.jsonl", "owner/base", "2.13.0+cpu"):  # fmt: skip
        assert said in text, said
    for name in ("data", "adapter", "evaluation", "merged"):
        made = artifact.load(run / name)
        assert made
        assert made.digest in text
        for entry in made.manifest["files"].values():
            assert entry["sha256"] in text


def test_every_setting_has_its_origin(run: Path) -> None:
    text = words(page(run))
    for row in (
        "LORA_RANK 16 flag train", "LORA_ALPHA 16 environment train", "LEARNING_RATE 0.0002 preset train",
        "LORA_TARGETS q_proj,v_proj default train",
        "MAX_LENGTH 1024 default prepare-data, train, evaluate, merge",
    ):  # fmt: skip
        assert row in text, row
    first = text.index("LORA_RANK 16")  # what was given before what was not
    assert (
        first
        < text.index("LORA_ALPHA 16")
        < text.index("LEARNING_RATE 0.0002")
        < text.index("MAX_LENGTH 1024")
    )


def test_predicted_and_measured_stand_beside_each_other(run: Path) -> None:
    text = words(page(run))
    assert "peak GPU memory -4.5% predicted 22.00 GiB measured 21.00 GiB" in text
    assert "speed -9.5% predicted 10,000 tokens/s measured 9,050 tokens/s" in text


def test_the_accounts_add_up(run: Path) -> None:
    found = runs.look(run)
    rows = pictures.rows_account(found.metrics("data"))
    counts = [int(row["count"].replace(",", "").replace("−", "-")) for row in rows]
    assert counts == [9, -2, -1, 6, -2, 4]
    tokens = pictures.tokens_account(found.metrics("data"), found.learned, found.metrics("adapter"))
    counts = [int(row["count"].replace(",", "").replace("−", "-")) for row in tokens]
    encoded, lost, added, whole, read, held, once, learned = counts
    assert encoded + lost + added == whole == 82
    assert whole + read + held == once == 59
    assert learned == 2 * once
    for row in rows + tokens:
        assert 0 <= row["start"] <= row["start"] + row["width"] <= 100.2


def test_an_account_reads_the_files_as_they_are(run: Path) -> None:
    for name, lengths in runs.LENGTHS.items():
        path = run / "data" / f"{name}.arrow"
        found, learned = prepared.account(path)
        part = prepared.Part(path)
        assert found.tolist() == part.lengths.tolist() == lengths
        assert learned == part.trained.sum() == sum(lengths) - len(lengths)
    assert runs.look(run).lengths["train"] == Counter(runs.LENGTHS["train"])


@pytest.mark.parametrize(
    ("made", "missing"),
    [((), 9), (("data",), 6), (("data", "checkpoint"), 5), (("data", "adapter"), 3)],
)
def test_what_is_missing_leaves_a_note(tmp_path: Path, made: tuple[str, ...], missing: int) -> None:
    run = tmp_path / "run"
    runs.attempt(run, 1, "train", 80, "the loss is not finite")
    if "data" in made:
        runs.data(run)
    if "checkpoint" in made:
        runs.checkpoint(run, 20)
    if "adapter" in made:
        runs.adapter(run, "0" * 64, runs.steps())
    source = run_page.page(runs.look(run))
    for section in SECTIONS:
        assert section in source
    notes = re.findall('<p class="missing">([^\n]*)', source)
    assert len([note for note in notes if "not recorded" not in note]) == missing
    assert "exit 80: the loss is not finite" in source


def test_an_older_run_lacks_plots_and_says_so(tmp_path: Path) -> None:
    bare = {
        "predicted_gpu_bytes": None,
        "peak_gpu_bytes": None,
        "predicted_tokens_per_second": None,
    }
    text = words(page(runs.whole(tmp_path / "run", recorded=False, **bare)))
    for name in ("Throughput", "GPU memory", "Progress over time"):
        assert f"{name}: not recorded." in text
    assert "There is no prediction to compare" in text
    assert "peak memory 1.00 GiB of the host" in text


def hostile(run: Path) -> Path:
    """A run in which every text that comes from outside is such a one."""
    given = runs.settings(**{HOSTILE: (HOSTILE, HOSTILE), "DATASET": ([HOSTILE], "flag")})
    source = {"name": HOSTILE, "sources": [{"name": HOSTILE}]}
    made = runs.data(run, settings=given, inputs={"dataset": source, "base": {"name": HOSTILE}})
    norms = {f"model.layers.0.{HOSTILE}": 1.0}
    first = {"step": 1, "modules": 1, "least": 1.0, "least_in": HOSTILE, "without_input": [HOSTILE]}
    health = {"b_norms": norms, "unmoved": [HOSTILE], "logit_change": 1.0, "first_gradients": first}
    adapter = runs.adapter(run, made.digest, runs.steps(), health=health)
    result = runs.evaluated()
    entry = result["answers"][0]
    entry["question"] = entry["reference"] = entry["base"]["text"] = entry["tuned"]["text"] = (
        HOSTILE
    )
    result["by_source"][0]["source"] = result["sentence"] = HOSTILE
    runs.evaluation(run, adapter.digest, result)
    runs.merged(run, adapter.digest)
    runs.attempt(run, 1, HOSTILE, 80, HOSTILE)
    error = {
        "stage": "train",
        "exit": 80,
        "code": HOSTILE,
        "message": HOSTILE,
        "hint": HOSTILE,
        "attempt": 1,
    }
    (run / "error.json").write_text(json.dumps(error))
    return run


def test_no_text_does_more_than_be_seen(tmp_path: Path) -> None:
    source = run_page.page(runs.look(hostile(tmp_path / "run")))
    shown = Page(source)
    assert {tag for tag, _ in shown.elements}.isdisjoint(
        {"script", "img", "iframe", "link", "object"}
    )
    assert "<script src='http://x'></script>&amp;" in shown.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", source)
    for _, attributes in shown.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def test_no_secret_is_on_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_CANARY<&'42\"xyz"
    result = json.loads((run / "evaluation" / comparison.FILE).read_text())
    result["answers"][0]["tuned"]["text"] = f"It is {secret}."
    made = artifact.load(run / "adapter")
    assert made
    runs.evaluation(run, made.digest, result)
    assert "CANARY" in run_page.page(runs.look(run))
    monkeypatch.setenv("HF_TOKEN", secret)
    assert "CANARY" not in run_page.page(runs.look(run))


def test_the_largest_run_stays_below_3_mb(tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = {f"SETTING_{n}": ("'" * 9000, "flag") for n in range(60)}
    made = runs.data(run, settings=runs.settings(**given))
    norms = {f"model.layers.{n}.mlp.experts.{m}.up_proj": 1.0 for n in range(48) for m in range(8)}
    health = {"b_norms": norms, "unmoved": [], "logit_change": 1.0, "first_gradients": None}
    adapter = runs.adapter(run, made.digest, runs.steps(1_000), health=health)
    result = runs.evaluated()
    long = result["answers"][0] | {"question": "<" * 8_000, "reference": "'" * 8_000}
    long["base"], long["tuned"] = (long[side] | {"text": '"' * 8_000} for side in ("base", "tuned"))
    result["answers"] = [long] * 64
    result["by_source"] = [result["by_source"][0] | {"source": "é" * 500}] * 2_000
    runs.evaluation(run, adapter.digest, result)
    source = run_page.page(runs.look(run))
    assert len(source.encode()) < LARGEST
    assert "more characters)" in source
    assert "The first 16 of 64" in " ".join(source.split())
