"""Orders for every service, all that can be asked for in them, and how each service reads its specs."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from stages.lib.jobs.order import Order
from stages.lib.jobs.targets import TARGETS, rendered

VOLUMES = {
    "docker": "/data/my runs", "kubernetes": "claim", "skypilot": "s3://bucket/runs",
    "aws-batch": "fs-0123abcd:fsap-0456cdef", "slurm": "/shared/runs", "gcp-batch": "gs://bucket/runs",
}  # fmt: skip
GPUS = {"skypilot": "L4", "gcp-batch": "nvidia-l4", "kubernetes": "NVIDIA-L4", "slurm": "l4"}
IMAGE = "registry.example.com/lora-stages:0.1"
SECRETS = {
    "kubernetes": "token", "aws-batch": "arn:aws:secretsmanager:eu-west-1:1:secret:token",
    "gcp-batch": "projects/p/secrets/token/versions/latest", "docker": "/etc/token.env",
    "slurm": "/etc/token.env",
}  # fmt: skip
# What a shell, YAML, JSON, make, or Kubernetes could take for something else.
ODD = {
    "PROMPT": "quo\"ted 'both'\n  $(touch x) `touch y` $HOME $$ $$(X) ${A} \\\n\ttab, -n --help # no comment",
    "LEARNING_RATE": "2e-4", "LOSS_ON": "no", "SYSTEM": "ünï \U0001f600 {brace} %s: 1",
    "STOP": "\n", "DATASET": "a,b=1 c",
}  # fmt: skip


def order(target: str, **asked: Any) -> Order:
    """An order of this service with what the test is about."""
    usual: dict[str, Any] = {
        "preset": "llama2-7b", "run": "llama2-7b", "stage": "chain", "image": IMAGE,
        "volume": VOLUMES[target], "gpu": GPUS.get(target), "secret": SECRETS.get(target),
        "role": "arn:aws:iam::1:role/r",
    }  # fmt: skip
    return Order(**usual | asked)


def spec(target: str, **asked: Any) -> str:
    return rendered(target, order(target, **asked))


def loaded(target: str, text: str) -> Any:
    return json.loads(text) if TARGETS[target].file.endswith("json") else yaml.safe_load(text)


def _expanded(value: str, known: dict[str, str]) -> str:
    """As Kubernetes expands `$(NAME)` in a value, and takes `$$` for a dollar."""
    return re.sub(
        r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else known.get(m[1], m[0]), value
    )


def variables(target: str, text: str, folder: Path) -> dict[str, str]:
    """The settings as the container gets them: by the service's own rules, or by running the script."""
    if target in ("docker", "slurm"):
        return _run(target, text, folder)
    found = loaded(target, text)
    if target == "kubernetes":
        (container,) = found["spec"]["template"]["spec"]["containers"]
        known: dict[str, str] = {}
        for entry in container["env"]:
            known[entry["name"]] = _expanded(entry["value"], known)
        return known
    if target == "skypilot":
        return dict(found["envs"])
    if target == "aws-batch":
        return {e["name"]: e["value"] for e in found["containerProperties"]["environment"]}
    task = found["taskGroups"][0]["taskSpec"]
    return dict(task["runnables"][0]["environment"]["variables"])


STAND_IN = """\
#!/usr/bin/env python3
import json, os, sys
folder, name = os.environ["STAND_IN"], os.path.basename(sys.argv[0])
with open(f"{folder}/{name}.jsonl", "a") as file:
    file.write(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}) + "\\n")
codes = open(f"{folder}/codes").read().split() if os.path.exists(f"{folder}/codes") else []
if name == "srun" and "--help" not in sys.argv[1:] or name == "docker":
    if codes:
        open(f"{folder}/codes", "w").write(" ".join(codes[1:]))
        sys.exit(int(codes[0]))
"""


def run_script(text: str, folder: Path, codes: str = "") -> tuple[int, dict[str, list[Any]]]:
    """Run a script where docker, srun and scontrol only note what they are given; its exit code, and that."""
    folder.mkdir(exist_ok=True)
    (folder / "codes").write_text(codes)
    for name in ("docker", "srun", "scontrol"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    surroundings = {
        "PATH": f"{folder}:{os.environ['PATH']}", "STAND_IN": str(folder), "PAUSE": "0", "SLURM_JOB_ID": "7",
        "TMPDIR": str(folder),
    }  # fmt: skip
    shell = text.splitlines()[0].removeprefix("#!")
    done = subprocess.run(
        [shell, "-c", text], env=surroundings, cwd=folder, check=False, timeout=60
    )
    calls = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }
    return done.returncode, calls


def _run(target: str, text: str, folder: Path) -> dict[str, str]:
    if target == "docker":
        _, calls = run_script(text, folder)
        (call,) = calls["docker"]
        named = [
            v
            for w, v in zip(call["arguments"], call["arguments"][1:], strict=False)
            if w == "--env"
        ]
        return {n: v for n, v in call["environment"].items() if n in named}
    _, calls = run_script(text, folder)
    found = calls["srun"][-1]["environment"]
    prefix = "APPTAINERENV_"
    return {n.removeprefix(prefix): v for n, v in found.items() if n.startswith(prefix) and v}
