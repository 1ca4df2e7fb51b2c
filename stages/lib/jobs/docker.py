"""A script for a machine with Docker and GPUs: the container, again and again until it ends for good."""

import shlex
import subprocess

from stages.lib.jobs import rules, text
from stages.lib.jobs.order import ATTEMPTS, CACHE, RETRIED, RUNS, SHARED_MEMORY_GIB, Facts, Order
from stages.lib.run.environment import SECRETS

SCRIPT = """\
#!/bin/sh
# {name}: run it on the machine itself, as with `nohup sh job.sh &`. TERM ends it with the state safe.
{exports}

mkdir -p {volume}
stopped=
trap 'stopped=yes; kill -TERM "$child" 2>/dev/null' TERM INT
attempt=1
while :; do
  {command} &
  child=$!
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  [ -z "$stopped" ] && [ "$attempt" -lt {attempts} ] || exit "$code"
  case $code in
    {codes}) attempt=$((attempt + 1)); sleep "${{PAUSE:-10}}" ;;
    *) exit "$code" ;;
  esac
done
"""


def render(order: Order) -> str:
    """The script."""
    variables = order.environment(shared_cache=True)
    return SCRIPT.format(
        name=order.name,
        exports="\n".join(text.exports(variables)),
        volume=shlex.quote(order.volume),
        command=text.command(run(order, variables, shlex.quote(order.volume)), "  "),
        attempts=ATTEMPTS,
        codes="|".join(map(str, RETRIED)),
    )


def run(order: Order, variables: dict[str, str], volume: str) -> list[str]:
    """`docker run` in words, quoted; variables and secrets come from the shell."""
    secrets = [f"--env-file {shlex.quote(order.secret)}"] if order.secret else []
    secrets = secrets or [f"--env {name}" for name in SECRETS]
    return [
        "docker run --rm --init=false",
        f"--name {order.name}",
        f"--gpus {order.gpus}",
        '--user "$(id -u):0"',
        "--read-only --cap-drop=ALL --security-opt no-new-privileges",
        f"--tmpfs /tmp:exec --shm-size {SHARED_MEMORY_GIB}g",
        f"--stop-timeout {order.wait}",
        f"-v {volume}:{RUNS}",
        f"-v {CACHE}",
        *(f"--env {name}" for name in variables),
        *secrets,
        shlex.quote(order.image),
        shlex.join(order.arguments),
    ]


def broken(script: str) -> list[str]:
    """What is wrong with the script."""
    return rules.broken(facts(script, text.exported(text.words(script))), pulled=False) + held(
        script
    )


def held(script: str) -> list[str]:
    """What is wrong with its `docker run`, beside what every job must hold."""
    found = text.words(script)
    named = text.after(found, "--env")
    lost = [name for name in text.exported(found) if name not in named]
    sentences = [f"{name} is exported and does not reach the container" for name in lost]
    if "--restart" in script:
        sentences.append("--restart runs it again after every exit code")
    if "--rm" not in found:
        sentences.append("without --rm the second attempt finds the name taken")
    return sentences


def facts(script: str, variables: dict[str, str]) -> Facts:
    """What the `docker run` of a script says."""
    found = text.words(script)
    found = found[found.index("run", found.index("docker")) :]
    at = found.index("--env-file", found.index("-v")) if "--env-file" in found else len(found)
    *_, at = [n for n, word in enumerate(found) if word == "--env-file"] or [at]
    gpus = text.after(found, "--gpus")
    return Facts(
        image=found[at - 1],
        arguments=found[at : at + 3],
        variables=variables,
        mounts=[value.split(":")[-1] for value in text.after(found, "-v")],
        gpus=int(gpus[0]) if gpus else 0,
        wait=int((text.after(found, "--stop-timeout") or ["10"])[0]),
        retried=text.codes_of(script),
    )


def validate(script: str) -> str:
    """Have a shell read it; the name of what did.

    Raises:
        ValueError: it cannot.
    """
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(" ".join(done.stderr.split()))
    return "bash -n"
