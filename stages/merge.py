"""merge: the adapter folded into its base, a model that stands alone.

Reads `adapter/` in the run directory or those that MERGE_ADAPTERS names, what lies beside it (held-out rows and
questions of `data/`, `evaluation/`), and the base model.
Writes `merged/`: a model folder that plain transformers loads, once it says what base plus adapter says, with a
card, and with `merge_report.json` on how close it is.
"""

import json
from typing import TYPE_CHECKING, Any

import click

from stages.lib.run import gpu, options
from stages.lib.run.options import run_options
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, setting
from stages.lib.run.values import Names, Number
from stages.lib.run.versions import versions

if TYPE_CHECKING:
    from stages.lib.data.formats import Format
    from stages.lib.data.tokens import Tokens
    from stages.lib.model.adapter_files import Part
    from stages.lib.model.base import Base
    from stages.lib.run.artifact import Artifact

ROWS, TOKENS = 8, 128  # of held-out text, on which the result is compared
QUESTIONS, LONGEST = 4, 256  # held out, that both answer, and the most tokens of a prompt


@click.command("merge", cls=Stage)
@setting(
    "--merge-base", "MERGE_BASE", type=click.Choice(["original", "dequantized"]), default="original",
    help="The base's weights: as published, or as a 4-bit or 8-bit run had them.",
)  # fmt: skip
@setting(
    "--merge-most-kl", "MERGE_MOST_KL", type=Number(above=0), default=0.5,
    help="How far the result may be from base plus adapter as trained, in nats a token; else exit 82.",
)  # fmt: skip
@setting(
    "--merge-adapters", "MERGE_ADAPTERS", type=Names(),
    help="Adapters to add up instead of the run's own: run directories, each with its weight, as in "
    "`runs/a,runs/b=0.5`.",
)  # fmt: skip
@options.expect_gpu
@run_options
@click.pass_context
def merge(
    ctx: click.Context, /, merge_base: str, merge_most_kl: float,
    merge_adapters: tuple[str, ...] | None, expect_gpu: bool, **run_settings: object,
) -> None:  # fmt: skip
    """Fold the adapter into its base and prove that nothing changed."""
    from stages.lib.model import adapter_files
    from stages.lib.model.base import Base
    from stages.lib.report import card
    from stages.lib.report.table import table

    run = Run(ctx)
    parts = adapter_files.listed(merge_adapters or ())
    parts = parts or [adapter_files.Part(run.read("adapter", deep=True))]
    made = parts[0].made
    base = Base.recorded(made.manifest["inputs"]["base"])
    inputs: dict[str, object] = {"adapter": made.digest, "base": base.reference()}
    if merge_adapters:
        inputs["adapters"] = [part.made.digest for part in parts]
    if run.finished("merged", inputs):
        return
    gpu.require(None, expect_gpu)
    with run.work() as scratch:
        base.fetch(verify=run.deep)
        inputs["base"] = base.identity()

        from stages.lib.data.tokens import Tokens
        from stages.lib.model import combining, load, merging

        tokens = Tokens(base.folder)
        chat_format = _format(parts, base, tokens)
        data = _beside(made, "data", made.manifest["inputs"]["data"])
        rows, prompts = _texts(data, chat_format)
        chosen = [(part.made.path, part.weight) for part in parts]
        folded = combining.one(base, chosen, scratch / "adapters")
        job = merging.Merge(base, folded, made.metrics["base_precision"], merge_base, chosen)
        out = scratch / "merged"
        out.mkdir()
        with (
            run.parts("merged", inputs, load.describe_device()) as done,
            run.draft("merged", sum(job.sizes.values()), done) as draft,
        ):
            job.write(out, draft.move, draft.holds)
            of = f"of {draft.digest}"  # what is proven of these files holds for no others
            stops = chat_format.stops.ids
            report = {"weights": done.of(f"weights {of}", lambda: job.check(draft.path))}
            report |= done.of(f"texts {of}", lambda: job.prove(draft.path, rows, merge_most_kl))
            report["answers"] = done.of(
                f"answers {of}", lambda: job.answers(draft.path, prompts, stops, tokens.decode)
            )
            metrics = merging.summary(report)
            (out / merging.REPORT).write_text(json.dumps(report, indent=1) + "\n")
            merging.describe(job, chat_format.stops.ids, out)
            tokens.save(out, chat_format.source)
            about = _about(parts, base, chat_format) | {"merged": metrics}
            card.write(
                card.Made(**about, closer=f"MERGE_BASE was {merge_base}. {report['closer']}"), out
            )
            for path in [*sorted(out.iterdir()), *base.licence_files()]:
                draft.take(path)
            draft.finish(run.manifest(inputs, metrics))
    click.echo(table(("merge", "value"), list(metrics.items())))
    click.echo(report["closer"])


def _format(parts: "list[Part]", base: "Base", tokens: "Tokens") -> "Format":
    """The chat format of the first adapter; all of them were made for this base."""
    from stages.lib.data.formats import Format
    from stages.lib.model import adapter
    from stages.lib.run.progress import say

    found = []
    for part in parts:
        adapter.check_base(part.made, base)
        found.append(Format.load(part.made.path, tokens))
    for part, other in zip(parts, found, strict=True):
        if other.recorded()["golden"] != found[0].recorded()["golden"]:
            say(f"{part.made.path} was trained on another chat format than {parts[0].made.path}")
    return found[0]


def _about(parts: "list[Part]", base: "Base", chat_format: "Format") -> dict[str, Any]:
    """What the card is written from, but for the merge; see `card.Made`."""
    made = parts[0].made
    data = _beside(made, "data", made.manifest["inputs"]["data"])
    evaluation = _beside(made, "evaluation", made.digest)
    return {
        "base": base.about(), "prompts": chat_format.recorded(),
        "adapters": [(part.made.manifest, part.weight) for part in parts], "versions": versions(),
        "data": data.manifest if data else None,
        "evaluation": evaluation.manifest if evaluation else None,
    }  # fmt: skip


def _beside(made: "Artifact", name: str, belongs_to: str) -> "Artifact | None":
    """What lies beside an adapter, `data` that it was made from or its `evaluation`, if it belongs to it."""
    from stages.lib.run import artifact

    found = artifact.load(made.path.parent / name)
    if found is None:
        return None
    own = found.digest if name == "data" else found.manifest["inputs"]["adapter"]
    return found if own == belongs_to else None


def _texts(
    data: "Artifact | None", chat_format: "Format"
) -> tuple[list[list[int]], list[list[int]]]:
    """Held-out rows and prompts as ids; the golden prompt where nothing was held out."""
    from stages.lib.data import conversation, prepared

    golden = chat_format.recorded()["golden"]["ids"]
    if data is None:
        return [golden], [golden]
    rows = [ids[:TOKENS] for _, ids, _ in prepared.head(data.path, ROWS, "held_out")]
    asked = prepared.prompts(data.path)[:QUESTIONS]
    prompts = [chat_format.prompt(conversation.loads(question)) for question in asked]
    return rows or [golden], [ids for ids in prompts if len(ids) <= LONGEST] or [golden]
