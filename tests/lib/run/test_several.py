"""Where a process stands among several, as schedulers and launchers say it, and what they end with."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.lib.run import environment, rank, several
from stages.lib.run.exits import BadSetting, TryAgain
from stages.lib.run.rank import Hosts

ALL = {name for row in environment.SCHEDULERS for name in row} | set(environment.LAUNCHED)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL | {"PET_MASTER_PORT", "CUDA_VISIBLE_DEVICES"}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, Hosts()),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "a1"}, Hosts()),
        (
            {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "gpu[07-09,12].x"},
            Hosts(4, 2, "gpu07.x"),
        ),
        (
            {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a.b", "PET_MASTER_PORT": "7"},
            Hosts(2, 1, "a.b", 7),
        ),
        (
            {"AWS_BATCH_JOB_NUM_NODES": "2", "AWS_BATCH_JOB_NODE_INDEX": "1",
             "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.9"},
            Hosts(2, 1, "10.0.0.9"),
        ),
        ({"NNODES": "3", "JOB_COMPLETION_INDEX": "2", "MASTER_ADDR": "w-0.w"}, Hosts(3, 2, "w-0.w")),
    ],
)  # fmt: skip
def test_hosts_are_those_of_the_scheduler(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], found: Hosts
) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert environment.hosts() == found


def test_the_first_host_of_aws_does_not_say_its_own_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_BATCH_JOB_NUM_NODES", "2")
    monkeypatch.setenv("AWS_BATCH_JOB_NODE_INDEX", "0")
    assert environment.hosts().address
    monkeypatch.setenv("AWS_BATCH_JOB_NODE_INDEX", "1")
    with pytest.raises(BadSetting, match="set MASTER_ADDR"):
        environment.hosts()


def test_a_node_rank_without_a_completion_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "w-0"}.items():
        monkeypatch.setenv(name, value)
    assert environment.hosts() == Hosts(2, 1, "w-0")


@pytest.mark.parametrize(
    ("names", "first"),
    [("a,b", "a"), ("n[1-3]", "n1"), ("n[08,11]", "n08"), ("g-2", "g-2"), ("r[1-2]n,x", "r1n")],
)
def test_first_host(names: str, first: str) -> None:
    assert rank.first_host(names) == first


@pytest.mark.parametrize(
    ("seen", "own"), [(None, "1"), ("4,6", "6"), ("GPU-ab", "GPU-ab"), ("", "")]
)
def test_a_rank_sees_one_gpu_and_no_library_sees_the_rank(
    monkeypatch: pytest.MonkeyPatch, seen: str | None, own: str
) -> None:
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    found = environment.take_rank()
    assert found
    assert (found.number, found.count, found.near) == (3, 4, 2)
    assert environment.visible_gpus() == own
    assert environment.take_rank() is None


def test_a_pod_s_rank_is_no_process_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubeflow numbers pods with the names that torchrun has for processes."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment.take_rank() is None


class Folder:
    """As much of a run as its end needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder


def end(code: int, at: float) -> dict[str, Any]:
    return {"exit": code, "at": at, "message": f"ended with {code}"}


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({0: end(75, 1), 1: end(75, 2)}, 75),
        ({0: end(75, 1), 1: end(81, 2)}, 81),  # the first lost it before it had said why
        ({0: end(80, 2), 1: end(82, 1)}, 82),
        ({0: end(75, 1), 1: end(70, 2)}, 70),
        ({1: end(81, 1)}, 81),
    ],
)
def test_a_run_ends_for_the_reason_of_the_one_that_failed(
    tmp_path: Path, ends: dict[int, dict[str, Any]], code: int
) -> None:
    with pytest.raises(SystemExit) as found:
        several._conclude(Folder(tmp_path), ends, 2, 1)  # type: ignore[arg-type]
    assert found.value.code == code
    if ends.get(0, {}).get("exit") != code:
        assert json.loads((tmp_path / "error.json").read_text())["exit"] == code


@pytest.mark.parametrize("ends", [{}, {0: end(75, 1)}, {0: end(70, 1)}])
def test_a_process_without_a_word_was_killed(
    tmp_path: Path, ends: dict[int, dict[str, Any]]
) -> None:
    with pytest.raises(TryAgain, match="of 2 processes were killed or lost"):
        several._conclude(Folder(tmp_path), ends, 2, 1)  # type: ignore[arg-type]
