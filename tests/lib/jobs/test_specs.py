"""Every spec says what was asked for; what was broken in it is told."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.lib.jobs.order import RETRIED
from stages.lib.jobs.targets import TARGETS, check, rendered
from stages.lib.run.exits import BadData, BadSetting
from tests.lib.jobs.orders import (
    GPUS,
    IMAGE,
    ODD,
    SECRETS,
    VOLUMES,
    loaded,
    order,
    run_script,
    spec,
    variables,
)

ALL = list(TARGETS)
ARGUMENTS = ["--env-file", "env/llama2-7b.env", "chain"]


def test_the_codes_worth_a_retry_are_those_of_the_table() -> None:
    assert RETRIED == (75, 137, 143)


@pytest.mark.parametrize("target", ALL)
def test_a_spec_holds_up_before_the_services_own_model(target: str) -> None:
    for asked in (
        {},
        {"spot": True, "gpus": 2, "runtime": 3600, "queue": "gpus", "stage": "train"},
    ):
        assert check(target, spec(target, **asked), "it")
    bare = replace(order(target), secret=None, role=None)
    assert check(target, rendered(target, bare), "it")


@pytest.mark.parametrize("target", ALL)
def test_settings_arrive_to_the_letter(target: str, tmp_path: Path) -> None:
    text = spec(target, variables=ODD)
    assert check(target, text, "it")
    found = variables(target, text, tmp_path / "calls")
    assert {name: found.get(name) for name in ODD} == ODD
    assert found["RUN_DIR"] == "/runs/llama2-7b"
    assert (found["GRACE_SECONDS"], found["NUM_GPUS"], found["SCRATCH_DIR"]) == (
        "25",
        "1",
        "/cache",
    )


@pytest.mark.parametrize("target", ALL)
def test_more_gpus_a_limit_and_a_run_of_its_own(target: str, tmp_path: Path) -> None:
    text = spec(target, gpus=8, runtime=7200, run="My run.2", stage="train")
    found = variables(target, text, tmp_path / "calls")
    assert found["NUM_GPUS"] == "8"
    assert found["MAX_RUNTIME"] == "7200"
    assert found["RUN_DIR"] == "/runs/My run.2"
    assert "lora-stages-my-run-2-train" in text


def test_kubernetes() -> None:
    job = loaded("kubernetes", spec("kubernetes", gpus=2, grace=100, spot=True, queue="gpus"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["image"], container["args"]) == (IMAGE, ARGUMENTS)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["envFrom"] == [{"secretRef": {"name": "token", "optional": False}}]
    assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]
    assert pod["volumes"][0] == {"name": "runs", "persistentVolumeClaim": {"claimName": "claim"}}
    moved, codes = job["spec"]["podFailurePolicy"]["rules"]
    assert moved["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert codes["action"] == "FailJob"
    assert codes["onExitCodes"]["operator"] == "NotIn"
    assert codes["onExitCodes"]["values"] == [75, 137, 143]
    assert pod["terminationGracePeriodSeconds"] == 105
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    (wanted,) = pod["affinity"]["nodeAffinity"].values()
    keys = {term["matchExpressions"][0]["key"] for term in wanted["nodeSelectorTerms"]}
    assert {"cloud.google.com/gke-spot", "karpenter.sh/capacity-type"} <= keys
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["spec"]["suspend"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["livenessProbe"]["exec"]["command"] == [
        "sh", "-c", 'find "$RUN_DIR/heartbeat.json" -mmin -2 | grep -q .',
    ]  # fmt: skip
    for stage in ("doctor", "push", "generate"):  # have no heartbeat
        other = loaded("kubernetes", spec("kubernetes", stage=stage))
        assert "livenessProbe" not in other["spec"]["template"]["spec"]["containers"][0]
    plain = loaded("kubernetes", rendered("kubernetes", replace(order("kubernetes"), secret=None)))
    (container,) = plain["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "lora-stages", "optional": True}}]
    assert "suspend" not in plain["spec"]
    assert "affinity" not in plain["spec"]["template"]["spec"]


def test_skypilot() -> None:
    task = loaded("skypilot", spec("skypilot", gpus=4, spot=True))
    resources = task["resources"]
    assert resources["accelerators"] == {"L4": 4}
    assert resources["use_spot"] is True
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75, 137, 143]
    assert resources["job_recovery"]["max_restarts_on_errors"] == 0
    assert task["file_mounts"] == {"/runs": {"source": "s3://bucket/runs", "mode": "MOUNT_CACHED"}}
    assert task["secrets"] == {"HF_TOKEN": None}
    run = task["run"].replace("\\\n", "")
    assert re.search(
        r"--env HF_TOKEN .*" + re.escape(f"{IMAGE} ") + " *" + " ".join(ARGUMENTS), run
    )
    assert "--stop-timeout 30 " in run
    assert "-v /runs:/runs " in run
    assert "--gpus 4 " in run
    assert loaded("skypilot", spec("skypilot"))["resources"]["use_spot"] is False


def test_aws_batch() -> None:
    definition = loaded("aws-batch", spec("aws-batch", gpus=2, runtime=3600))
    container = definition["containerProperties"]
    assert (container["image"], container["command"]) == (IMAGE, ARGUMENTS)
    assert {"type": "GPU", "value": "2"} in container["resourceRequirements"]
    assert container["secrets"] == [{"name": "HF_TOKEN", "valueFrom": SECRETS["aws-batch"]}]
    assert container["executionRoleArn"] == "arn:aws:iam::1:role/r"
    volume = container["volumes"][0]["efsVolumeConfiguration"]
    assert volume["fileSystemId"] == "fs-0123abcd"
    assert volume["authorizationConfig"] == {"accessPointId": "fsap-0456cdef"}
    assert {"sourceVolume": "runs", "containerPath": "/runs"} in container["mountPoints"]
    exits = definition["retryStrategy"]["evaluateOnExit"]
    codes = [rule["onExitCode"] for rule in exits if "onExitCode" in rule]
    assert codes == ["75", "137", "143"]
    assert exits[0] == {"onStatusReason": "Host EC2*", "action": "RETRY"}
    assert exits[-1] == {"onReason": "*", "action": "EXIT"}
    assert definition["timeout"] == {"attemptDurationSeconds": 3660}
    assert container["linuxParameters"]["sharedMemorySize"] == 8192


def test_gcp_batch() -> None:
    job = loaded("gcp-batch", spec("gcp-batch", gpus=2, runtime=3600, spot=True))
    task = job["taskGroups"][0]["taskSpec"]
    runnable = task["runnables"][0]
    assert runnable["container"]["imageUri"] == IMAGE
    assert runnable["container"]["commands"] == ARGUMENTS
    assert runnable["container"]["volumes"] == ["/mnt/disks/runs:/runs:rw"]
    assert "--stop-timeout=30" in runnable["container"]["options"].split()
    assert runnable["environment"]["secretVariables"] == {"HF_TOKEN": SECRETS["gcp-batch"]}
    assert task["volumes"][0]["gcs"] == {"remotePath": "bucket/runs"}
    (policy,) = task["lifecyclePolicies"]
    codes = policy["actionCondition"]["exitCodes"]
    assert [code for code in codes if code < 256] == [75, 137, 143]
    assert 50001 in codes
    assert 50005 not in codes
    assert task["maxRunDuration"] == "3660s"
    (machine,) = job["allocationPolicy"]["instances"]
    assert machine["policy"]["accelerators"] == [{"type": "nvidia-l4", "count": "2"}]
    assert machine["policy"]["machineType"] == "g2-standard-24"
    assert machine["policy"]["provisioningModel"] == "SPOT"
    share = loaded("gcp-batch", spec("gcp-batch", volume="10.0.0.2:/share"))
    task = share["taskGroups"][0]["taskSpec"]
    assert task["volumes"][0]["nfs"] == {"server": "10.0.0.2", "remotePath": "/share"}
    assert task["runnables"][0]["environment"]["variables"]["HF_HOME"].startswith("/runs/")


def test_docker(tmp_path: Path) -> None:
    volume = str(tmp_path / "my runs")
    text = spec("docker", gpus=2, grace=50, volume=volume)
    code, calls = run_script(text, tmp_path / "calls")
    (call,) = calls["docker"]
    said = call["arguments"]
    assert code == 0
    assert said[-4:] == [IMAGE, *ARGUMENTS]
    pairs = list(itertools.pairwise(said))
    for pair in (
        ("--gpus", "2"), ("--stop-timeout", "55"), ("-v", f"{volume}:/runs"), ("-v", "/cache"),
        ("--env-file", "/etc/token.env"), ("--env", "RUN_DIR"),
    ):  # fmt: skip
        assert pair in pairs
    assert "--rm" in said
    assert (tmp_path / "my runs").is_dir()
    text = rendered("docker", replace(order("docker", volume=volume), secret=None))
    _, calls = run_script(text, tmp_path / "others")
    said = calls["docker"][0]["arguments"]
    assert ("--env", "HF_TOKEN") in itertools.pairwise(said)


@pytest.mark.parametrize(
    ("codes", "end", "times"),
    [("75 137 143 0", 0, 4), ("65", 65, 1), ("75 82", 82, 2), ("75 " * 12, 75, 10)],
)
def test_docker_tries_again_what_is_worth_it(
    codes: str, end: int, times: int, tmp_path: Path
) -> None:
    text = spec("docker", volume=str(tmp_path / "runs"))
    code, calls = run_script(text, tmp_path / "calls", codes)
    assert (code, len(calls["docker"])) == (end, times)


def test_slurm(tmp_path: Path) -> None:
    text = spec(
        "slurm", gpus=2, grace=100, runtime=3600, queue="spot", volume=str(tmp_path / "runs")
    )
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    assert directives["gres"] == "gpu:l4:2"
    assert directives["signal"] == "TERM@105"
    assert directives["partition"] == "spot"
    assert directives["time"] == "61"
    assert directives["open-mode"] == "append"
    assert "requeue" in directives
    assert re.search(r"^set -a; \. /etc/token.env; set \+a$", text, re.M)
    _, calls = run_script(text.replace("/etc/token.env", "/dev/null"), tmp_path / "calls")
    said = calls["srun"][-1]["arguments"]
    assert said[:2] == ["bash", "-c"]
    assert 'exec apptainer run "$@"' in said[2]
    assert said[3:5] == ["step", "--nv"]
    assert said[-4:] == [f"docker://{IMAGE}", *ARGUMENTS]
    mounts = said[said.index("--bind") + 1].split(",")
    assert mounts[0] == f"{tmp_path}/runs:/runs"
    assert mounts[1].endswith(":/cache")
    assert not list((tmp_path / "calls").glob("lora-stages.*")), "the scratch of the job is left"


@pytest.mark.parametrize(
    ("code", "requeued"),
    [(75, True), (137, True), (143, True), (65, False), (0, False), (70, False)],
)
def test_slurm_requeues_what_is_worth_it(code: int, requeued: bool, tmp_path: Path) -> None:
    text = spec("slurm", volume=str(tmp_path / "runs"), secret=None)
    end, calls = run_script(text, tmp_path / "calls", str(code))
    assert [call["arguments"] for call in calls.get("scontrol", [])] == [
        ["requeue", "7"]
    ] * requeued
    assert end == (0 if requeued else code)


BROKEN: list[tuple[str, str, str, str]] = [
    ("kubernetes", "backoffLimit: 10", "backofLimit: 10", "backofLimit"),
    ("kubernetes", "- 143\n", "- 143\n        - 65\n", "exit codes"),
    ("kubernetes", "action: FailJob", "action: FailJb", "second rule"),
    ("kubernetes", "restartPolicy: Never", "restartPolicy: OnFailure", "restartPolicy"),
    ("kubernetes", "PeriodSeconds: 30", "PeriodSeconds: 10", "GRACE_SECONDS"),
    ("kubernetes", "failureThreshold: 10", "failureThreshold: 3", "livenessProbe"),
    ("kubernetes", "- chain", "- push", "livenessProbe"),
    ("kubernetes", "nvidia.com/gpu: 1", "nvidia.com/gpu: 2", "NUM_GPUS"),
    ("kubernetes", "mountPath: /runs", "mountPath: /elsewhere", "RUN_DIR"),
    ("skypilot", "use_spot:", "use_spots:", "use_spots"),
    ("skypilot", "- 143", "- 1", "exit codes"),
    ("skypilot", "HF_TOKEN: null", "HF_TOKEN: hf_secret", "null"),
    ("skypilot", "MOUNT_CACHED", "COPY", "MOUNT_CACHED"),
    ("skypilot", "L4: 1", "L4: 8", "GPUs"),
    ("skypilot", "--env RUN_DIR", "--env RUN_DIRS", "RUN_DIR"),
    ("aws-batch", '"attempts": 10', '"attempts": 99', "1 to 10"),
    ("aws-batch", '"attempts"', '"atempts"', "atempts"),
    ("aws-batch", '"value": "8"', '"value": 8', "value"),
    ("aws-batch", '"143"', '"65"', "exit codes"),
    ("aws-batch", '"action": "EXIT"', '"action": "RETRY"', "EXIT"),
    ("aws-batch", '"executionRoleArn"', '"jobRoleArn"', "executionRoleArn"),
    ("aws-batch", '"containerPath": "/runs"', '"containerPath": "/x"', "/runs"),
    ("gcp-batch", '"maxRetryCount"', '"maxRetries"', "maxRetries"),
    ("gcp-batch", '"maxRetryCount": 10', '"maxRetryCount": 11', "1 to 10"),
    ("gcp-batch", "50006", "50005", "50005"),
    ("gcp-batch", '"RETRY_TASK"', '"RETRY"', "RETRY"),
    ("gcp-batch", "/mnt/disks/runs:/runs", "/mnt/disks/other:/runs", "no volume"),
    ("gcp-batch", '"STANDARD"', '"SPOTTY"', "SPOTTY"),
    ("gcp-batch", "--stop-timeout=30", "--stop-timeout=20", "GRACE_SECONDS"),
    ("docker", "--rm", "--restart on-failure", "--restart"),
    ("docker", "75|137|143)", "75|137|143|1)", "exit codes"),
    ("docker", "--stop-timeout 30", "--stop-timeout 3", "GRACE_SECONDS"),
    ("docker", "--env NUM_GPUS", "--env NUM_GPU", "NUM_GPUS"),
    ("docker", "done\n", "\n", "syntax"),
    ("slurm", "#SBATCH --requeue", "#SBATCH --requeu", "requeu"),
    ("slurm", "--signal=TERM@30", "--signal=TERM@5", "GRACE_SECONDS"),
    ("slurm", "75|137|143)", "75|137)", "exit codes"),
    ("slurm", "--open-mode=append", "--open-mode=truncate", "append"),
    ("slurm", "scontrol requeue", "true", "requeues"),
    ("slurm", "--gres=gpu:l4:1", "--gres=gpu:l4:2", "NUM_GPUS"),
    ("slurm", "esac", "", "syntax"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "old", "new", "said"), BROKEN)
def test_what_was_broken_is_told(target: str, old: str, new: str, said: str) -> None:
    text = spec(target)
    assert old in text
    with pytest.raises(BadData, match=re.escape(said)):
        check(target, text.replace(old, new), "it")


@pytest.mark.parametrize("target", ALL)
def test_nothing_that_everybody_needs_may_be_missing(target: str) -> None:
    """Whatever variable is lost, it is told; and so is a secret in the open."""
    text = spec(target)
    for name in ("RUN_DIR", "GRACE_SECONDS", "EXPECT_GPU", "SCRATCH_DIR", "NUM_GPUS"):
        with pytest.raises(BadData, match=name):
            check(target, text.replace(name, "OTHER"), "it")
    with pytest.raises(BadData, match="HF_TOKEN stands in the spec"):
        check(target, text.replace("EXPECT_GPU", "HF_TOKEN"), "it")


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("mangle", [lambda t: "", lambda t: "{}", lambda t: t[: len(t) // 2]])
def test_what_is_no_spec_is_told(target: str, mangle: Callable[[str], str]) -> None:
    with pytest.raises(BadData):
        check(target, mangle(spec(target)), "it")


@pytest.mark.parametrize(
    ("target", "asked", "said"),
    [
        ("docker", {"volume": "runs"}, "from / on"),
        ("slurm", {"volume": "/a,b"}, "from / on"),
        ("kubernetes", {"volume": "s3://b"}, "PersistentVolumeClaim"),
        ("skypilot", {"volume": "claim"}, "bucket"),
        ("skypilot", {"gpu": None}, "GPU=L4"),
        ("aws-batch", {"volume": "s3://b"}, "EFS"),
        ("aws-batch", {"role": None}, "executionRoleArn"),
        ("aws-batch", {"grace": 60}, "GRACE_SECONDS"),
        ("gcp-batch", {"gpu": "L4"}, "nvidia-l4"),
        ("gcp-batch", {"gpus": 3}, "1, 2, 4 or 8"),
        ("kubernetes", {"image": "lora-stages"}, "registry"),
        ("kubernetes", {"variables": {"DATASET": "https://me:word@host/x"}}, "DATASET"),
    ],
)
def test_a_setting_that_no_job_can_be_made_of(
    target: str, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadSetting, match=re.escape(said)):
        spec(target, **asked)


def test_yaml_is_read_alike_by_old_and_new_readers() -> None:
    """What YAML 1.2 takes for a number or a truth stands in quotes, though PyYAML would leave it bare."""
    text = spec(
        "kubernetes", variables={"A": "2e-4", "B": "0o17", "C": "no", "D": "1_0", "E": ".5e1"}
    )
    for value in ("2e-4", "0o17", "no", "1_0", ".5e1"):
        assert f'value: "{value}"' in text
    assert yaml.safe_load(text)
    assert json.loads(json.dumps(yaml.safe_load(text)))


def test_every_service_is_tested() -> None:
    assert set(VOLUMES) == set(TARGETS)
    assert set(GPUS) <= set(TARGETS)
    for target in TARGETS:
        assert len([row for row in BROKEN if row[0] == target]) >= 3
