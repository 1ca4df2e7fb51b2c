"""evaluate: is the tuned model better than its base, and does it talk right?

Reads `adapter/` and `data/` in the run directory, and the base model; for BENCHMARKS their data, from the hub
or local files. With JUDGE_URL, questions and answers go to that address, and to no other.
Writes `evaluation/`: `evaluation.json`, and the same to read as `evaluation.md` and `evaluation.html`. It ends
with 82 where `GATE` asks for more than was measured.
"""

import click

from stages.lib.data import wanted
from stages.lib.report import gate as gates
from stages.lib.run import gpu, options
from stages.lib.run.artifact import Artifact
from stages.lib.run.options import run_options
from stages.lib.run.rundir import Run
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
    "--gate", "GATE", type=gates.Gate(), identity=False,
    help="What must be reached, else exit 82: `better`, or bounds such as `loss<2,stop_rate>=0.9`.",
)  # fmt: skip
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
@options.seed
@options.expect_gpu
@run_options
@click.pass_context
def evaluate(
    ctx: click.Context, /, prompt: str | None, evaluation_prompts: int, max_new_tokens: int,
    gate: str | None, benchmarks: tuple[str, ...] | None, benchmark_limit: int | None,
    benchmark_chat: bool, judge_url: str | None, judge_model: str | None, seed: int,
    expect_gpu: bool, **run_settings: object,
) -> None:  # fmt: skip
    """Compare base and tuned model on held-out data."""
    from stages.lib.data import prepared
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
    asks = bool(prompt or prepared.prompts(data.path)[:evaluation_prompts])
    gates.check_measured(gate, bool(data.metrics["rows_held_out"]), asks)
    base = Base.recorded(made.manifest["inputs"]["base"])
    inputs = {"adapter": made.digest, "data": data.digest, "base": base.reference()}
    if benchmarks and (local := tasks.digest(benchmarks)):
        inputs["benchmarks"] = local
    if found := run.finished("evaluation", inputs):
        judge_again(run, found, gate)
        return
    gpu.require(made.metrics["base_precision"], expect_gpu)
    with run.work() as scratch:
        umpire = judge.appoint(judge_url, judge_model)
        chosen = tasks.prepare(benchmarks) if benchmarks else None
        base.fetch(verify=run.deep)
        inputs["base"] = base.identity()

        from stages.lib.data.formats import Format
        from stages.lib.data.tokens import Tokens
        from stages.lib.model import adapter, answer, health, load, measure
        from stages.lib.model import benchmarks as harness
        from stages.lib.model.sampling import Sampling

        adapter.check_base(made, base)
        tokens = Tokens(base.folder)
        chat_format = Format.load(made.path, tokens)
        questions = prepared.questions(data.path, evaluation_prompts, prompt, chat_format)
        prompts = [question["ids"] for question in questions]
        base.check_room(max(map(len, prompts), default=0), max_new_tokens)
        precision = made.metrics["base_precision"]
        tuned = adapter.load(load.load(base, precision), made.path, base)
        golden = chat_format.recorded()["golden"]["ids"]
        first = made.metrics.get("health", {}).get("first_gradients")
        alive = health.check(tuned, made.path, golden, precision, first)
        rows = prepared.Part(data.path / "held_out.arrow")
        lengths = [data.metrics["length_quantiles"][share] for share in ("0", "1")]
        speaker = answer.Speaker(
            tuned, precision, tokens, chat_format.stops, max_new_tokens, Sampling(seed=seed)
        )
        names = [source["name"] for source in data.metrics["sources"]]
        made_of = run.made_of(inputs, {"train": made, "prepare-data": data})
        device = load.describe_device()
        with run.parts("evaluation", inputs, device) as parts:
            sums = measure.held_out(
                tuned, precision, rows, lengths, made.metrics["bin_tokens"], parts.of
            )
            said = measure.spoken(speaker, prompts, parts.of)
            held_out = comparison.Conversations(sums, rows.numbers, rows.lengths, rows.sources)
            result = comparison.compare(
                held_out, names, questions, said, chat_format.marks(), seed, made_of
            ) | {"health": alive}
            if umpire:
                result["judge"] = judge.ask(umpire, result["answers"], parts.of)
            if chosen:
                chat = (
                    tasks.Chat(chat_format.continued, chat_format.stops) if benchmark_chat else None
                )
                result["benchmarks"] = harness.run(
                    tuned, tokens, precision, chosen, benchmark_limit, chat, parts.of
                )
            result["gate"] = gates.judge(result, gate)
            comparison.write(result, scratch)
            metrics = comparison.metrics(result)
            run.publish("evaluation", scratch, inputs, metrics, device=device)
    click.echo(
        "\n".join([comparison.table_of(result), *scores.tables(result), "", result["sentence"]])
    )
    gates.enforce(result)


def judge_again(run: Run, found: Artifact, gate: str | None) -> None:
    """A finished evaluation against the gate of this command; what it measured is not measured anew."""
    from stages.lib.report import comparison

    result = comparison.read(found.path)
    verdict = gates.judge(result, gate)
    if verdict != result["gate"]:
        result["gate"] = verdict
        with run.work() as scratch:
            comparison.write(result, scratch)
            run.revise(found, scratch, gate=verdict)
    click.echo(result["sentence"])
    gates.enforce(result)
