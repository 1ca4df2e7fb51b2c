"""`copy`: verified, resumed, and never a manifest beside what it does not speak of."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.lib.jobs import copying
from stages.lib.jobs.places import Place, place
from stages.lib.run.exits import BadData, BadSetting, Missing, TryAgain
from tests.conftest import Stages

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """S3 as moto has it, with one bucket; its address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    yield url
    server.stop()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with an artifact in it, and files that are none."""
    folder = tmp_path / "run"
    contents = {"a.bin": os.urandom(300_000), "inner/b.bin": b"b" * 1000, "empty": b""}
    for name, content in contents.items():
        path = folder / "adapter" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    (folder / "adapter" / "manifest.json").write_text(json.dumps({"schema": 1, "files": files}))
    (folder / "log.txt").write_text("line\n")
    (folder / "holder.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "holder.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_to_a_bucket_and_back(run: Path, s3: str, stages: Stages, tmp_path: Path) -> None:
    env = KEYS | {"AWS_ENDPOINT_URL": s3}
    there = stages("copy", run, "s3://bucket/runs/x", env=env)
    assert there.returncode == 0, there.stderr
    assert there.stdout.startswith("5 files copied (0.3 MB), 0 were equal")
    assert "3 by a manifest" in there.stdout
    again = stages("copy", run, "s3://bucket/runs/x", env=env)
    assert again.stdout.startswith("0 files copied (0.0 MB), 5 were equal")
    back = stages("copy", "s3://bucket/runs/x", tmp_path / "back", env=env)
    assert back.returncode == 0, back.stderr
    assert contents(tmp_path / "back") == contents(run)
    missing = stages("copy", "s3://bucket/nothing", tmp_path / "back", env=env)
    assert missing.returncode == 66
    assert stages("copy", run, "s3://other/x", env=env).returncode == 66


def test_what_is_cut_off_is_gone_on_with(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    copying.copy(place(str(run)), place(str(target)))
    (target / "adapter" / "a.bin").write_bytes(b"half")
    (target / "adapter" / "manifest.json").unlink()
    done = copying.copy(place(str(run)), place(str(target)))
    assert done.copied == ["adapter/a.bin", "adapter/manifest.json"]
    assert contents(target) == contents(run)
    assert not (target / "holder.json").exists()


def test_same_size_other_bytes_is_not_equal(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    copying.copy(place(str(run)), place(str(target)))
    (target / "log.txt").write_text("enil\n")
    (target / "adapter" / "inner" / "b.bin").write_bytes(b"c" * 1000)
    done = copying.copy(place(str(run)), place(str(target)))
    assert done.copied == ["adapter/inner/b.bin", "log.txt", "adapter/manifest.json"]
    assert contents(target) == contents(run)


@pytest.mark.parametrize("harm", ["bytes", "size", "missing"])
def test_a_corrupt_artifact_is_not_copied_as_whole(harm: str, run: Path, tmp_path: Path) -> None:
    path = run / "adapter" / "a.bin"
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(os.urandom(300_000 if harm == "bytes" else 5))
    with pytest.raises(BadData, match=r"a\.bin"):
        copying.copy(place(str(run)), place(str(tmp_path / "target")))
    assert not (tmp_path / "target" / "adapter" / "manifest.json").exists()
    assert not (tmp_path / "target" / "adapter" / "a.bin").exists()


class Lossy(Place):
    """A volume that loses the last byte of what it is given."""

    def sha256(self, name: str) -> str:
        return hashlib.sha256(b"".join(self.blocks(name))[:-1]).hexdigest()


def test_a_target_that_gives_back_other_bytes_is_told(run: Path, tmp_path: Path) -> None:
    good = place(str(tmp_path / "target"))
    with pytest.raises(TryAgain, match="gave back other bytes"):
        copying.copy(place(str(run)), Lossy(good.files, good.path, good.shown))
    assert not (tmp_path / "target" / "adapter" / "manifest.json").exists()


def test_a_replaced_artifact_has_no_manifest_meanwhile(run: Path, tmp_path: Path) -> None:
    """Where the second copy ends early, the first one's manifest is gone."""
    target = tmp_path / "target"
    copying.copy(place(str(run)), place(str(target)))
    path = run / "adapter" / "manifest.json"
    said = json.loads(path.read_text())
    (run / "adapter" / "a.bin").write_bytes(b"new")
    said["files"]["a.bin"] = {"bytes": 3, "sha256": hashlib.sha256(b"new").hexdigest()}
    said["files"]["inner/b.bin"]["sha256"] = "0" * 64
    path.write_text(json.dumps(said))
    with pytest.raises(BadData, match=r"b\.bin"):
        copying.copy(place(str(run)), place(str(target)))
    assert (target / "adapter" / "a.bin").read_bytes() == b"new"
    assert not (target / "adapter" / "manifest.json").exists()


def test_one_file_goes_where_it_is_told_or_into_a_folder(run: Path, tmp_path: Path) -> None:
    copying.copy(place(str(run / "log.txt")), place(str(tmp_path / "other.txt")))
    assert (tmp_path / "other.txt").read_text() == "line\n"
    (tmp_path / "folder").mkdir()
    copying.copy(place(str(run / "log.txt")), place(str(tmp_path / "folder")))
    assert (tmp_path / "folder" / "log.txt").read_text() == "line\n"


@pytest.mark.parametrize(
    ("address", "kind"),
    [("ftp://host/x", BadSetting), ("s3://", BadSetting), ("/no/such", Missing)],
)
def test_an_address_that_is_none(address: str, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind):
        copying.copy(place(address), place(str(tmp_path / "x")))
