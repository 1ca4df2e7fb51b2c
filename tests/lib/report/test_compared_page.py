"""Several runs on one page: what differs is told apart from what is alike."""

from pathlib import Path

import pytest

from stages.lib.report import compared_page
from stages.lib.report.compared_page import cautions, names, page, results, sentence, settings
from stages.lib.report.summary import compared
from tests.lib.report import runs
from tests.lib.report.test_preview import Page
from tests.lib.report.test_run_page import hostile


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Runs of the same data, the second better."""
    return [runs.whole(tmp_path / "first", gain=0.2), runs.whole(tmp_path / "second", gain=0.5)]


def test_the_best_run_is_named(two: list[Path]) -> None:
    found = [runs.look(run) for run in two]
    losses = [run.evaluation["tuned"]["loss"] for run in found if run.evaluation]
    assert sentence(found).startswith(
        f"second has the least held-out loss of 2 evaluated runs: {losses[1]:.3f}"
    )
    assert f"first has the most, {losses[0]:.3f}" in sentence(found)
    rows = {row["words"]: [cell["value"] for cell in row["cells"]] for row in results(found)}
    assert rows["held-out loss, nats a token"] == [f"{loss:.3f}" for loss in losses]
    assert rows["state"] == ["done", "done"]
    assert rows["peak GPU memory"] == ["21.00 GiB"] * 2
    shown = Page(page(found)).text
    for row in results(found):
        assert row["words"] in shown
        for cell in row["cells"]:
            assert cell["value"] in shown
            assert (cell["interval"] or "") in shown
    assert "second" in compared(found)


def test_settings_that_differ_are_told_from_those_that_do_not(two: list[Path]) -> None:
    given = runs.settings(LORA_RANK=(8, "flag"), ONLY_HERE=("x", "preset"))
    manifest = {"stage": "generate", "inputs": {}, "metrics": {}, "settings": given}
    runs.publish(two[1], "generations", {"g": ""}, manifest)
    differing, alike = settings([runs.look(run) for run in two])
    assert [row["name"] for row in differing] == ["LORA_RANK", "ONLY_HERE"]
    assert differing[0]["cells"] == [("16", "flag"), ("16; 8", "flag; generate: flag")]
    assert differing[1]["cells"] == [("not set", ""), ("x", "preset")]
    assert ("LEARNING_RATE", "0.0002") in alike
    shown = Page(page([runs.look(run) for run in two])).text
    assert f"{len(alike)} settings are alike in all" in shown


def test_losses_of_other_rows_are_not_compared(
    two: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runs.LENGTHS, "held_out", [7, 13])
    runs.data(two[1])
    found = [runs.look(run) for run in two]
    assert "different rows" in sentence(found)
    assert any("different data" in said for said in cautions(found))
    other = {"dataset": {"name": "rows.jsonl", "sources": []}, "base": {"name": "another"}}
    runs.data(two[1], inputs=other)
    assert any("different base models" in said for said in cautions([runs.look(r) for r in two]))


def test_runs_that_are_not_done_are_compared_by_what_they_have(
    two: list[Path], tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    runs.data(begun)
    runs.checkpoint(begun, 40)
    found = [runs.look(run) for run in (two[0], begun)]
    assert sentence(found).startswith("Only one of 2 runs was evaluated")
    shown = Page(page(found)).text
    assert "unfinished" in shown
    assert "Step 40 of 60 is safe" in shown
    held_out = compared_page.plots(found)[1]
    assert not isinstance(held_out, str)
    assert [name for *_, name in held_out.keys] == ["first", "begun"]


def test_runs_of_one_name_are_told_apart(two: list[Path], tmp_path: Path) -> None:
    alike = runs.whole(tmp_path / "deeper" / "first")
    found = [runs.look(run) for run in (two[0], alike)]
    assert names(found) == [str(two[0]), str(alike)]
    same = [runs.look(two[0])] * 2
    assert len({*names(same)}) == 2
    assert "no setting differs" in Page(page(same)).text.lower()


def test_no_text_does_more_than_be_seen(two: list[Path], tmp_path: Path) -> None:
    source = page(
        [runs.look(run) for run in (hostile(tmp_path / "bad"), two[0], hostile(tmp_path / "worse"))]
    )
    assert {tag for tag, _ in Page(source).elements}.isdisjoint({"script", "img", "iframe", "link"})
    assert "<script src='http://x'></script>&amp;" in Page(source).text
