"""The data artifact: token ids and the trained mask in Arrow, which `datasets` reads.

Columns of `train.arrow` and `held_out.arrow`: `row` (int64, number in the source, from 1), `input_ids`
(list of int32) and `trained` (list of bool: whether the token is learned).
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.lib.data import conversation
from stages.lib.data.preparation import Example
from stages.lib.data.tokens import Tokens
from stages.lib.run.exits import BadData

PARTS = ("train", "held_out")
PROMPTS = "prompts.jsonl"
PROMPTS_KEPT = 64
FORMAT = "prompt_format.json"
BATCH = 1000


class Writer:
    """Writes the files of a data artifact, a batch of rows at a time."""

    def __init__(self, folder: Path, tokens: Tokens) -> None:
        import pyarrow as pa

        self.pa = pa
        fields = {
            "row": pa.int64(),
            "input_ids": pa.list_(pa.int32()),
            "trained": pa.list_(pa.bool_()),
        }
        self.schema = pa.schema(fields)
        self.folder = folder
        self.waiting: dict[str, list[Example]] = {part: [] for part in PARTS}
        self.prompts: list[dict[str, Any]] = []
        golden = conversation.render_prompt(conversation.GOLDEN)
        recorded = {
            "chat_format": conversation.GUANACO,
            "stops": list(conversation.stops()),
            "golden": {"text": golden, "ids": tokens.encode_prompt(golden)},
        }
        (folder / FORMAT).write_text(json.dumps(recorded, indent=1) + "\n")

    def __enter__(self) -> "Writer":
        self.stack = contextlib.ExitStack()
        self.streams = {
            part: self.stack.enter_context(
                self.pa.ipc.new_stream(str(self.folder / f"{part}.arrow"), self.schema)
            )
            for part in PARTS
        }
        return self

    def __exit__(self, *error: object) -> None:
        for part in PARTS:
            self._flush(part)
        self.stack.close()
        lines = "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in self.prompts)
        (self.folder / PROMPTS).write_text(lines, encoding="utf-8")

    def write(self, part: str, example: Example) -> None:
        """Append a row to `train` or `held_out`; the first held-out questions are kept as text too."""
        self.waiting[part].append(example)
        if len(self.waiting[part]) == BATCH:
            self._flush(part)
        if part == "held_out" and len(self.prompts) < PROMPTS_KEPT and (prompt := example.prompt()):
            self.prompts.append(prompt)

    def _flush(self, part: str) -> None:
        rows, self.waiting[part] = self.waiting[part], []
        if rows:
            columns = [[e.row for e in rows], [e.ids for e in rows], [e.trained for e in rows]]
            arrays = [self.pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)]
            self.streams[part].write_batch(self.pa.record_batch(arrays, schema=self.schema))


class Part:
    """One part of the prepared data, memory-mapped.

    Attributes:
        lengths: tokens of each row, int64 [rows]. trained: learned tokens of each row, int64 [rows].
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.compute as pc
        from datasets import Dataset

        self.rows = Dataset.from_file(str(path)).with_format("numpy")
        table = self.rows.data
        self.lengths = pc.list_value_length(table.column("input_ids")).to_numpy().astype(np.int64)
        self.trained = np.array(
            [mask.values.true_count for mask in table.column("trained")], dtype=np.int64
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Token ids [tokens] and trained mask [tokens] of a row."""
        found = self.rows[int(row)]
        return np.asarray(found["input_ids"], np.int64), np.asarray(found["trained"], bool)


def prompts(folder: Path) -> list[dict[str, Any]]:
    """The held-out questions of a data artifact: `row`, `question`, `prompt` (rendered) and `reference`."""
    # Not splitlines, which also cuts at the line separators that a text may hold.
    lines = (folder / PROMPTS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def check_format(folder: Path, tokens: Tokens) -> dict[str, Any]:
    """How prompts are rendered, as recorded in a data or adapter artifact.

    Raises:
        BadData: the golden prompt is now rendered or tokenised otherwise than when the model was trained.
    """
    recorded: dict[str, Any] = json.loads((folder / FORMAT).read_text())
    golden, now = recorded["golden"], conversation.render_prompt(conversation.GOLDEN)
    if now != golden["text"] or tokens.encode_prompt(now) != golden["ids"]:
        raise BadData(
            f"{folder / FORMAT}: prompts are now rendered or tokenised otherwise than in training; "
            "use the versions in its manifest, or train again"
        )
    return recorded
