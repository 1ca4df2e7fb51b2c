"""The data artifact: token ids and the trained mask in Arrow, which `datasets` reads.

Columns of `train.arrow` and `held_out.arrow`: `row` (int64, number in the source, from 1), `input_ids` (list of
int32), `trained` (list of bool: whether the token is learned), and `source` (int32, from 0).
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.lib.data import conversation
from stages.lib.data.formats import Format
from stages.lib.data.lengths import PARTS as PARTS
from stages.lib.data.preparation import Batch

PROMPTS = "prompts.jsonl"
PROMPTS_KEPT = 64


class Writer:
    """Writes the files of a data artifact, a batch of rows at a time."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self.pa, self.folder = pa, folder
        fields = {
            "row": pa.int64(), "input_ids": pa.list_(pa.int32()), "trained": pa.list_(pa.bool_()),
            "source": pa.int32(),
        }  # fmt: skip
        self.schema = pa.schema(fields)
        self.prompts: list[dict[str, Any]] = []
        self.stack = contextlib.ExitStack()
        self.streams = {part: self._open(part) for part in PARTS}

    def _path(self, part: str) -> str:
        return str(self.folder / f"{part}.arrow")

    def _open(self, part: str) -> Any:
        return self.stack.enter_context(self.pa.ipc.new_stream(self._path(part), self.schema))

    def write(
        self,
        part: str,
        rows: npt.NDArray[np.int64],
        source: int,
        batch: Batch,
        index: npt.NDArray[np.int64],
    ) -> None:
        """Append some pieces of a batch, `index`, which come from the rows of the numbers `rows`."""
        pa = self.pa
        bounds = batch.starts.tolist()
        pieces = [slice(bounds[i], bounds[i + 1]) for i in index.tolist()]
        starts = self._array(np.cumsum([0, *(p.stop - p.start for p in pieces)], dtype=np.int32))
        lists = [
            pa.ListArray.from_arrays(
                starts, self._array(np.concatenate([values[p] for p in pieces]))
            )
            for values in (batch.ids, batch.learned)
        ]
        columns = [
            self._array(rows), *lists, self._array(np.full(len(rows), source, dtype=np.int32)),
        ]  # fmt: skip
        self.streams[part].write_batch(pa.record_batch(columns, schema=self.schema))

    def _array(self, values: npt.NDArray[Any]) -> Any:
        # Not `pa.array`, which imports pandas to ask whether it is given one of its own.
        pa, count = self.pa, len(values)
        if values.dtype == bool:
            values = np.packbits(values, bitorder="little")
            return pa.Array.from_buffers(pa.bool_(), count, [None, pa.py_buffer(values)])
        kind = pa.from_numpy_dtype(values.dtype)
        return pa.Array.from_buffers(
            kind, count, [None, pa.py_buffer(np.ascontiguousarray(values))]
        )

    def ask(self, row: int, prompt: dict[str, Any] | None) -> None:
        """Keep a held-out question as text, of the first ones."""
        if prompt and len(self.prompts) < PROMPTS_KEPT:
            self.prompts.append({"row": row} | prompt)

    def hold_out(self, row: int, prompt: dict[str, Any] | None) -> None:
        """Move a row from the training part to the held-out part, which is empty."""
        train = Path(self._path("train"))
        whole = train.rename(train.with_suffix(".whole"))
        with self.stack, self.pa.OSFile(str(whole)) as file:
            self.streams = {part: self._open(part) for part in PARTS}
            for batch in self.pa.ipc.open_stream(file):
                moved = np.asarray(batch.column("row")) == row
                for part, chosen in (("train", ~moved), ("held_out", moved)):
                    if chosen.any():
                        self.streams[part].write_batch(batch.filter(self.pa.array(chosen)))
        whole.unlink()
        self.ask(row, prompt)

    def close(self) -> None:
        """End the files."""
        self.stack.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        lines = "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in self.prompts)
        (self.folder / PROMPTS).write_text(lines, encoding="utf-8")


def account(path: Path) -> tuple[npt.NDArray[np.int64], int]:
    """Tokens of each row of a part, [rows], and how many of all its tokens are learned; no token is read."""
    import pyarrow as pa

    lengths, learned = [np.empty(0, np.int64)], 0
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            lengths.append(np.diff(np.asarray(batch.column("input_ids").offsets)).astype(np.int64))
            learned += batch.column("trained").flatten().true_count
    return np.concatenate(lengths), learned


class Part:
    """One part of the prepared data, memory-mapped.

    Args:
        names: of its sources, for `place`.

    Attributes:
        lengths: tokens of each row, int64 [rows]. trained: learned tokens of each row, int64 [rows].
        numbers: of each row's conversation, which several rows share where it was split, int64 [rows].
        sources: of each row, int64 [rows].
    """

    def __init__(self, path: Path, names: Sequence[str] = ()) -> None:
        import pyarrow.compute as pc
        from datasets import Dataset

        self.rows = Dataset.from_file(str(path)).with_format("numpy")
        table = self.rows.data
        self.lengths = pc.list_value_length(table.column("input_ids")).to_numpy().astype(np.int64)
        self.numbers, self.sources = (
            table.column(name).to_numpy().astype(np.int64) for name in ("row", "source")
        )
        self.names = names
        masks = table.column("trained").chunks
        self.trained = np.concatenate([np.empty(0, np.int64), *map(_true_counts, masks)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Token ids [tokens] and trained mask [tokens] of a row."""
        found = self.rows[int(row)]
        return np.asarray(found["input_ids"], np.int64), np.asarray(found["trained"], bool)

    def place(self, row: int) -> dict[str, Any]:
        """Where a row comes from: its `source`, its number `row` as the ledger counts, and its `tokens`."""
        source = int(self.sources[row])
        name = self.names[source] if self.names else source
        return {"source": name, "row": int(self.numbers[row]), "tokens": int(self.lengths[row])}


def _true_counts(masks: Any) -> npt.NDArray[np.int64]:
    total = np.concatenate([[0], np.cumsum(masks.flatten().to_numpy(zero_copy_only=False))])
    bounds = np.concatenate([[0], np.cumsum(masks.value_lengths().to_numpy())])
    return np.asarray(np.diff(total[bounds]), dtype=np.int64)


def prompts(folder: Path) -> list[dict[str, Any]]:
    """The held-out questions of a data artifact: `row`, `question`, `prompt` (rendered), `reference`, and the
    conversation so far (`messages` and `tools`; see `conversation.loads`)."""
    # Not splitlines, which also cuts at the line separators that a text may hold.
    lines = (folder / PROMPTS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def questions(
    folder: Path, count: int, own: str | None, chat_format: Format
) -> list[dict[str, Any]]:
    """What an evaluation asks: `own`, if there is one, and the first `count` of `prompts`, with their `ids`."""
    found = prompts(folder)[:count]
    if own:
        asked = conversation.ask(own)
        about = {"question": own, "prompt": chat_format.prompt_text(asked), "reference": None}
        found.insert(0, about | asked.dumps())
    return [one | {"ids": chat_format.prompt(conversation.loads(one))} for one in found]


def head(
    folder: Path, count: int, part: str = "train"
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """The first rows of a part: number, token ids and trained mask; `datasets` is not needed for it."""
    import pyarrow as pa

    with pa.memory_map(str(folder / f"{part}.arrow")) as file:
        for batch in pa.ipc.open_stream(file):
            for row in batch.slice(0, count).to_pylist():
                yield row["row"], row["input_ids"], row["trained"]
            count -= min(count, len(batch))
            if not count:
                return
