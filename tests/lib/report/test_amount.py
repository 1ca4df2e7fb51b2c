"""How much there is to learn: as `train` will pack it, or the most that the settings allow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stages.lib.data import lengths
from stages.lib.data.bins import Schedule
from stages.lib.model import cutting
from stages.lib.report import amount

GIVEN: dict[str, Any] = {
    "base_model": "sample", "max_rows": None, "max_length": 1024, "validation_fraction": 0.05,
    "batch_tokens": 4096, "micro_batch_tokens": None, "num_gpus": 1, "epochs": 1, "max_steps": None, "seed": 3,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose data are 300 rows, of which 20 are held out, in several batches."""
    (tmp_path / "data").mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 280), ("held_out", 20)):
        rows = [[1] * n for n in generator.integers(8, 700, count).tolist()]
        kind = pa.list_(pa.int32())
        schema = pa.schema({"input_ids": kind})
        with pa.ipc.new_stream(str(tmp_path / "data" / f"{part}.arrow"), schema) as stream:
            for begin in range(0, count, 64):
                some = pa.array(rows[begin : begin + 64], kind)
                stream.write_batch(pa.record_batch([some], schema=schema))
    names = ("MAX_ROWS", "MAX_LENGTH", "VALIDATION_FRACTION")
    settings = {name: {"value": GIVEN[name.lower()], "from": "default"} for name in names}
    manifest = {
        "schema": 1, "files": {}, "inputs": {"base": {"name": "sample"}}, "settings": settings,
        "metrics": {"tokens": 1000, "trainable_tokens": 250},
    }  # fmt: skip
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def train_lengths() -> Any:
    return np.random.default_rng(0).integers(8, 700, 280)


def test_lengths_are_read_across_batches_and_from_a_slice(run: Path, tmp_path: Path) -> None:
    assert lengths.of_part(run / "data", "train").tolist() == train_lengths().tolist()
    batch = pa.record_batch({"input_ids": pa.array([[1], [1, 1], [1] * 5], pa.list_(pa.int32()))})
    with pa.ipc.new_stream(str(tmp_path / "cut.arrow"), batch.schema) as stream:
        stream.write_batch(batch.slice(1))
    assert lengths.of_part(tmp_path, "cut").tolist() == [2, 5]


@pytest.mark.parametrize(("epochs", "steps"), [(1, None), (2.5, None), (1, 7)])
def test_steps_are_those_of_the_schedule(run: Path, epochs: float, steps: int | None) -> None:
    found = amount.find(run, GIVEN | {"epochs": epochs, "max_steps": steps}, 1)
    longest = int(train_lengths().max())
    size = cutting.sizes(4096, longest, None)[0]
    whole = Schedule(train_lengths(), size, 4096 // size, epochs, steps, 3)
    assert (found.steps, found.longest, found.at_most) == (whole.steps, longest, False)
    tokens = sum(int(train_lengths()[whole.rows(n)].sum()) for n in range(whole.total_bins))
    assert found.tokens == tokens
    assert found.rows.learned == 0.25
    assert sorted(found.rows.lengths) == sorted(train_lengths().tolist())
    held_out = int(lengths.of_part(run / "data", "held_out").sum())
    assert found.evaluated == 4 * min(cutting.evaluated(whole.total_bins * size), held_out)


def test_very_many_rows_are_not_packed_and_counted_alike(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (GIVEN | {"epochs": 3}, GIVEN | {"max_steps": 9}):
        packed = amount.find(run, given, 1)
        with monkeypatch.context() as patch:
            patch.setattr(amount, "PACKED", 10)
            found = amount.find(run, given, 1)
        assert found.tokens == pytest.approx(packed.tokens, rel=0.05)
        assert found.steps == pytest.approx(packed.steps, abs=2)


def test_what_was_prepared_otherwise_is_said(run: Path) -> None:
    assert "again" not in amount.find(run, GIVEN, 1).source
    changed = amount.find(run, GIVEN | {"max_length": 2048, "base_model": "other"}, 1).source
    assert changed.endswith(
        "; but MAX_LENGTH was 1024, is now 2048, it was prepared for sample: run `prepare-data` again"
    )


def test_without_data_it_is_the_most_that_the_settings_allow(tmp_path: Path) -> None:
    rows = amount.find(tmp_path, GIVEN | {"max_rows": 100, "epochs": 2}, 1)
    assert (rows.tokens, rows.steps, rows.at_most) == (2 * 95 * 1024, 48, True)
    assert rows.evaluated == 4 * cutting.evaluated(rows.tokens)
    assert amount.find(tmp_path, GIVEN | {"max_rows": 100}, 3).tokens == 3 * 95 * 1024
    steps = amount.find(tmp_path, GIVEN | {"max_rows": 100, "max_steps": 5}, 1)
    assert (steps.tokens, steps.steps) == (5 * 4096, 5)
    none = amount.find(tmp_path, GIVEN | {"max_steps": 5, "validation_fraction": 0.0}, 1)
    assert none.evaluated == 0
    assert none.work == none.tokens
    unknown = amount.find(tmp_path, GIVEN, 1)
    assert (unknown.tokens, unknown.steps, unknown.work) == (None, None, None)
    assert "run `prepare-data`" in unknown.source
