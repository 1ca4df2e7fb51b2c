"""Data artifacts, made as the stage makes them, and what holds of each."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.data import assembly, prepared, sources
from stages.lib.data.ledger import Ledger
from stages.lib.data.preparation import Preparer
from stages.lib.data.prepared import Part, Writer
from stages.lib.data.shards import Shards
from stages.lib.data.tokens import Tokens
from stages.lib.run import artifact
from tests.lib.data.talk import make

CHECKS: dict[str, Any] = {
    "max_bad_rows": 0, "max_length": 128, "on_long": "truncate", "allowed": (), "fail_on_leakage": False,
}  # fmt: skip


class Made(NamedTuple):
    """An artifact, its account, and what its manifest says of the sources."""

    folder: Path
    ledger: Ledger
    metrics: dict[str, Any]
    sources: list[dict[str, Any]]

    def rows(self, part: str) -> list[tuple[int, list[int]]]:
        found = Part(self.folder / f"{part}.arrow")
        return [(int(found.rows[n]["row"]), found[n][0].tolist()) for n in range(len(found))]

    def lost(self) -> list[dict[str, Any]]:
        lines = (self.folder / "ledger.jsonl").read_text().split("\n")
        return [json.loads(line) for line in lines if line]


class Maker:
    """Prepares data sets in a folder of their own, as the stage does."""

    def __init__(self, folder: Path, tokens: Tokens) -> None:
        self.folder, self.tokens, self.made = folder, tokens, 0

    def file(self, name: str, texts: list[str]) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [text if text[:1] == "{" else json.dumps({"text": text}) for text in texts]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    def prepare(
        self, dataset: str, held_out: float = 0.0, repeats: str = "drop", max_rows: int | None = None,
        limit: int = 128, policy: str = "truncate", keep_text: bool = False, seed: int = 0,
    ) -> Made:  # fmt: skip
        self.made += 1
        scratch = self.folder / f"scratch-{self.made}"
        out = scratch / "data"
        out.mkdir(parents=True)
        readings = assembly.recognise(sources.find(dataset, None, scratch), "auto")
        form = make("guanaco", self.tokens)
        prepare = Preparer(form, limit, policy, seed, repeats == "near")
        with Writer(out) as writer, Ledger(out, keep_text) as ledger:
            by_source = assembly.Assembly(
                Shards(prepare, {}, scratch, self.folder, self.publish),
                writer,
                ledger,
                scratch,
                held_out=held_out,
                repeats=repeats,
                max_rows=max_rows,
                seed=seed,
            ).run(readings)
        made = Made(out, ledger, ledger.metrics(), by_source)
        check_account(made)
        return made

    def publish(
        self, name: str, source: Path, inputs: dict[str, Any], metrics: dict[str, Any]
    ) -> artifact.Artifact:
        about = {"inputs": inputs, "metrics": metrics}
        return artifact.publish(source, self.folder / name, about)


def check_account(made: Made) -> None:
    """What holds of every artifact: its parts are what the account says, and so is what is not in them."""
    ledger, metrics = made.ledger, made.metrics
    parts = [Part(made.folder / f"{name}.arrow") for name in prepared.PARTS]
    assert ledger.rows_read == ledger.rows_kept + sum(ledger.rows_dropped.values())
    assert sum(len(part) for part in parts) == ledger.rows_written == sum(ledger.lengths.values())
    assert sum(int(part.lengths.sum()) for part in parts) == ledger.tokens
    assert sum(int(part.trained.sum()) for part in parts) == ledger.trainable_tokens
    assert len({row for row, _ in made.rows("held_out")}) == ledger.rows_held_out
    lost = made.lost()
    assert sum(entry["tokens_lost"] for entry in lost) == ledger.tokens_lost
    assert (
        metrics["tokens_encoded"] - metrics["tokens_lost"] + metrics["tokens_added"]
        == metrics["tokens"]
    )
    assert metrics["tokens_added"] >= 0
    dropped = [entry for entry in lost if entry["reason"] in ledger.rows_dropped]
    assert len(dropped) == sum(ledger.rows_dropped.values())
    for name in ("rows_read", "rows_kept", "tokens"):
        assert sum(source[name] for source in made.sources) == metrics[name]
    rows = {row for part in prepared.PARTS for row, _ in made.rows(part)}
    assert not rows & {entry["row"] for entry in dropped}
    assert rows | {entry["row"] for entry in dropped} == set(range(1, ledger.rows_read + 1))


def rows(count: int, first: int = 0) -> list[str]:
    """Guanaco texts, each unlike the others."""
    return [
        f"### Human: What is {n} and {n}?### Assistant: {2 * n}."
        for n in range(first, first + count)
    ]
