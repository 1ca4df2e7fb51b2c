"""What every spec must hold, whatever the service: what their own models do not know."""

import re

from stages.lib.jobs.order import CHAIN, GUARANTEED, RETRIED, RUNS, Facts
from stages.lib.run.environment import SECRETS

COMMANDS = (*CHAIN, "chain", "doctor", "fetch", "generate", "export", "push")


def broken(facts: Facts, pulled: bool = True) -> list[str]:
    """What is wrong with a job, a sentence each; `pulled`: its machine has to fetch the image."""
    found = []
    if pulled and "/" not in facts.image:
        found.append(f"image {facts.image!r} names no registry, so no machine can pull it")
    if len(facts.arguments) < 3 or facts.arguments[0] != "--env-file":
        found.append(f"the arguments {facts.arguments} are not --env-file PRESET COMMAND")
    elif facts.arguments[2] not in COMMANDS:
        found.append(f"{facts.arguments[2]!r} is none of {', '.join(COMMANDS)}")
    if sorted(facts.retried) != list(RETRIED):
        found.append(f"exit codes {facts.retried} are retried, not {', '.join(map(str, RETRIED))}")
    return found + _surroundings(facts)


def _surroundings(facts: Facts) -> list[str]:
    given = facts.variables
    found = [f"the variable {name} is missing" for name in GUARANTEED if not given.get(name)]
    found += [
        f"{name} stands in the spec; give it as a secret" for name in SECRETS if name in given
    ]
    found += [
        f"the value of {name} is no text" for name in given if not isinstance(given[name], str)
    ]
    if found:
        return found
    if RUNS not in facts.mounts or not given["RUN_DIR"].startswith(f"{RUNS}/"):
        found.append(f"RUN_DIR {given['RUN_DIR']} is not on the volume, which belongs at {RUNS}")
    if given["SCRATCH_DIR"] not in facts.mounts:
        found.append(f"SCRATCH_DIR {given['SCRATCH_DIR']} is no mount, and all else is read-only")
    if str(facts.gpus) != given["NUM_GPUS"] or facts.gpus < 1:
        found.append(f"{facts.gpus} GPUs are asked for, NUM_GPUS is {given['NUM_GPUS']}")
    if not re.fullmatch(r"\d+(\.\d+)?", given["GRACE_SECONDS"]):
        found.append(f"GRACE_SECONDS {given['GRACE_SECONDS']!r} is no number")
    elif float(given["GRACE_SECONDS"]) >= facts.wait:
        found.append(
            f"the job is killed {facts.wait} seconds after its signal, which GRACE_SECONDS "
            f"{given['GRACE_SECONDS']} must stay below"
        )
    return found
