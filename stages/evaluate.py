"""evaluate: is the tuned model better than its base, and does it stop?

Reads `adapter/` and `data/` in the run directory, and the base model; for BENCHMARKS their data, from the hub
or local files. With JUDGE_URL, questions and answers go to that address, and to no other.
Writes `evaluation/`: `evaluation.json`, and the same as `evaluation.md`.
"""

import click

from stages.lib.data import wanted
from stages.lib.run import options
from stages.lib.run.rundir import Run, run_options
from stages.lib.run.settings import Stage, setting
from stages.lib.run.values import Names, Number


@click.command("evaluate", cls=Stage)
@setting("--prompt", "PROMPT", help="A question of your own, answered before the held-out ones.")
@setting(
    "--evaluation-prompts", "EVALUATION_PROMPTS", type=Number(int, low=0, high=64), default=8,
    help="Held-out questions that base and tuned model answer.",
)  # fmt: skip
@options.max_new_tokens(128)
@setting(
    "--benchmarks", "BENCHMARKS", type=Names(),
    help="Tasks of EleutherAI's harness (lm-eval) for both models: its names, or task files and folders of "
    "your own, with commas between them. Python that a task file names is run.",
)  # fmt: skip
@setting(
    "--benchmark-limit", "BENCHMARK_LIMIT", type=Number(int, low=1),
    help="Only the first documents of each task. [default: all]",
)  # fmt: skip
@setting(
    "--benchmark-chat", "BENCHMARK_CHAT", is_flag=True,
    help="Put the tasks as conversations, in the chat format of the training data.",
)  # fmt: skip
@setting(
    "--judge-url", "JUDGE_URL", shown=wanted.plain,
    help="OpenAI-compatible endpoint, https://HOST/v1, whose model compares the answers. Questions, references "
    "and answers go there. Its key is JUDGE_API_KEY, in the environment or env/secrets.env.",
)  # fmt: skip
@setting("--judge-model", "JUDGE_MODEL", help="The judge's name at that endpoint.")
@run_options
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    prompt: str | None,
    evaluation_prompts: int,
    max_new_tokens: int,
    benchmarks: tuple[str, ...] | None,
    benchmark_limit: int | None,
    benchmark_chat: bool,
    judge_url: str | None,
    judge_model: str | None,
    **run_settings: object,
) -> None:
    """Compare base and tuned model on held-out data."""
    from stages.lib.data import conversation, prepared
    from stages.lib.model import tasks
    from stages.lib.model.base import Base
    from stages.lib.report import comparison, judge, scores
    from stages.lib.run.exits import Missing

    judge.check_settings(judge_url, judge_model, bool(evaluation_prompts or prompt))
    run = Run(ctx)
    made, data = run.read("adapter", deep=True), run.read("data")
    run.check_made_from(made, "data", data.digest)
    if not (data.metrics["rows_held_out"] or prompt or benchmarks):
        raise Missing(
            f"{data.path} holds nothing out: set VALIDATION_FRACTION, run `prepare-data` and `train`"
        )
    base = Base.recorded(made.manifest["inputs"]["base"])
    inputs = {"adapter": made.digest, "data": data.digest, "base": base.reference()}
    if benchmarks and (local := tasks.digest(benchmarks)):
        inputs["benchmarks"] = local
    if run.finished("evaluation", inputs):
        return
    with run.work() as scratch:
        umpire = judge.appoint(judge_url, judge_model)
        found = tasks.prepare(benchmarks) if benchmarks else None
        base.fetch()
        inputs["base"] = base.identity()

        from stages.lib.data.formats import Format
        from stages.lib.data.tokens import Tokens
        from stages.lib.model import adapter, load, measure
        from stages.lib.model import benchmarks as scored

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
        if umpire:
            result["judge"] = judge.ask(umpire, result["answers"])
        if found:
            chat = tasks.Chat(chat_format.continued, chat_format.stops) if benchmark_chat else None
            result["benchmarks"] = scored.run(
                tuned, tokens, precision, found, benchmark_limit, chat
            )
        comparison.write(result, scratch)
        scores.write(result, scratch)
        metrics = {side: result[side] for side in ("base", "tuned")}
        run.publish("evaluation", scratch, inputs, metrics, device=load.describe_device())
    click.echo("\n".join([comparison.table_of(result), *scores.tables(result)]))
