"""prepare-data goes on where it was stopped: nothing is tokenised twice, and the artifact is the same."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.lib.data import duplicates, shards
from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.preparation import Job, Preparer
from stages.lib.data.rows import Row, Rows
from stages.lib.data.shapes import Shape
from stages.lib.run import artifact
from stages.lib.run.artifact import sha256
from tests.conftest import Stages
from tests.forking import Forking, forking
from tests.lib.conftest import Tokenizers
from tests.lib.data.talk import make

# A chunk of four rows is a shard; two processes where there are two cores.
BEFORE = """
import jinja2, numpy, pyarrow, tokenizers
from stages.lib.data import assembly, json_rows, preparation, shards
json_rows.CHUNK_ROWS = 4
assembly.SMALL = 0
shards.SECONDS = shards.SPARING = 0
"""
ROWS, CHUNKS = 40, 10


def texts(count: int = ROWS) -> list[str]:
    """Rows of several kinds: long, repeated, empty, with and without a second question."""
    made = []
    for n in range(count):
        said = f"### Human: What is {n} and {n}?### Assistant: {'It is ' * (n % 7 * 9 + 1)}{2 * n}."
        said += f"### Human: Why, ünïcode {n}?### Assistant: Because." * (n % 3 == 0)
        made.append("" if n % 31 == 30 else made[n - 7] if n % 11 == 10 else said)
    return made


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


class Attempts:
    """Attempts at one artifact, in a run directory of their own."""

    def __init__(self, run: Forking, folder: Path, base: Path) -> None:
        self.run, self.folder, self.dir = run, folder, folder / "run"
        # In the same place for all, since the ledger names it.
        self.dataset = write(run.folder / "rows.jsonl", texts())
        self.base = base
        self.settings = {"MAX_LENGTH": "64", "ON_LONG": "split", "DUPLICATES": "near", "SEED": "3"}

    def args(self, run_dir: Path | None = None) -> list[object]:
        run_dir = run_dir or self.dir
        return [
            "prepare-data", "--base-model", self.base, "--dataset", self.dataset, "--run-dir", run_dir
        ]  # fmt: skip

    def __call__(self, failpoints: str = "", run_dir: Path | None = None, **changed: str) -> Any:
        env = self.settings | changed | {"FAILPOINTS": failpoints}
        return self.run(*self.args(run_dir), env=env)

    def shards(self) -> list[Path]:
        """Those that are whole."""
        return sorted(path.parent for path in self.dir.glob("data-shards/shard-*/manifest.json"))

    def metrics(self) -> dict[str, Any]:
        return dict(json.loads((self.dir / "data" / "manifest.json").read_text())["metrics"])

    def finish(self, whole: dict[str, str], resumed: int, **changed: str) -> Any:
        """The same command again ends with the artifact of an uninterrupted run."""
        result = self(**changed)
        assert result.returncode == 0, result.stderr
        assert hashes(self.dir / "data") == whole
        assert self.metrics()["rows_resumed"] == resumed
        assert not (self.dir / "data-shards").exists()
        return result


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    with forking(tmp_path_factory.mktemp("server"), before=BEFORE) as run:
        yield run


@pytest.fixture
def attempts(server: Forking, tmp_path: Path, tiny: Path) -> Attempts:
    return Attempts(server, tmp_path, tiny)


@pytest.fixture(scope="module")
def whole(server: Forking, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, str]:
    """The files of a run that nothing interrupted, and that wrote no shard."""
    attempts = Attempts(server, tmp_path_factory.mktemp("whole"), tiny)
    result = attempts()
    assert result.returncode == 0, result.stderr
    made = attempts.metrics()
    assert made["rows_read"] == ROWS
    assert made["rows_resumed"] == 0
    assert len(made["rows_dropped"]) > 1
    return hashes(attempts.dir / "data")


@pytest.mark.case("B23")
@pytest.mark.promise("P2")
@pytest.mark.parametrize(
    ("failpoints", "left"),
    [
        ("shard.save:kill", 0),
        ("publish.block=8:kill", 3),
        ("publish.manifest=6:kill", 5),
        ("shard.saved=7:kill", 7),
        (f"publish.manifest={CHUNKS + 1}:kill", CHUNKS),
    ],
)
def test_what_a_kill_leaves_is_gone_on_with(
    attempts: Attempts, whole: dict[str, str], failpoints: str, left: int
) -> None:
    assert attempts(failpoints).returncode == -signal.SIGKILL
    assert len(attempts.shards()) == left
    result = attempts.finish(whole, 4 * left)
    assert ("going on with" in result.stderr) == bool(left)


@pytest.mark.promise("P2")
def test_what_a_kill_leaves_behind_the_artifact_is_removed(
    attempts: Attempts, whole: dict[str, str]
) -> None:
    assert attempts("shard.clear=3:kill").returncode == -signal.SIGKILL
    assert len(attempts.shards()) == CHUNKS - 2
    assert "nothing changed" in attempts.finish(whole, 0).stderr


@pytest.mark.promise("P2")
def test_kills_at_any_time(attempts: Attempts, whole: dict[str, str]) -> None:
    chance = random.Random(0)
    manifest = attempts.dir / "data" / "manifest.json"
    for _ in range(4):
        attempts.run.start(*attempts.args(), **attempts.settings)
        time.sleep(chance.uniform(0.05, 0.5))
        os.kill(attempts.run.pid, signal.SIGKILL)
        attempts.run.wait()
        if manifest.exists():  # and all is done, or all but to exit
            break
    result = attempts()
    assert result.returncode == 0, result.stderr
    assert hashes(attempts.dir / "data") == whole


@pytest.mark.case("B23")
@pytest.mark.parametrize("point", ["shard.save=4", "publish.file=8"])
def test_a_request_to_stop_keeps_what_is_finished(
    attempts: Attempts, whole: dict[str, str], point: str
) -> None:
    result = attempts(f"{point}:term")
    assert result.returncode == 75
    assert "stopped by SIGTERM; the same command goes on" in result.stderr
    assert len(attempts.shards()) == 4
    attempts.finish(whole, 16)


def test_a_full_volume(attempts: Attempts, whole: dict[str, str]) -> None:
    assert attempts("publish.block=5:ENOSPC").returncode == 73
    assert len(attempts.shards()) == 2
    attempts.finish(whole, 8)


@pytest.mark.parametrize("harm", ["flip", "cut", "lost manifest"])
def test_a_broken_shard_is_made_again(attempts: Attempts, whole: dict[str, str], harm: str) -> None:
    attempts("shard.saved=6:kill")
    broken = attempts.shards()[2]
    path = broken / ("manifest.json" if "manifest" in harm else "batches.bin")
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:-100] if harm == "cut" else content)
    if harm == "lost manifest":
        path.unlink()
    result = attempts.finish(whole, 20)
    (said,) = [line for line in result.stderr.splitlines() if "again" in line]
    assert "shard-00003" in said


def another_tokenizer(base: Path) -> None:
    known = json.loads((base / "tokenizer.json").read_text())
    known["model"]["merges"] = known["model"]["merges"][:2000]
    (base / "tokenizer.json").write_text(json.dumps(known))


@pytest.mark.promise("P5")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"MAX_LENGTH": "48"}, "MAX_LENGTH was 64, is now 48"),
        ({}, "another chat format; another base"),
    ],
)
def test_what_was_prepared_otherwise_is_not_used(
    attempts: Attempts, changed: dict[str, str], words: str
) -> None:
    attempts.base = shutil.copytree(attempts.base, attempts.folder / "base")
    attempts("shard.saved=6:kill")
    if not changed:
        another_tokenizer(attempts.base)
    fresh = attempts.folder / "fresh"
    assert attempts(run_dir=fresh, **changed).returncode == 0
    result = attempts.finish(hashes(fresh / "data"), 0, **changed)
    said = [line for line in result.stderr.splitlines() if "starting afresh" in line]
    assert len(said) == 1
    assert words in said[0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"limit": 48}, "MAX_LENGTH was 64, is now 48"),
        ({"policy": "drop"}, "ON_LONG was split, is now drop"),
        ({"seed": 1}, "SEED was 0, is now 1"),
        ({"near": True}, "near duplicates was False, is now True"),
        ({"name": "chatml"}, "another chat format"),
        ({"loss_on": "all"}, "another chat format"),
        ({"base": {"name": "other"}}, "another base"),
        ({"tokens": "llama"}, "another chat format"),
        ({}, ""),
    ],
)
def test_what_would_be_made_otherwise(
    tokenizers: Tokenizers, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any], words: str,
) -> None:  # fmt: skip
    def begin(
        limit: int = 64, policy: str = "split", seed: int = 0, near: bool = False, name: str = "guanaco",
        loss_on: str = "assistant", tokens: str = "embedded", base: dict[str, Any] | None = None,
    ) -> shards.Shards:  # fmt: skip
        form = make(name, tokenizers(tokens), loss_on)
        prepare = Preparer(form, limit, policy, seed, near)
        (tmp_path / "scratch").mkdir(exist_ok=True)
        return shards.Shards(prepare, base or {}, tmp_path / "scratch", tmp_path, publish)

    def publish(name: str, source: Path, inputs: Any, metrics: Any) -> artifact.Artifact:
        return artifact.publish(source, tmp_path / name, {"inputs": inputs, "metrics": metrics})

    first = begin()
    first.add(first(job(["a"])))
    first.save()
    capsys.readouterr()
    assert bool(begin(**changed).known(job(["a"]))) == (not changed)
    said = capsys.readouterr().err
    assert words in said
    assert ("starting afresh" in said) == bool(changed)


def test_settings_that_tokenise_nothing_keep_what_was_prepared(attempts: Attempts) -> None:
    """A bad row near the end costs its owner no second tokenisation."""
    write(attempts.dataset, [*texts(), "no marks"])
    refused = attempts()
    assert refused.returncode == 65
    assert f"1 bad of {ROWS + 1} rows" in refused.stderr
    fresh = attempts.folder / "fresh"
    allowed = {"MAX_BAD_ROWS": "1", "VALIDATION_FRACTION": "0.05"}
    assert attempts(run_dir=fresh, **allowed).returncode == 0
    attempts.finish(hashes(fresh / "data"), ROWS + 1, **allowed)


@pytest.mark.promise("P2")
@pytest.mark.parametrize("edit", ["in place", "at the beginning"])
def test_rows_that_have_changed_are_prepared_anew(attempts: Attempts, edit: str) -> None:
    """Even where size and time of the file are as they were."""
    before = attempts.dataset.stat()
    attempts("shard.saved=9:kill")
    rows = texts()
    if edit == "in place":
        rows[5] = rows[5].replace("What is 5", "Who was 5")
        rows[29] = rows[29].replace("What", "When")
    else:
        rows.insert(0, "### Human: A new one?### Assistant: Yes.")
    write(attempts.dataset, rows)
    os.utime(attempts.dataset, ns=(before.st_atime_ns, before.st_mtime_ns))
    fresh = attempts.folder / "fresh"
    assert attempts(run_dir=fresh).returncode == 0
    attempts.finish(hashes(fresh / "data"), 28 if edit == "in place" else 0)


@pytest.mark.case("B23")
def test_unfinished_data_is_nothing_to_train_on(attempts: Attempts, stages: Stages) -> None:
    attempts(f"publish.manifest={CHUNKS + 1}:kill")
    assert list((attempts.dir / "data").iterdir())
    result = stages("train", "--base-model", attempts.base, "--run-dir", attempts.dir)
    assert result.returncode == 66
    assert "there is no finished data" in result.stderr
    assert "run `prepare-data` first" in result.stderr


def test_work_of_a_few_seconds_leaves_no_shard(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    dataset = write(tmp_path / "rows.jsonl", texts())
    args = ["--base-model", tiny, "--dataset", dataset, "--run-dir", tmp_path / "run"]
    result = stages(
        "prepare-data", *args, env={"FAILPOINTS": "shard.save:kill", "MAX_LENGTH": "64"}
    )
    assert result.returncode == 0, result.stderr


def job(texts: list[str], line: int = 1, ask: float = 0.5) -> Job:
    rows = [Row(n, 10 * n, {"text": text}) for n, text in enumerate(texts, line)]
    return Job(Rows(rows, line), Shape("guanaco", ("text",)), ask)


def test_a_batch_comes_back_as_it_was(tokenizers: Tokenizers) -> None:
    odd = ["half \ud800 a character", "", "### Human: a\u2028### Assistant: \0"]
    for near in (True, False):
        prepare = Preparer(make("guanaco", tokenizers("embedded")), 32, "split", 0, near)
        for said in ([], odd, texts(), texts()[:1]):
            batch = prepare(job(said))
            again = shards.unpack(shards.pack(batch))
            plain = [outcome._replace(mark=None) for outcome in batch.outcomes]
            assert [outcome._replace(mark=None) for outcome in again.outcomes] == plain
            for one, other in zip(batch.outcomes, again.outcomes, strict=True):
                assert (one.mark and one.mark.digest()) == (other.mark and other.mark.digest())
                assert type(one.place) is type(other.place)
            for was, now in zip(batch[1:], again[1:], strict=True):
                assert (was == now).all()
                assert (was.dtype, was.shape) == (now.dtype, now.shape)


def test_a_signature_comes_back_as_it_was() -> None:
    mark = duplicates.signature(Conversation((Turn("user", "What is one and one?"),)))
    again = duplicates.loads(duplicates.dumps(mark))
    assert again.jaccard(mark) == 1
    assert again.digest() == mark.digest()


def test_jobs_have_one_key_each() -> None:
    lines = job(["a", "b"])
    others = [
        lines, job(["a", "c"]), job(["ab"]), job(["a", "b"], line=2), job(["a", "b"], ask=0.1),
        lines._replace(shape=Shape("text", ("text",))),
        lines._replace(chunk=Rows([], 1)), lines._replace(chunk=Rows([[]], 1)),
        lines._replace(chunk=Rows([b"ab"], 1)), lines._replace(chunk=Rows([b"a", b"b"], 1)),
        lines._replace(chunk=Rows(lines.chunk.payload, 1, 0, "row")),
    ]  # fmt: skip
    assert len({shards.key(other) for other in others}) == len(others)
    assert shards.key(job(["a", "b"])) == shards.key(lines)
