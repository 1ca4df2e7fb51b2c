"""The same rows from every kind of file."""

import json
from pathlib import Path

import pytest

from stages.lib.data import sources

ROWS = [{"text": f'### Human: {n}, "ü"?### Assistant: {n}\nand more'} for n in range(5)]


def write(folder: Path, suffix: str) -> Path:
    """`ROWS` in a file of some kind."""
    import pandas

    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, ROWS)).encode())
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix == ".csv":
        pandas.DataFrame(ROWS).to_csv(path, index=False)
    else:
        pandas.DataFrame(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_each_kind_of_file(tmp_path: Path, suffix: str) -> None:
    source = sources.find(str(write(tmp_path, suffix)), None)
    assert [row.data for row in sources.rows(source, source.train)] == ROWS
    assert not source.held_out


def test_json_lines_under_the_name_of_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    source = sources.find(str(path), None)
    assert [row.data for row in sources.rows(source, source.train)] == ROWS


@pytest.mark.parametrize("name", ["test", "rows_eval", "validation-00000-of-00001", "best_dev"])
def test_a_folder_with_a_split_of_its_own(tmp_path: Path, name: str) -> None:
    write(tmp_path, ".jsonl")
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[0]))
    source = sources.find(str(tmp_path), None)
    assert [path.name for path in source.train] == ["rows.jsonl"]
    assert [path.stem for path in source.held_out] == [name]


def test_a_glob(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"part{number}.jsonl").write_text(json.dumps(ROWS[number]))
    source = sources.find(str(tmp_path / "part[01].jsonl"), None)
    assert [row.data for row in sources.rows(source, source.train)] == ROWS[:2]


def test_the_identity_follows_the_contents(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl")
    first = sources.find(str(path), None).inputs()
    again = sources.reference(str(path), first)
    assert again == first
    path.write_text(path.read_text().replace("more", "less"))
    assert sources.reference(str(path), first) != first


def test_splits_in_folders_and_what_lies_beside_them(tmp_path: Path) -> None:
    for name in ("train", "test", "validation"):
        (tmp_path / "ds" / name).mkdir(parents=True)
        (tmp_path / "ds" / name / "0000.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "ds" / "dataset_infos.json").write_text("{}")
    source = sources.find(str(tmp_path / "ds"), None)
    assert [path.parent.name for path in source.train] == ["train"]
    assert [path.parent.name for path in source.held_out] == ["test", "validation"]


def test_a_file_that_was_only_touched_is_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl")
    first = sources.find(str(path), None).inputs()
    path.touch()
    assert sources.reference(str(path), first) == first
