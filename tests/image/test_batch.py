"""A job of AWS Batch from spec to artifacts, with the real image: moto's Batch runs it on an engine here.

Of a job definition moto takes image, command, environment, parameters, privileged and the time limit, and
mounts folders of the host alone. It passes over user, readonlyRootFilesystem, linuxParameters (shared memory,
tmpfs), resourceRequirements, secrets, executionRoleArn and retryStrategy; it makes one attempt, cannot mount
EFS, wants `readOnly` in every mount point, and ends a job with SIGKILL. So the volumes are the host's here, and
the second attempt is submitted by hand; the rest of the definition is registered as rendered.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, run_stages
from tests.image.conftest import Checkout, docker, give
from tests.lib.jobs.orders import VOLUMES

REGION, ACCOUNT = "eu-west-1", "123456789012"
REMOTE = "registry.example.com/lora-stages:cpu"
FINAL = ("SUCCEEDED", "FAILED")


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a Batch service with a queue."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    surroundings = dict(os.environ) | keys | {"MOTO_DOCKER_NETWORK_MODE": "none"}
    log = (tmp_path_factory.mktemp("moto") / "moto.log").open("w")
    command = [str(ROOT / ".venv/bin/moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log)
    try:
        where = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": REGION}
        session = boto3.Session("testing", "testing")
        _wait_for(port)
        role = session.client("iam", **where).create_role(
            RoleName="batch", AssumeRolePolicyDocument="{}"
        )
        client = session.client("batch", **where)
        machines = client.create_compute_environment(
            computeEnvironmentName="machines", type="UNMANAGED", serviceRole=role["Role"]["Arn"]
        )
        order = [{"order": 1, "computeEnvironment": machines["computeEnvironmentArn"]}]
        client.create_job_queue(
            jobQueueName="queue", state="ENABLED", priority=1, computeEnvironmentOrder=order
        )
        yield client
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def _wait_for(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError("moto's server does not answer")


@pytest.fixture(scope="module")
def volume(checkout: Checkout) -> Path:
    """What stands for the file system of EFS: the hub's cache and the runs of jobs lie on it."""
    folder = checkout.folder / "efs"
    folder.mkdir()
    give(folder, 10001)
    return folder


@pytest.fixture(scope="module")
def definition(
    image: str, volume: Path, checkout: Checkout, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """As `job` renders it; the volumes are folders of this host instead of EFS and the machine's own."""
    docker("tag", image, REMOTE)
    done = run_stages(
        tmp_path_factory.mktemp("job"), "job", "aws-batch", "--preset", "smoke", "--image", REMOTE,
        "--volume", VOLUMES["aws-batch"], "--max-runtime", "30m", "--check", cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spec = json.loads(done.stdout)
    container = spec["containerProperties"]
    assert [v["name"] for v in container["volumes"]] == ["runs", "cache"]
    container["volumes"] = [
        {"name": "runs", "host": {"sourcePath": str(volume)}},
        {"name": "cache", "host": {"sourcePath": str(checkout.cache)}},
    ]
    for point in container["mountPoints"]:
        point["readOnly"] = False
    yield spec
    docker("image", "rm", REMOTE)


def submitted(batch: Any, definition: Any, variables: Any = None, **overrides: Any) -> str:
    """The id of a new job; the definition promises a GPU, which this machine lacks."""
    given = {"EXPECT_GPU": "0"} | (variables or {})
    listed = [{"name": name, "value": value} for name, value in given.items()]
    job = batch.submit_job(
        jobName=definition["jobDefinitionName"], jobQueue="queue",
        jobDefinition=definition["jobDefinitionName"], containerOverrides={"environment": listed} | overrides,
    )  # fmt: skip
    return str(job["jobId"])


def ended(batch: Any, job: str) -> tuple[str, int | None]:
    """The state that a job ends in, and its container's exit code."""
    until = time.monotonic() + 900
    while time.monotonic() < until:
        (found,) = batch.describe_jobs(jobs=[job])["jobs"]
        if found["status"] in FINAL:
            short = batch.list_jobs(jobQueue="queue", jobStatus=found["status"])["jobSummaryList"]
            (mine,) = (entry for entry in short if entry["jobId"] == job)
            return found["status"], mine.get("container", {}).get("exitCode")
        time.sleep(1)
    raise TimeoutError(f"the job is {found['status']}")


def test_chain_is_killed_and_goes_on_to_its_artifacts(
    batch: Any, definition: Any, volume: Path
) -> None:
    """SIGKILL in the middle, as by a spot machine that goes: 137, which the spec retries; then it succeeds."""
    batch.register_job_definition(**definition)
    (known,) = batch.describe_job_definitions(status="ACTIVE")["jobDefinitions"]
    for part in ("containerProperties", "retryStrategy", "timeout", "platformCapabilities"):
        kept = known[part]
        if isinstance(kept, dict):  # moto adds empty lists, and writes actions small
            kept = {name: kept[name] for name in definition[part]}
        assert json.loads(json.dumps(kept).lower()) == json.loads(
            json.dumps(definition[part]).lower()
        ), part
    first = submitted(batch, definition)
    run = volume / "smoke"
    until = time.monotonic() + 600
    while not (run / "data" / "manifest.json").exists():
        assert time.monotonic() < until
        time.sleep(1)
    batch.terminate_job(jobId=first, reason="the machine goes")
    status, code = ended(batch, first)
    assert (status, code) == ("FAILED", 137)
    rules = definition["retryStrategy"]["evaluateOnExit"]
    assert {"onExitCode": str(code), "action": "RETRY"} in rules

    assert ended(batch, submitted(batch, definition)) == ("SUCCEEDED", 0)
    for artifact in ("data", "adapter", "evaluation", "merged"):
        assert (run / artifact / "manifest.json").is_file(), artifact
    assert {path.stat().st_uid for path in run.rglob("*")} == {10001}
    assert not (run / "error.json").exists()


def test_a_code_that_is_not_retried_fails_the_job(batch: Any, definition: Any) -> None:
    """Training without prepared data: 66, which no rule of the spec retries."""
    train = ["--env-file", "env/smoke.env", "train"]
    job = submitted(batch, definition, {"RUN_DIR": "/runs/none"}, command=train)
    assert ended(batch, job) == ("FAILED", 66)
    rules = definition["retryStrategy"]["evaluateOnExit"]
    assert not any(rule.get("onExitCode") == "66" for rule in rules)
