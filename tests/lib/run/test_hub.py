"""Files of a hub that is not at its best: cut off, busy, damaged, out of reach, or not to be trusted."""

import contextlib
import datetime
import ipaddress
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import clean_environment
from tests.hub_server import Hub
from tests.refusals import Result

PROGRAM = """
import sys
from stages.lib.run import environment, failpoints, hub, preemption
from stages.lib.run.exits import Reported
environment.quiet_libraries()
with Reported():
    preemption.listen()
    failpoints.arm()
    folder, commit = hub.snapshot("owner/big", None, "model", verify="verify" in sys.argv)
    print(folder)
"""
SIZE = 4_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with a model of one large file and two small ones, and of what is never fetched."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    (folder / "model.safetensors").write_bytes(os.urandom(SIZE))
    for name in ("modeling_own.py", "pytorch_model.bin", "run.sh"):
        (folder / name).write_text("not to be had")
    with Hub() as hub:
        hub.push("models", "owner/big", folder)
        yield hub


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *args]


def environment(tmp_path: Path, url: str, **more: str) -> dict[str, str]:
    return clean_environment(tmp_path) | {"HF_ENDPOINT": url} | more


def fetch(tmp_path: Path, url: str, *args: str, **more: str) -> Result:
    return subprocess.run(
        command(*args), env=environment(tmp_path, url, **more), text=True, capture_output=True,
        check=False, timeout=60,
    )  # fmt: skip


def right(result: Result, tmp_path: Path) -> bool:
    """Whether it ended well, with the bytes of the hub."""
    assert result.returncode == 0, result.stderr
    served, found = tmp_path / "served", Path(result.stdout.strip())
    names = {path.name for path in served.iterdir() if path.suffix in (".json", ".safetensors")}
    assert {path.name for path in found.iterdir()} == names
    return all((found / name).read_bytes() == (served / name).read_bytes() for name in names)


def refusal(result: Result, code: int) -> str:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def part(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "hub").rglob("*.incomplete")
    return found


@pytest.mark.case("F3")
def test_a_download_that_is_cut_goes_on(tmp_path: Path, hub: Hub) -> None:
    hub.cuts = 2
    assert right(fetch(tmp_path, hub.url), tmp_path)
    first, second, third = hub.ranges
    assert first == 0
    assert SIZE * 0.8 < second < third  # it asks for what it lacks, and not for less


@pytest.mark.case("F3")
def test_what_a_killed_process_had_is_kept(tmp_path: Path, hub: Hub) -> None:
    """The next one goes on from there; what is whole is hashed and put into its place."""
    killed = fetch(tmp_path, hub.url, FAILPOINTS="download.block=2:kill")
    assert killed.returncode == -signal.SIGKILL
    kept = part(tmp_path).stat().st_size
    assert 0 < kept < SIZE
    killed = fetch(tmp_path, hub.url, FAILPOINTS="download.whole:kill")
    assert killed.returncode == -signal.SIGKILL
    assert part(tmp_path).stat().st_size == SIZE
    assert right(fetch(tmp_path, hub.url), tmp_path)
    assert hub.ranges == [0, kept]
    assert list((tmp_path / "hub").rglob("*.incomplete")) == []


def test_a_part_that_is_damaged_is_not_built_upon(tmp_path: Path, hub: Hub) -> None:
    fetch(tmp_path, hub.url, FAILPOINTS="download.block=2:kill")
    with part(tmp_path).open("r+b") as file:
        file.write(b"damage")
    result = fetch(tmp_path, hub.url)
    assert "arrived damaged" in result.stderr
    assert right(result, tmp_path)
    assert hub.ranges[2] == 0


@pytest.mark.case("G3")
def test_a_signal_during_a_download(tmp_path: Path, hub: Hub) -> None:
    hub.dripping = 1.0
    with subprocess.Popen(
        command(), env=environment(tmp_path, hub.url), text=True, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 30
        while not (parts := list((tmp_path / "hub").rglob("*.incomplete"))) or not (
            parts[0].stat().st_size
        ):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        began = time.monotonic()
        _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 75, said
    assert "stopped by SIGTERM" in said
    kept = part(tmp_path).stat().st_size
    assert 0 < kept < SIZE
    hub.dripping = 0
    assert right(fetch(tmp_path, hub.url), tmp_path)
    assert hub.ranges == [0, kept]


@pytest.mark.case("F4")
def test_a_damaged_download_is_made_again_once(tmp_path: Path, hub: Hub) -> None:
    hub.spoilt = 1
    result = fetch(tmp_path, hub.url)
    assert "arrived damaged" in result.stderr
    assert right(result, tmp_path)


@pytest.mark.case("F4")
def test_a_download_that_is_always_damaged(tmp_path: Path, hub: Hub) -> None:
    hub.spoilt = 9
    said = refusal(fetch(tmp_path, hub.url), 65)
    assert "model.safetensors" in said
    assert "sha256" in said
    assert len(hub.ranges) == 2


@pytest.mark.case("F4")
@pytest.mark.parametrize("damage", ["small", "short", "flipped"])
def test_a_damaged_file_of_the_cache_is_fetched_again(
    tmp_path: Path, hub: Hub, damage: str
) -> None:
    """Small files are hashed each time, large ones measured, and hashed with --verify."""
    folder = Path(fetch(tmp_path, hub.url).stdout.strip())
    path = (folder / ("config.json" if damage == "small" else "model.safetensors")).resolve()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + (b"" if damage == "short" else bytes([content[-1] ^ 1])))
    hub.requests.clear()
    result = fetch(tmp_path, hub.url, *(["verify"] if damage == "flipped" else []))
    assert "fetching it again" in result.stderr
    assert right(result, tmp_path)
    fetched = [
        name for method, name, *_, status in hub.requests if method == "GET" and status == 200
    ]
    assert sum("/large/" in name or name.endswith("config.json") for name in fetched) == 1


