"""A script for sbatch: the image by pyxis or apptainer, whichever is there; requeued where that is worth it."""

import math
import re
import shlex

from stages.lib.jobs import docker, rules, text
from stages.lib.jobs.order import (
    ATTEMPTS,
    CACHE,
    CPUS,
    MARGIN,
    MEMORY_GIB,
    RETRIED,
    RUNS,
    Facts,
    Order,
)
from stages.lib.run.environment import SECRETS

SCRIPT = """\
#!/bin/bash
{directives}

{exports}
{secrets}
variables=({names})
volume={volume}
image={image}
arguments=({arguments})

cache=$(mktemp -u "${{SLURM_TMPDIR:-${{TMPDIR:-/tmp}}}}/lora-stages.XXXXXX")
trap : TERM  # what ends the step may be told to this script too, which still has to requeue
mkdir -p "$volume"
{each}mkdir -p -m 700 "$cache"
mounts=$volume:{runs},$cache:{cache}

if srun --help | grep -q container-image; then
  registry=${{image%%/*}}
  srun{wait} --container-image="$registry#${{image#*/}}" --container-mounts="$mounts" \\
    --container-env="$(IFS=,; echo "${{variables[*]}}")" --container-workdir=/opt/lora-stages \\
    --no-container-mount-home --no-container-entrypoint --container-readonly \\
    tini -g -- python -m stages "${{arguments[@]}}"
  code=$?
else
  for name in "${{variables[@]}}"; do export "APPTAINERENV_$name=${{!name-}}"; done
  srun{wait} bash -c 'for name in {told}; do
    export "APPTAINERENV_$name=${{!name-}}"; done; exec apptainer run "$@"' step \\
    --nv --containall --no-home --pwd /opt/lora-stages --bind "$mounts" \\
    "docker://$image" "${{arguments[@]}}"
  code=$?
fi

{each}rm -rf "$cache"
case $code in
  {codes})
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {attempts} ]; then
      scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi ;;
esac
exit "$code"
"""
# Where a host stands among several, which each is told for itself; apptainer hands nothing on.
TOLD = ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST")
# Two jobs on one machine must not meet at one port.
PORT = "export MASTER_PORT=$((20000+SLURM_JOB_ID%10000))"
WAIT = 120  # seconds that the others may take when one host has ended; they do within a minute
KNOWN = (
    "job-name", "output", "open-mode", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "gres", "requeue",
    "signal", "time", "partition", "account", "qos", "constraint", "exclusive", "nodelist", "exclude",
    "reservation",
)  # fmt: skip


def render(order: Order) -> str:
    """The script."""
    variables = order.environment(shared_cache=True)
    several = order.hosts > 1
    secrets = f"set -a; . {shlex.quote(order.secret)}; set +a" if order.secret else ""
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(order)),
        exports="\n".join([*text.exports(variables), *([PORT] if several else [])]),
        secrets=secrets,
        names=" ".join([*variables, *(["MASTER_PORT"] if several else []), *SECRETS]),
        each="srun " if several else "",
        wait=f" --wait={WAIT}" if several else "",
        told=" ".join(TOLD),
        volume=shlex.quote(order.volume),
        image=shlex.quote(order.image),
        arguments=shlex.join(order.arguments),
        runs=RUNS,
        cache=CACHE,
        codes="|".join(map(str, RETRIED)),
        attempts=ATTEMPTS - 1,
    )


def _directives(order: Order) -> list[str]:
    kind = f"{order.gpu}:" if order.gpu else ""
    found = [
        f"job-name={order.name}",
        f"output={order.name}-%j.log",
        "open-mode=append",
        f"nodes={order.hosts}",
        "ntasks-per-node=1",
        f"cpus-per-task={CPUS * order.gpus}",
        f"mem={MEMORY_GIB * order.gpus}G",
        f"gres=gpu:{kind}{order.gpus}",
        "requeue",
        f"signal=TERM@{order.wait}",
    ]
    if order.runtime:
        found.append(f"time={math.ceil((order.runtime + MARGIN) / 60)}")
    return found + ([f"partition={order.queue}"] if order.queue else [])


def broken(script: str) -> list[str]:
    """What is wrong with the script."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M)
    said = dict(found)
    unknown = sorted(set(said) - set(KNOWN))
    sentences = [f"#SBATCH --{name} is none of the options known here" for name in unknown]
    if "requeue" not in said:
        sentences.append("without --requeue a preempted job is gone")
    if said.get("open-mode") != "append":
        sentences.append("without --open-mode=append a requeued job overwrites its own log")
    if "scontrol requeue" not in script:
        sentences.append("nothing requeues the job after an exit code that is worth it")
    if said.get("ntasks-per-node") != "1":
        sentences.append("a host's GPUs are shared out by its one task: --ntasks-per-node=1")
    if said.get("nodes") != "1" and script.count("srun mkdir") != 1:
        sentences.append("only the first of several hosts has the folder of $cache")
    signal = re.fullmatch(r"TERM@(\d+)", said.get("signal", ""))
    if not signal:
        sentences.append("without --signal=TERM@SECONDS nothing is told before the time is over")
    variables = text.exported(text.words(script))
    handed = _array(script, "variables")
    sentences += [
        f"{name} is exported and does not reach the container"
        for name in variables
        if name not in handed
    ]
    gpus = re.search(r"(\d+)$", said.get("gres", ""))
    mounts = re.search(r"^mounts=(.*)$", script, re.M)
    facts = Facts(
        image=(text.words(script[script.find("\nimage=") :].split("\n")[1]) or [""])[0].partition(
            "="
        )[2],
        arguments=_array(script, "arguments"),
        variables=variables,
        mounts=[part.partition(":")[2] for part in mounts[1].split(",")] if mounts else [],
        gpus=int(gpus[1]) if gpus else 0,
        wait=int(signal[1]) if signal else 0,
        retried=text.codes_of(script),
    )
    return sentences + rules.broken(facts)


def _array(script: str, name: str) -> list[str]:
    found = re.search(rf"^{name}=\((.*)\)$", script, re.M)
    return shlex.split(found[1]) if found else []


validate = docker.validate
