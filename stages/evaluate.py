"""evaluate: is the tuned model better than its base, and does it stop?

Reads `adapter/` and `data/` in the run directory, and the base model.
Writes `evaluation/`: `evaluation.json`, and the same as `evaluation.md`.
"""

import click

from stages.lib.run import options
from stages.lib.run.rundir import Run, run_options
from stages.lib.run.settings import Stage, setting
from stages.lib.run.values import Number


@click.command("evaluate", cls=Stage)
@setting("--prompt", "PROMPT", help="A question of your own, answered before the held-out ones.")
@setting(
    "--evaluation-prompts", "EVALUATION_PROMPTS", type=Number(int, low=0, high=64), default=8,
    help="Held-out questions that base and tuned model answer.",
)  # fmt: skip
@options.max_new_tokens(128)
@run_options
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    prompt: str | None,
    evaluation_prompts: int,
    max_new_tokens: int,
    **run_settings: object,
) -> None:
    """Compare base and tuned model on held-out data."""
    from stages.lib.data import conversation, prepared
    from stages.lib.model.base import Base
    from stages.lib.report import comparison
    from stages.lib.run.exits import Missing

    run = Run(ctx)
    made, data = run.read("adapter", deep=True), run.read("data")
    run.check_made_from(made, "data", data.digest)
    if not (data.metrics["rows_held_out"] or prompt):
        raise Missing(
            f"{data.path} holds nothing out: set VALIDATION_FRACTION, run `prepare-data` and `train`"
        )
    base = Base.recorded(made.manifest["inputs"]["base"])
    inputs = {"adapter": made.digest, "data": data.digest, "base": base.reference()}
    if run.finished("evaluation", inputs):
        return
    with run.work() as scratch:
        base.fetch()
        inputs["base"] = base.identity()

        from stages.lib.data.formats import Format
        from stages.lib.data.tokens import Tokens
        from stages.lib.model import adapter, health, load, measure

        adapter.check_base(made, base)
        tokens = Tokens(base.folder)
        chat_format = Format.load(made.path, tokens)
        questions = prepared.prompts(data.path)[:evaluation_prompts]
        if prompt:
            asked = conversation.ask(prompt)
            own = {"question": prompt, "prompt": chat_format.prompt_text(asked), "reference": None}
            questions = [own | asked.dumps(), *questions]
        for question in questions:
            question["ids"] = chat_format.prompt(conversation.loads(question))
            base.check_room(len(question["ids"]), max_new_tokens)
        precision = made.manifest["metrics"]["base_precision"]
        tuned = adapter.load(load.load(base, precision), made.path, base)
        held_out = prepared.Part(data.path / "held_out.arrow")
        probe = questions[0]["ids"] if questions else held_out[0][0]
        first = made.metrics.get("health", {}).get("first_gradients")
        alive = health.check(tuned, made.path, probe, precision, first)
        result = measure.compare(
            tuned,
            tokens,
            precision,
            held_out,
            made.metrics["bin_tokens"],
            questions,
            chat_format.stops,
            max_new_tokens,
        )
        comparison.write(result, scratch)
        metrics = {side: result[side] for side in ("base", "tuned")} | {"health": alive}
        run.publish("evaluation", scratch, inputs, metrics, device=load.describe_device())
    click.echo(comparison.table_of(result))
