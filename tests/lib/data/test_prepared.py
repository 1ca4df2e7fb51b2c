"""The files of a data artifact, for us and for others."""

import numpy as np
import pytest

from stages.lib.data import assembly, prepared
from stages.lib.data.conversation import loads
from stages.lib.data.prepared import Part
from tests.conftest import REAL_ROWS
from tests.lib.data.making import Maker, rows
from tests.lib.data.talk import make


def test_others_can_read_it(maker: Maker) -> None:
    from datasets import Dataset

    made = maker.prepare(maker.file("some.jsonl", rows(40)), held_out=0.2)
    data = Dataset.from_file(str(made.folder / "train.arrow"))
    assert data.column_names == ["row", "input_ids", "trained", "source"]
    part = Part(made.folder / "train.arrow")
    assert len(data) == len(part)
    for number, (row, ids, learned) in enumerate(prepared.head(made.folder, 5)):
        assert data[number] == {"row": row, "input_ids": ids, "trained": learned, "source": 0}
        assert np.array_equal(part[number][0], ids)
        assert np.array_equal(part[number][1], learned)
        assert part.lengths[number] == len(ids)
        assert part.trained[number] == sum(learned)


def test_the_head_is_as_long_as_asked(maker: Maker) -> None:
    """Across the batches of the file too."""
    made = maker.prepare(maker.file("some.jsonl", rows(1200)))
    for count in (0, 1, 513, 1200, 5000):
        found = [row for row, _, _ in prepared.head(made.folder, count)]
        assert found == list(range(1, min(count, 1200) + 1))


def test_pieces_of_a_conversation_have_its_number(maker: Maker) -> None:
    long = "### Human: Say it.### Assistant: " + "one two three four five " * 30
    first = maker.file("one.jsonl", rows(2))
    second = maker.file("two.jsonl", [long, *rows(1, first=90)])
    made = maker.prepare(f"{first},{second}", limit=64, policy="split").folder / "train.arrow"
    part = Part(made, ["one", "two"])
    pieces = len(part) - 3
    assert pieces > 1
    assert part.numbers.tolist() == [1, 2, *[3] * pieces, 4]
    assert part.sources.tolist() == [0, 0, *[1] * pieces, 1]
    assert part.place(1) == {"source": "one", "row": 2, "tokens": part.lengths[1]}
    assert part.place(2) == {"source": "two", "row": 3, "tokens": part.lengths[2]}
    assert Part(made).place(2)["source"] == 1


def test_a_part_without_rows(maker: Maker) -> None:
    part = Part(maker.prepare(maker.file("some.jsonl", rows(2))).folder / "held_out.arrow")
    assert (len(part), part.lengths.tolist(), part.trained.tolist()) == (0, [], [])
    assert (part.numbers.tolist(), part.sources.tolist()) == ([], [])


def test_an_evaluation_asks_the_users_question_first(maker: Maker) -> None:
    made = maker.prepare(maker.file("some.jsonl", rows(40)), held_out=0.5)
    form = make("guanaco", maker.tokens)
    own, *others = prepared.questions(made.folder, 3, "Why?", form)
    assert (own["question"], own["reference"]) == ("Why?", None)
    assert own["prompt"] == form.prompt_text(loads(own))
    assert [one["row"] for one in others] == [
        one["row"] for one in prepared.prompts(made.folder)[:3]
    ]
    for one in (own, *others):
        assert one["ids"] == form.prompt(loads(one))
    assert prepared.questions(made.folder, 0, None, form) == []


def test_questions_are_kept_for_evaluation(maker: Maker) -> None:
    """The first of them, in the words of the data set: a question may hold any line separator."""
    texts = [f"### Human: {n} a\u2028b\x85c\u2029d### Assistant: e{n}" for n in range(200)]
    made = maker.prepare(maker.file("some.jsonl", texts), held_out=0.5)
    questions = prepared.prompts(made.folder)
    held_out = dict(made.rows("held_out"))
    assert [entry["row"] for entry in questions] == list(held_out)[: prepared.PROMPTS_KEPT]
    form = make("guanaco", maker.tokens)
    for entry in questions:
        assert entry["question"].endswith("a\u2028b\x85c\u2029d")
        assert entry["prompt"] == f"### Human: {entry['question']}### Assistant:"
        ids = form.prompt(loads(entry))
        assert held_out[entry["row"]][: len(ids)] == ids


def test_all_pieces_of_a_row_are_held_out_together(maker: Maker) -> None:
    """Of a row that was split, where no other is held out."""
    long = [f"### Human: {n}### Assistant: " + f"word {n} " * 150 for n in range(2)]
    path = maker.file("long.jsonl", long)
    made = maker.prepare(path, held_out=1e-6, policy="split")
    whole = maker.prepare(path, policy="split")
    sides = [made.rows(part) for part in prepared.PARTS]
    assert [len({row for row, _ in side}) for side in sides] == [1, 1]
    assert sorted(sides[0] + sides[1]) == sorted(whole.rows("train"))
    assert len(sides[1]) == len(sides[0]) > 1


def test_many_processes_make_the_same_artifact(
    maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(REAL_ROWS) if REAL_ROWS.is_file() else maker.file("some.jsonl", rows(3000))
    alone = maker.prepare(path, held_out=0.1, policy="split", repeats="near")
    monkeypatch.setattr(assembly, "SMALL", 0)
    shared = maker.prepare(path, held_out=0.1, policy="split", repeats="near")
    assert {file.name for file in alone.folder.iterdir()} == {
        "train.arrow", "held_out.arrow", "prompts.jsonl", "ledger.jsonl", "rejects.jsonl",
    }  # fmt: skip
    for file in alone.folder.iterdir():
        assert file.read_bytes() == (shared.folder / file.name).read_bytes(), file.name