@pytest.mark.case("F4")
def test_a_damaged_file_without_the_hub(tmp_path: Path, hub: Hub) -> None:
    folder = Path(fetch(tmp_path, hub.url).stdout.strip())
    path = (folder / "config.json").resolve()
    path.write_text("[]")
    said = refusal(fetch(tmp_path, hub.url, HF_HUB_OFFLINE="1"), 65)
    assert str(folder / "config.json") in said
    assert path.read_text() == "[]"


@pytest.mark.case("F2")
@pytest.mark.parametrize(
    ("where", "headers"),
    [
        ("/api/models/owner/big/revision", {"Retry-After": "1"}),
        ("/api/models/owner/big/revision", {"RateLimit": '"api";r=0;t=1'}),
        ("/large/", {"Retry-After": "1"}),
        ("/large/", {"Retry-After": "{date}"}),
    ],
    ids=["seconds", "the hub's own way", "of a large file", "a date"],
)
def test_a_busy_hub_is_waited_for(
    tmp_path: Path, hub: Hub, where: str, headers: dict[str, str]
) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)
    date = soon.strftime("%a, %d %b %Y %H:%M:%S GMT")
    hub.busy = (429, {name: value.format(date=date) for name, value in headers.items()})
    hub.failing[where] = 1
    result = fetch(tmp_path, hub.url)
    assert right(result, tmp_path)
    assert re.search(r"the hub asks to wait \d s", result.stderr)
    assert [status for *_, status in hub.requests].count(429) == 1


@pytest.mark.case("F2")
@pytest.mark.parametrize("where", ["/api/models/owner/big/revision", "/large/"])
def test_a_hub_that_is_busy_for_long(tmp_path: Path, hub: Hub, where: str) -> None:
    hub.busy = (429, {"Retry-After": "86400"})
    hub.failing[where] = -1
    began = time.monotonic()
    said = refusal(fetch(tmp_path, hub.url), 75)
    assert "86400 s" in said
    assert time.monotonic() - began < 20
    assert [status for *_, status in hub.requests].count(429) == 1


@pytest.mark.case("F2")
def test_a_signal_while_the_hub_is_waited_for(tmp_path: Path, hub: Hub) -> None:
    hub.busy = (429, {"Retry-After": "100"})
    hub.failing["/large/"] = -1
    with subprocess.Popen(
        command(), env=environment(tmp_path, hub.url), text=True, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr
        for line in process.stderr:
            if "asks to wait 100 s" in line:
                break
        began = time.monotonic()
        process.terminate()
        assert process.wait(20) == 75
    assert time.monotonic() - began < 5


@pytest.mark.case("F1")
@pytest.mark.parametrize(
    ("url", "word"),
    [("http://hub.invalid", "HF_ENDPOINT"), ("http://127.0.0.1:{closed}", "network")],
    ids=["no name", "refused"],
)
def test_a_hub_out_of_reach(tmp_path: Path, url: str, word: str) -> None:
    with socket.socket() as closed:  # bound, so that nobody else gets it, but not listening
        closed.bind(("127.0.0.1", 0))
        said = refusal(fetch(tmp_path, url.format(closed=closed.getsockname()[1])), 75)
    assert "owner/big" in said
    assert word in said


@pytest.mark.case("F1")
def test_a_hub_that_never_answers(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        more = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        assert "owner/big" in refusal(fetch(tmp_path, url, **more), 75)


@pytest.mark.case("F5")
def test_a_proxy_that_lets_nothing_through(tmp_path: Path, hub: Hub) -> None:
    """The hub itself stands in for it: it knows no CONNECT."""
    proxy = hub.url.replace("://", "://me:CanaryOfAProxy@")
    result = fetch(tmp_path, "https://hub.invalid", HTTPS_PROXY=proxy)
    assert "HTTPS_PROXY" in refusal(result, 75)
    assert "CanaryOfAProxy" not in result.stderr


# --- certificates ----------------------------------------------------------------------------------


def certificate(folder: Path, begins: int, ends: int) -> Path:
    """A file with a key and a certificate of 127.0.0.1 that holds between two days from now."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a hub")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now + begins * day)
        .not_valid_after(now + ends * day)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "hub.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )  # fmt: skip
    return path


@contextlib.contextmanager
def https(folder: Path, begins: int, ends: int) -> Iterator[tuple[Hub, Path]]:
    path = certificate(folder, begins, ends)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with Hub(context) as hub:
        served = folder / "served"
        served.mkdir()
        (served / "config.json").write_text("{}")
        hub.push("models", "owner/big", served)
        yield hub, path


@pytest.mark.case("F5")
def test_an_authority_of_ones_own(tmp_path: Path) -> None:
    with https(tmp_path, -1, 1) as (hub, path):
        said = refusal(fetch(tmp_path, hub.url), 78)
        assert "SSL_CERT_FILE" in said
        assert right(fetch(tmp_path, hub.url, SSL_CERT_FILE=str(path)), tmp_path)


@pytest.mark.case("F7")
@pytest.mark.parametrize(("begins", "ends", "word"), [(1, 2, "not valid yet"), (-2, -1, "expired")])
def test_a_clock_that_is_wrong(tmp_path: Path, begins: int, ends: int, word: str) -> None:
    with https(tmp_path, begins, ends) as (hub, path):
        said = refusal(fetch(tmp_path, hub.url, SSL_CERT_FILE=str(path)), 78)
    assert word in said
    assert "clock" in said
    assert datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d") in said
