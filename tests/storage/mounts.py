"""Volumes as they are in the field, made here: an object store behind FUSE, a folder of another user's."""

import contextlib
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RCLONE = Path(sys.executable).parent / "rclone"
WAIT_SECONDS = 20.0


def skip(why: str) -> None:
    """Say loudly what is not tested, and why."""
    warnings.warn(f"not tested: {why}", stacklevel=2)
    pytest.skip(why)


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[Path]:
    """A bucket of an S3 server, mounted by rclone without a cache: files are written once, in sequence."""
    import boto3
    from moto.server import ThreadedMotoServer

    if os.getuid() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        skip("an S3 mount needs root and /dev/fuse")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1",
            aws_access_key_id="k", aws_secret_access_key="s",
        )  # fmt: skip
        client.create_bucket(Bucket="bucket")
        with _rclone(url, folder) as mount:
            yield mount
    finally:
        server.stop()


@contextlib.contextmanager
def _rclone(url: str, folder: Path) -> Iterator[Path]:
    mount, tools = folder / "bucket", folder / "tools"
    mount.mkdir()
    tools.mkdir()
    (tools / "fusermount3").write_text(
        f'#!/bin/sh\nexec {sys.executable} {HERE / "fusermount.py"} "$@"\n'
    )
    (tools / "fusermount3").chmod(0o755)
    store = f":s3,provider=Other,endpoint='{url}',access_key_id=k,secret_access_key=s:bucket"
    command = [RCLONE, "mount", store, mount, "--vfs-cache-mode", "off"]
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(folder)}
    with (folder / "rclone.log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not os.path.ismount(mount):
            if process.poll() is not None or time.monotonic() > deadline:
                skip(f"rclone did not mount: {(folder / 'rclone.log').read_text()}")
            time.sleep(0.02)
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False, capture_output=True)
        process.terminate()
        process.wait()
