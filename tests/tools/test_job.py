"""`job` as a command: the spec alone, what it takes from the environment, and what it refuses."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from stages.lib.jobs.targets import TARGETS
from tests.conftest import ROOT, Stages
from tests.lib.jobs.orders import IMAGE, ODD, VOLUMES, variables

ASKED = ("--volume", "claim", "--image", IMAGE)


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    return shutil.copytree(ROOT / "env", tmp_path / "env")


def test_the_spec_alone_is_on_standard_output(presets: Path, stages: Stages) -> None:
    done = stages("job", "kubernetes", "--preset", "llama2-7b", *ASKED, "--check")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["kind"] == "Job"
    assert "the schemas of Kubernetes" in done.stderr
    named = stages("--env-file", "env/llama2-7b.env", "job", "kubernetes", *ASKED)
    assert named.stdout == done.stdout
    (presets.parent / "job.yaml").write_text(done.stdout.replace("restartPolicy", "restart"))
    asked = ("job", "kubernetes", "--preset", "llama2-7b", "--spec", "job.yaml")
    refused = stages(*asked)
    assert (refused.returncode, refused.stdout) == (65, "")
    assert "restart" in refused.stderr


def test_it_takes_settings_of_its_stages_from_the_environment(
    presets: Path, stages: Stages, tmp_path: Path
) -> None:
    """Of those alone, and no secret."""
    surroundings = ODD | {"HF_TOKEN": "hf_0123456789", "TEMPERATURE": "0.5", "NUM_GPUS": "2"}
    surroundings["GGUF_TYPE"] = "f16"
    asked = ("job", "kubernetes", "--preset", "llama2-7b", *ASKED)
    one = stages(*asked, "--stage", "generate", env=surroundings)
    assert one.returncode == 0, one.stderr
    found = variables("kubernetes", one.stdout, tmp_path)
    assert (found["PROMPT"], found["TEMPERATURE"]) == (ODD["PROMPT"], "0.5")
    assert "LEARNING_RATE" not in found
    chain = variables("kubernetes", stages(*asked, env=surroundings).stdout, tmp_path)
    assert (chain["LEARNING_RATE"], chain["NUM_GPUS"]) == ("2e-4", "2")
    assert "GGUF_TYPE" not in chain
    assert "hf_0123456789" not in one.stdout


def test_what_the_preset_says_of_the_job_is_used(presets: Path, stages: Stages) -> None:
    path = presets / "mine.env"
    path.write_text(
        "BASE_MODEL=sample\nDATASET=sample\nNUM_GPUS=4\nVOLUME=mine\nGRACE_SECONDS=100\n"
    )
    done = stages("job", "kubernetes", "--preset", "mine", "--image", IMAGE, "--run-dir", "runs/x")
    assert done.returncode == 0, done.stderr
    pod = yaml.safe_load(done.stdout)["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert pod["terminationGracePeriodSeconds"] == 105
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "mine"}
    assert pod["containers"][0]["args"] == ["--env-file", "env/mine.env", "chain"]
    assert "/runs/x" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("job", "docker", "--volume", "/r"), "--preset NAME"),
        (("job", "docker", "--volume", "/r", "--preset", "llama2-7"), "Did you mean llama2-7b.env?"),
        (("--env-file", "other/x.env", "job", "docker", "--volume", "/r"), "env/"),
        (("job", "docker", "--preset", "llama2-7b"), "no VOLUME is set"),
    ],
)  # fmt: skip
def test_what_is_missing_is_told(
    args: tuple[str, ...], said: str, presets: Path, stages: Stages
) -> None:
    (presets.parent / "other").mkdir()
    shutil.copy(presets / "smoke.env", presets.parent / "other" / "x.env")
    done = stages(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.parametrize("target", list(TARGETS))
def test_the_examples_are_what_is_rendered(
    target: str, presets: Path, stages: Stages, tmp_path: Path
) -> None:
    folder = ROOT / "jobs" / target
    readme = (folder / "README.md").read_text()
    assert len(readme.splitlines()) <= 20
    (command,) = [
        line.strip() for line in readme.splitlines() if "python -m stages job" in line
    ]  # as a user would type it
    words = command.partition("python -m stages ")[2].partition(" > ")[0].split()
    done = stages(*words)
    assert done.returncode == 0, done.stderr
    assert (folder / TARGETS[target].file).read_text() == done.stdout
    assert stages(*words, "--spec", folder / TARGETS[target].file).returncode == 0
    assert set(VOLUMES) == set(TARGETS)


def test_make_submit_shows_the_vendors_command_and_runs_it(tmp_path: Path) -> None:
    """With stand-ins for the clients, which write down their arguments."""
    for name in ("kubectl", "sky", "aws", "sbatch", "gcloud", "docker"):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "$(basename "$0") $*" >> {tmp_path}/calls\n')
        path.chmod(0o755)
    expected = {
        "kubernetes": "kubectl create -f JOB",
        "skypilot": "sky jobs launch --yes --secret HF_TOKEN JOB",
        "aws-batch": "aws batch register-job-definition --cli-input-json file://JOB\n"
        "aws batch submit-job --job-name lora-stages-x --job-queue gpus --job-definition lora-stages-x",
        "slurm": "sbatch JOB",
        "gcp-batch": "gcloud batch jobs submit --config JOB",
    }
    for target, calls in expected.items():
        given = {"VOLUME": VOLUMES[target].replace(" ", "-"), "IMAGE": IMAGE, "QUEUE": "gpus"}
        given |= {"GPU": {"skypilot": "L4", "gcp-batch": "nvidia-l4"}.get(target, "")}
        run = tmp_path / "x"
        command = [
            "make",
            "--no-print-directory",
            "-o",
            ".venv/ready",
            "submit",
            f"TARGET={target}",
            f"RUN_DIR={run}",
        ]
        command += [f"{name}={value}" for name, value in given.items()]
        surroundings = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            command, cwd=ROOT, env=surroundings, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        spec = f"{run}.{TARGETS[target].file}"
        wanted = calls.replace("JOB", spec)
        assert (tmp_path / "calls").read_text().strip() == wanted
        for line in wanted.splitlines():
            assert line in done.stdout + done.stderr
        (tmp_path / "calls").unlink()
    command = ["make", "--no-print-directory", "docker-push", f"IMAGE={IMAGE}"]
    surroundings = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings, text=True, capture_output=True, check=True
    )
    assert (tmp_path / "calls").read_text().strip() == f"docker push {IMAGE}"
