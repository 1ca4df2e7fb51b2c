"""Data sets by every kind of name: what is found, copied, recorded, and said when it is not there."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from stages.lib.data import remote, sources
from stages.lib.data.sources import Source, Wanted
from stages.lib.run import artifact
from stages.lib.run.exits import (
    BadData,
    BadSetting,
    CannotRun,
    Missing,
    NoPermission,
    StageError,
    TryAgain,
)
from stages.lib.run.rundir import Run
from tests.conftest import clean_environment
from tests.hub_server import Hub

ROWS = [{"text": f"### Human: {n}### Assistant: {n}"} for n in range(5)]
LINE = json.dumps(ROWS[0]).encode() + b"\n"


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def find(dataset: object, tmp_path: Path, revision: str | None = None) -> Source:
    (found,) = sources.find(str(dataset), revision, tmp_path / "scratch")
    return found


def read(source: Source, files: list[Path] | None = None) -> list[Any]:
    chunks = sources.chunks(source, source.train if files is None else files)
    return [row.data for _, chunk in chunks for row in chunk.rows()]


# --- what DATASET may say --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        ("sample", [Wanted("sample")]),
        ("owner/name", [Wanted("owner/name")]),
        ("owner/name@v1.0=0.5", [Wanted("owner/name", "v1.0", 0.5)]),
        ("owner/name@refs/convert/parquet", [Wanted("owner/name", "refs/convert/parquet")]),
        ("a.jsonl=2, owner/b ,c/*.csv", [Wanted("a.jsonl", None, 2), Wanted("owner/b"), Wanted("c/*.csv")]),
        ("s3://bucket/day=1/", [Wanted("s3://bucket/day=1/")]),
        ("s3://bucket/day=1/a.csv=3", [Wanted("s3://bucket/day=1/a.csv", None, 3)]),
        ("gs://a/b@c/*.csv=1e-3", [Wanted("gs://a/b@c/*.csv", None, 1e-3)]),
        ("https://me:pw@host/a.csv=2", [Wanted("https://me:pw@host/a.csv", None, 2)]),
        ("https://host/a.csv?sig=0.5", [Wanted("https://host/a.csv?sig=0.5")]),
        ("data/me@home.jsonl", [Wanted("data/me", "home.jsonl")]),
    ],
)  # fmt: skip
def test_items(dataset: str, wanted: list[Wanted]) -> None:
    assert sources.parse(dataset, None) == wanted


def test_what_exists_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a,b.jsonl", "data/me@home.jsonl", "x=2", "y=3,z@1", "plain.jsonl"]
    for name in names:
        write(tmp_path / name)
    for name in names:
        assert sources.parse(name, None) == [Wanted(name)]
        assert sources.parse(f"{name}=0.5", None) == [Wanted(name, None, 0.5)]
    assert sources.parse(",".join(names), None) == [Wanted(name) for name in names]
    assert sources.parse("a,b.jsonl=2,y=3,z@1,owner/c", None) == [
        Wanted("a,b.jsonl", None, 2), Wanted("y=3,z@1"), Wanted("owner/c")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("a.jsonl,", "empty name"),
        (",a.jsonl", "empty name"),
        ("", "empty name"),
        ("a.jsonl=0", "'0' .* no weight"),
        ("a.jsonl=-1", "no weight"),
        ("a.jsonl=inf", "no weight"),
        ("a.jsonl=nan", "no weight"),
        ("a.jsonl=much", "'much' .* no weight"),
        ("a.jsonl=", "'' .* no weight"),
        ("https://me:secret@host/a.csv=x", r"https://host/a\.csv=x"),
        ("abfs://container/a.csv", "abfs:// is none of s3://, gs://, http://, https://"),
    ],
)
def test_items_that_are_none(dataset: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=words) as error:
        sources.find(dataset, None, tmp_path)
    assert "secret" not in str(error.value)


@pytest.mark.promise("P7")
def test_names_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shown in (
        ("owner/a@v1=2", "owner/a@v1=2"),
        ("HTTPS://me:pw@Host:8080/a@b.csv?sig=s#part", "https://Host:8080/a@b.csv"),
        ("https://me@host/a.csv,x", "https://host/a.csv,x"),
        ("s3://key:secret@bucket/a?.csv=2", "s3://bucket/a?.csv=2"),
        ("abfs://me:pw@host/a?sig=s", "abfs://host/a"),
    ):
        assert sources.plain(name) == shown
    monkeypatch.chdir(tmp_path)
    write(Path("a,b?.jsonl"))
    assert sources.plain("a,b?.jsonl") == "a,b?.jsonl"


def test_one_revision_for_one_hub_data_set(tmp_path: Path) -> None:
    assert sources.parse("owner/name=2", "v1") == [Wanted("owner/name", "v1", 2)]
    for dataset in ("owner/a,owner/b", "a.jsonl,owner/b"):
        with pytest.raises(BadSetting, match=r"DATASET_REVISION=v1 .* names 2"):
            sources.parse(dataset, "v1")
    with pytest.raises(BadSetting, match="both DATASET_REVISION"):
        sources.parse("owner/a@v2", "v1")
    source = find(write(tmp_path / "a.jsonl"), tmp_path, revision="v1")  # as it was before
    assert source.revision is None


# --- on this machine -------------------------------------------------------------------------------


def test_a_file_and_several_with_weights(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.jsonl"), write(tmp_path / "test.jsonl", ROWS[:2])
    first, second, third = sources.find(f"{one},{two}=0.25,sample=3", None, tmp_path / "scratch")
    assert read(first) == ROWS
    assert read(second) == ROWS[:2]  # a file that is named is trained on, whatever its name
    assert [source.weight for source in (first, second, third)] == [1, 0.25, 3]
    assert {name for name, _ in sources.chunks(first, first.train)} == {str(one)}
    assert not (tmp_path / "scratch").exists()


def test_the_sample() -> None:
    (source,) = sources.find("sample", None, Path("unused"))
    found = list(sources.chunks(source, source.train))
    rows = [row for _, chunk in found for row in chunk.rows()]
    assert {name for name, _ in found} == {"sample"}
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    assert all(row.data and row.data["text"].startswith("### Human: ") for row in rows)
    assert len(found) > 2
    assert source.inputs() == sources.reference("sample", None)["sources"][0]


@pytest.mark.parametrize("name", ["test", "rows_eval", "validation-00000-of-00001", "best_dev"])
def test_a_folder_with_a_split_of_its_own(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "testing" / "data"  # the folders above have no say
    write(folder / "rows.jsonl")
    write(folder / f"{name}.jsonl")
    source = find(folder, tmp_path)
    assert [path.name for path in source.train] == ["rows.jsonl"]
    assert [path.stem for path in source.held_out] == [name]


def test_splits_in_folders_and_what_lies_beside_them(tmp_path: Path) -> None:
    for name in ("train", "test", "validation"):
        write(tmp_path / "ds" / name / "0000.jsonl")
    for name in ("dataset_infos.json", "README.md", "rows.txt"):
        (tmp_path / "ds" / name).write_text("{}")
    (tmp_path / "ds" / "more.jsonl").mkdir()
    source = find(tmp_path / "ds", tmp_path)
    assert [path.parent.name for path in source.train] == ["train"]
    assert [path.parent.name for path in source.held_out] == ["test", "validation"]


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_list(ROWS)
    DatasetDict(train=whole, test=whole.select([0])).save_to_disk(tmp_path / "ds")
    Dataset.load_from_disk(tmp_path / "ds" / "train").map(lambda row: {"n": 1})  # leaves a cache
    assert list((tmp_path / "ds" / "train").glob("cache-*.arrow"))
    source = find(tmp_path / "ds", tmp_path)
    assert read(source) == ROWS
    assert read(source, source.held_out) == ROWS[:1]


def test_a_glob(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "test" / f"part{number}.jsonl", [ROWS[number]])
    source = find(tmp_path / "test" / "part[01].jsonl", tmp_path)
    assert read(source) == ROWS[:2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.jsonl", "there is no data at .*none.jsonl; a local file must be mounted"),
        ("./none", "there is no data at"),
        ("a/b/c", "there is no data at"),
        ("empty", "holds no training file"),
        ("none*.jsonl", "holds no training file"),
        ("only", "holds no training file"),
        ("linked", "gone.jsonl is a link to nothing"),
    ],
)
def test_data_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write(Path("only") / "test.jsonl")
    write(Path("linked") / "rows.jsonl")
    Path("linked/gone.jsonl").symlink_to(tmp_path / "moved away")
    with pytest.raises(Missing, match=words):
        find(name, tmp_path)


def test_a_file_of_another_kind_and_one_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(BadData, match=r"rows\.txt is none of .*\.csv.*\.gz"):
        find(tmp_path / "rows.txt", tmp_path)
    source = find(write(tmp_path / "rows.jsonl"), tmp_path)
    source.train[0].unlink()
    with pytest.raises(Missing, match="is gone"):
        read(source)


# --- what is recorded ------------------------------------------------------------------------------


def run_in(folder: Path) -> Run:
    ctx = click.Context(click.Command("prepare-data"), info_name="prepare-data")
    ctx.params = {"run_dir": folder, "force": False, "allow_stale": False, "verify": False}
    return Run(ctx)


def published(run: Run, dataset: str, found: list[Source], tmp_path: Path) -> artifact.Artifact:
    (tmp_path / "made").mkdir(exist_ok=True)
    (tmp_path / "made" / "train.arrow").write_bytes(b"x")
    run.check_held = lambda: None
    inputs = {"dataset": sources.identity(dataset, found)}
    return run.publish("data", tmp_path / "made", inputs, {})


def test_the_identity_follows_the_contents(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    dataset = f"{path},{other}=2"
    first = sources.identity(dataset, sources.find(dataset, None, tmp_path))
    assert first["name"] == dataset
    assert [(s["name"], s["weight"], s["revision"]) for s in first["sources"]] == [
        (str(path), 1.0, None), (str(other), 2.0, None)
    ]  # fmt: skip
    assert set(first["sources"][0]["files"][0]) == {"path", "bytes", "mtime_ns", "sha256"}
    assert json.loads(json.dumps(first)) == first

    path.touch()  # only touched
    assert sources.reference(dataset, first) == first
    assert sources.reference(f"{path},{other}=3", first) != first
    assert sources.reference(f"{path}", first) != first
    other.write_text(other.read_text().replace("Human", "Humus"))  # of the same length
    assert sources.reference(dataset, first) != first


def test_a_hash_is_not_taken_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl")
    first = sources.identity(str(path), [find(path, tmp_path)])
    monkeypatch.setattr(sources, "sha256", None)
    assert sources.reference(str(path), first) == first
    assert sources.identity(str(path), [find(path, tmp_path)], first) == first


def test_nothing_changed(tmp_path: Path) -> None:
    """`Run.finished` with a reference, which knows nothing of what a hub or store holds."""
    path = write(tmp_path / "a.jsonl")
    dataset = f"{path}=2,owner/name@v1,https://me:pw@host/b.csv?sig=s,sample"
    found = [
        Source(str(path), 2.0, train=[path]),
        Source("owner/name", 1.0, "c" * 40, [path], root=tmp_path),
        Source("https://host/b.csv", train=[path], urls={path: "https://host/b.csv"}),
        Source("sample"),
    ]
    run = run_in(tmp_path / "run")
    assert sources.reference(dataset, None)["sources"][1] == {"name": "owner/name", "weight": 1.0}
    made = published(run, dataset, found, tmp_path)
    text = json.dumps(made.manifest)
    assert "pw" not in text
    assert "sig" not in text
    known = run.previous_inputs("data")["dataset"]
    for other, is_same in (
        (dataset, True),
        (dataset.replace("sig=s", "sig=other"), True),
        (dataset.replace("@v1", "@v2"), False),
        (dataset.replace("=2", "=1"), False),
        (dataset.replace("name", "other"), False),
        (str(path), False),
    ):
        now = {"dataset": sources.reference(other, known)}
        assert bool(run.finished("data", now)) == is_same, other
    hub = {"sources": known["sources"][1:]}
    assert sources.reference("owner/name", hub)["sources"] == hub["sources"][:1]
    for other, weight in (("owner/other", 1.0), ("owner/name=3", 3.0)):
        now = {"name": other.partition("=")[0], "weight": weight}
        assert sources.reference(other, hub)["sources"] == [now]
    write(path, ROWS[:1])
    assert not run.finished("data", {"dataset": sources.reference(dataset, known)})


def test_a_reference_asks_nobody_and_is_quick(tmp_path: Path) -> None:
    """Neither torch nor datasets nor a client of a store is imported for it."""
    script = (
        "import sys; from stages.lib.data import sources;"
        "print(sources.reference(sys.argv[1], None)); heavy = {'torch', 'datasets', 'pyarrow', 'fsspec',"
        "'s3fs', 'gcsfs', 'aiohttp', 'huggingface_hub'} & set(sys.modules); assert not heavy, heavy"
    )
    dataset = f"{write(tmp_path / 'a.jsonl')},owner/name,s3://bucket/x/,https://host/a.csv,sample"
    done = subprocess.run(
        [sys.executable, "-c", script, dataset], env=clean_environment(tmp_path),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_prepared_data_whose_sources_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [write(Path("a,b.jsonl")), write(Path("folder") / "c.jsonl")]
    found = sources.find("a,b.jsonl,folder=2,sample", None, tmp_path)
    found.append(Source("owner/name", 1.0, "c" * 40, [paths[0]], root=Path(".")))
    run = run_in(tmp_path / "run")
    made = published(run, "a,b.jsonl,folder=2,sample,owner/name", found, tmp_path)
    sources.check_unchanged(run, made)

    write(Path("folder") / "new.jsonl")
    with pytest.raises(
        CannotRun, match=r"is stale: its input dataset was null, is now .*folder/new\.jsonl"
    ):
        sources.check_unchanged(run, made)
    Path("folder/new.jsonl").unlink()
    write(paths[0], ROWS[:1])
    with pytest.raises(CannotRun, match=r"dataset was .*\"a,b\.jsonl\".*: 205.* is now .*: 41"):
        sources.check_unchanged(run, made)
    paths[0].unlink()  # what is no more cannot differ
    sources.check_unchanged(run, made)
    write(paths[1], ROWS[:1])
    with pytest.raises(CannotRun, match="its input dataset was"):
        sources.check_unchanged(run, made)


# --- behind URLs -----------------------------------------------------------------------------------

OBJECTS = (
    "ds/train-0.jsonl",
    "ds/train-1.jsonl",
    "ds/test/0.jsonl",
    "ds/state.json",
    "ds/a.md",
    "x y.csv",
)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials of this machine's, no way out of it, and no long waits."""
    for name in [*os.environ]:
        if name.startswith(("AWS_", "GOOGLE_", "GCLOUD", "CLOUDSDK")) or "proxy" in name.lower():
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(tmp_path),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "NO_GCE_CHECK": "true",
        "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """S3 as moto has it, with OBJECTS in a bucket; its address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id="k", aws_secret_access_key="s",
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    for name in OBJECTS:
        client.put_object(
            Bucket="bucket", Key=name, Body=b"text\na\n" if name.endswith("csv") else LINE
        )
    yield url
    server.stop()


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    """Google's storage as an emulator has it, with OBJECTS in a bucket; its address."""
    import requests
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    url = "http://{}:{}".format(*server._api._httpd.server_address)
    assert requests.post(f"{url}/storage/v1/b?project=p", json={"name": "bucket"}).ok
    for name in OBJECTS:
        where = f"{url}/upload/storage/v1/b/bucket/o?uploadType=media"
        body = b"text\na\n" if name.endswith("csv") else LINE
        assert requests.post(where, params={"name": name}, data=body).ok
    yield url
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The scheme of a store that is there."""
    url = request.getfixturevalue(request.param)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    return str(request.param)


def test_a_store(store: str, tmp_path: Path) -> None:
    base = f"{store}://bucket"
    for name, train, held_out in (
        (f"{base}/ds/", ["ds/train-0.jsonl", "ds/train-1.jsonl"], ["ds/test/0.jsonl"]),
        (f"{base}/ds", ["ds/train-0.jsonl", "ds/train-1.jsonl"], ["ds/test/0.jsonl"]),
        (f"{base}/ds/train-*.jsonl", ["ds/train-0.jsonl", "ds/train-1.jsonl"], []),
        (f"{base}/ds/test/*", ["ds/test/0.jsonl"], []),
        (f"{base}/ds/test/0.jsonl", ["ds/test/0.jsonl"], []),
        (f"{base}/x y.csv", ["x y.csv"], []),
    ):
        (source,) = sources.find(f"{name}=2", None, tmp_path)
        assert [source.shown(path) for path in source.train] == [f"{base}/{key}" for key in train]
        assert [source.shown(path) for path in source.held_out] == [
            f"{base}/{key}" for key in held_out
        ]
        assert len(read(source)) == len(train)
        assert all(path.parent == tmp_path / "sources" / "0" for path in source.train)
        found = source.inputs()
        assert (found["name"], found["weight"], found["revision"]) == (name, 2, None)
        assert found["files"][0] == {
            "path": f"{base}/{train[0]}",
            "bytes": source.train[0].stat().st_size,
            "sha256": artifact.sha256(source.train[0]),
        }


def test_what_a_store_does_not_hold(store: str, tmp_path: Path) -> None:
    for name, words in (
        ("bucket/none.jsonl", "there is nothing at {}; check the address"),
        ("bucket/none/", "{} holds no training file"),
        ("bucket/*.none", "{} holds no training file"),
        ("no-bucket/a.csv", "there is nothing at {}; check the address"),
        ("no-bucket/a/", "{}"),
    ):
        url = f"{store}://{name}"
        with pytest.raises(Missing, match=re.escape(words.format(url))):
            find(url, tmp_path)


def test_several_sources_are_copied_apart(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ENDPOINT_URL", s3), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
        monkeypatch.setenv(f"AWS_{name}", value)
    dataset = "s3://bucket/ds/train-0.jsonl,s3://bucket/ds/train-0.jsonl"
    one, two = sources.find(dataset, None, tmp_path)
    assert one.train != two.train
    assert read(one) == read(two) == ROWS[:1]


def test_credentials_that_are_missing_or_wrong(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    with pytest.raises(NoPermission, match=r"no credentials.*set AWS_ACCESS_KEY_ID and AWS_SECRET"):
        find("s3://bucket/ds/", tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(NoPermission, match="set AWS_ACCESS_KEY_ID"):
        find("s3://bucket/ds/", tmp_path)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    requests.post(f"{s3}/moto-api/reset-auth", data=b"0")  # from now on, moto asks who it is
    try:
        for name in ("ds/", "ds/train-0.jsonl"):
            with pytest.raises(NoPermission, match=r"s3://bucket/ds/.* may not be read") as error:
                find(f"s3://bucket/{name}", tmp_path)
            assert "canary" not in str(error.value)
    finally:
        requests.post(f"{s3}/moto-api/reset-auth", data=b"Infinity")


def test_a_store_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with pytest.raises(TryAgain, match=r"s3://bucket/a\.csv could not be read"):
        find("s3://bucket/a.csv", tmp_path)
    with pytest.raises(BadSetting, match="is no address"):
        find("s3://B!/a.csv", tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(BadSetting, match=r"s3://bucket/a\.csv is no address"):
        find("s3://bucket/a.csv", tmp_path)


@pytest.mark.parametrize("kind", ["s3", "gs", "https"])
def test_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    package = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp"}[kind]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CannotRun, match=f"{kind}:// needs the package {package}.*pip install"):
        find(f"{kind}://bucket/a.csv", tmp_path)


class Web(http.server.ThreadingHTTPServer):
    """A server of files that answers each request as `script` says, the last one for ever."""

    daemon_threads = True

    def __init__(self, *script: int) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.script = list(script)
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Requests(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Authorization"]))
        script = self.server.script
        status = script.pop(0) if len(script) > 1 else script[0]
        if status == 0:  # hang up
            return
        body = LINE * 3
        self.send_response(302 if status == 1 else 200 if status == 2 else status)
        if status == 1:
            self.send_header("Location", "/elsewhere?token=other")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:20] if status == 2 else body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def web() -> Iterator[Callable[..., Web]]:
    started: list[Web] = []

    def start(*script: int) -> Web:
        started.append(Web(*script))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "script", [[200], [0, 200], [503, 429, 200], [2, 200], [1, 200], [0, 2, 1, 200]]
)
def test_a_file_on_the_web(web: Callable[..., Web], tmp_path: Path, script: list[int]) -> None:
    """Also where the connection breaks, before or within the file, and where it is moved."""
    server = web(*script)
    source = find(f"{server.url}/data/my%20test.jsonl?sig=a%2Fb&x=1", tmp_path)
    assert read(source) == ROWS[:1] * 3
    assert source.name == f"{server.url}/data/my%20test.jsonl"
    assert source.shown(source.train[0]) == source.name
    assert source.train[0].name == "00000-my%20test.jsonl"
    assert server.requests[0] == ("/data/my%20test.jsonl?sig=a%2Fb&x=1", None)
    assert len(server.requests) == len(script)


@pytest.mark.parametrize(
    ("script", "kind", "tries"),
    [
        ([404], Missing, 1),
        ([410], Missing, 1),
        ([401], NoPermission, 1),
        ([403], NoPermission, 1),
        ([400], BadSetting, 1),
        ([500], TryAgain, 3),
        ([503, 503, 404], Missing, 3),
        ([0], TryAgain, 6),  # aiohttp asks again by itself
        ([2], TryAgain, 3),
    ],
)
def test_a_file_on_the_web_that_cannot_be_had(
    web: Callable[..., Web], tmp_path: Path, script: list[int], kind: type[StageError], tries: int
) -> None:
    server = web(*script)
    url = server.url.replace("//", "//me:canary@") + "/a.jsonl?sig=canary"
    with pytest.raises(kind, match=re.escape(f"{server.url}/a.jsonl")) as error:
        find(url, tmp_path)
    assert "canary" not in str(error.value)
    assert len(server.requests) == tries
    assert server.requests[0][1] == "Basic bWU6Y2FuYXJ5"
    assert sources.plain(f"x,{url}") == f"x,{server.url}/a.jsonl"


def test_a_web_address_that_names_no_data(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"http://127\.0\.0\.1:9/page is none of"):
        find("http://127.0.0.1:9/page?file=a.jsonl", tmp_path)


# --- on the hub ------------------------------------------------------------------------------------


def test_a_hub_data_set(tmp_path: Path) -> None:
    """With a weight and a revision in its name, and files of each kind that is read."""
    folder = tmp_path / "pushed"
    for name in (
        "train/a.jsonl",
        "train/b.jsonl.gz",
        "train/c.arrow",
        "d.csv.zst",
        "test/e.ndjson",
        "f.md",
    ):
        write(folder / name)
    script = (
        "import sys; from pathlib import Path; from stages.lib.data import sources;"
        "(found,) = sources.find(sys.argv[1], None, Path('scratch'));"
        "print(found.revision, found.weight, *map(found.shown, found.train + found.held_out));"
        "print(found.inputs()['files'][0]['path'])"
    )
    with Hub() as hub:
        first = hub.push("datasets", "owner/data", folder)
        again = tmp_path / "again"
        write(again / "a.jsonl", ROWS[:1])
        hub.push("datasets", "owner/data", again)
        done = subprocess.run(
            [sys.executable, "-c", script, f"owner/data@{first}=0.5"],
            env=clean_environment(tmp_path) | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        first, "0.5", "owner/data/d.csv.zst", "owner/data/train/a.jsonl", "owner/data/train/b.jsonl.gz",
        "owner/data/train/c.arrow", "owner/data/test/e.ndjson", "d.csv.zst",
    ]  # fmt: skip
