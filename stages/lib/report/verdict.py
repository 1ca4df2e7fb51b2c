"""How a run stands, in a word and in a sentence: what somebody wants to know first."""

from dataclasses import dataclass
from typing import Any

from stages.lib.report.found import Found
from stages.lib.run import endings
from stages.lib.run.rundir import MADE_BY

CHAIN = ("data", "adapter", "evaluation")  # without which a run is not over


@dataclass(frozen=True)
class Verdict:
    """What a page begins with.

    Attributes:
        state: done, going on, perhaps (held where this machine cannot see it), stopped, failed, unfinished or
            empty. kind: its colour: `good`, `bad` or
            `open`. sentences: the verdict is the first.
    """

    state: str
    kind: str
    sentences: list[str]


def verdict(found: Found) -> Verdict:
    """What is said of a run first."""
    results = _results(found)
    for state, kind, said in (_at_work(found), _failed(found), _killed(found)):
        if said:
            return Verdict(state, kind, [said, *results])
    missing = [name for name in CHAIN if name not in found.artifacts]
    if not missing:
        kind = {"better": "good", "worse": "bad"}.get((found.evaluation or {})["verdict"], "open")
        return Verdict("done", "open" if beware(found) else kind, results)
    if found.empty:
        return Verdict("empty", "open", ["Nothing was made here yet."])
    next_one = f"Next is `{MADE_BY[missing[0]]}`."
    lead = results or [_progress(found) or f"There is {_listed(found)}, and no {missing[0]} yet."]
    return Verdict("unfinished", "open", [*lead, next_one])


def _at_work(found: Found) -> tuple[str, str, str]:
    holder = found.holder
    if not holder:
        return "", "", ""
    said = f"`{holder.stage}` is at work, {holder.process}"
    state = "going on" if holder.alive else "perhaps"
    if not holder.alive:
        said += ", if that machine is still there"
    done, total = (found.beat.get(key) for key in ("done", "total"))
    if isinstance(done, (int, float)) and isinstance(total, (int, float)):
        said += f": {done:,.0f} of {total:,.0f} {found.beat.get('unit')}"
    if not _trained(found) and (progress := _progress(found)):
        said += f". {progress}"
    return state, "open", said.rstrip(".") + "."


def _failed(found: Found) -> tuple[str, str, str]:
    error = found.error or {}
    made = {MADE_BY[name] for name in found.artifacts}
    # An option that was refused does not undo what is there.
    if not error or (error.get("attempt") is None and error.get("stage") in made):
        return "", "", ""
    again = bool(error.get("retryable"))
    what = "stopped" if again else "failed"
    said = f"`{error.get('stage')}` {what} with exit {error.get('exit')} ({error.get('code')}): "
    said += str(error.get("message", "")).rstrip(".") + "."
    hint = error.get("hint", "-")
    if hint != "-" and "same command goes on" not in said:
        said += f" What to do: {hint}."
    if not _trained(found) and (progress := _progress(found)):
        said += f" {progress}"
    return what, "open" if again else "bad", said


def _killed(found: Found) -> tuple[str, str, str]:
    """An attempt that left no end, or of which only the next one could say that it was killed."""
    last = found.attempts[-1] if found.attempts else {}
    if not last or last["end"] not in (None, endings.ending("killed").code):
        return "", "", ""
    told = last["said"] or "left no word of its end: it was killed, or its machine is gone"
    said = f"Attempt {last['number']}, `{last['stage']}`, {told}. The same command goes on."
    return "stopped", "open", f"{said} {_progress(found)}".strip()


def _trained(found: Found) -> bool:
    return "adapter" in found.artifacts


def _progress(found: Found) -> str:
    """How far training is, and what its losses are."""
    training = found.training
    if not training:
        return ""
    said = f"Step {training['step']:,} of {training['steps']:,} is safe"
    if _trained(found):
        said = f"All {training['steps']:,} steps are trained"
    for key, word in (("loss", "loss"), ("held_out_loss", "held-out loss")):
        value = next(
            (e[key] for e in reversed(training["history"]) if e.get(key) is not None), None
        )
        said += f", {word} {value:.3f}" if value is not None else ""
    return f"{said}."


def _results(found: Found) -> list[str]:
    """What was measured: the evaluation, its gate, the merge."""
    said = []
    if found.evaluation:
        said.append(found.evaluation["sentence"])
        if gate := found.evaluation.get("gate"):
            said.append(f"The gate {gate['asked']} is {'met' if gate['met'] else 'not met'}.")
    elif _trained(found):
        said.append(f"{_progress(found)} Base and tuned model were not compared.")
    if fold := found.metrics("merged"):
        said.append(
            f"The merged model passed its check: {fold['fold_kl']:.2g} nats a token from base plus adapter by "
            f"folding, {fold['mean_kl']:.2g} from what was trained."
        )
    return said + beware(found)


def beware(found: Found) -> list[str]:
    """What is there and not to be relied on."""
    said = [f"Beware: {name} is stale, {why}." for name, why in found.stale.items()]
    return said + [f"Beware: {why}." for why in found.broken.values()]


def _listed(found: Found) -> str:
    return ", ".join(found.artifacts) or "nothing whole"


def _time(stamp: Any) -> str:
    """A record's time as people read it."""
    return str(stamp).replace("T", " ").replace("Z", " UTC")
