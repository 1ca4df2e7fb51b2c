"""train: a LoRA adapter from prepared data.

Reads `data/` in the run directory and the base model.
Writes `checkpoints/step-*/` on the way, and `adapter/`: the adapter with the least held-out loss as plain peft
reads it, its tokenizer and prompt format, and the last adapter in `last/`; losses are in the manifest.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from stages.lib.run import options, tracking
from stages.lib.run.options import run_options
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, setting
from stages.lib.run.values import Number
from stages.lib.run.versions import versions


@click.command("train", cls=Stage)
@options.base_model
@options.base_revision
@options.base_precision
@options.rank
@setting(
    "--alpha",
    "LORA_ALPHA",
    type=Number(above=0),
    default=16,
    help="The adapter is scaled by alpha / rank.",
)
@setting(
    "--dropout",
    "LORA_DROPOUT",
    type=Number(low=0, high=0.99),
    default=0.05,
    help="On the adapter's input.",
)
@options.targets
@setting(
    "--init-adapter",
    "INIT_ADAPTER",
    type=click.Path(path_type=Path),
    help="Adapter folder to start from.",
)
@setting(
    "--learning-rate",
    "LEARNING_RATE",
    type=Number(above=0),
    default=2e-4,
    help="Peak learning rate.",
)
@setting(
    "--epochs",
    "EPOCHS",
    type=Number(above=0),
    default=1,
    help="Passes over the data; may be a fraction.",
)
@setting(
    "--max-steps", "MAX_STEPS", type=Number(int, low=1), help="Optimizer steps, instead of EPOCHS."
)
@setting(
    "--schedule", "SCHEDULE", type=click.Choice(["cosine", "linear", "constant"]), default="cosine",
    help="Learning rate after the warm-up.",
)  # fmt: skip
@setting(
    "--warmup", "WARMUP", type=Number(low=0, high=0.99), default=0.03, help="Share of the steps."
)
@setting(
    "--max-grad-norm",
    "MAX_GRAD_NORM",
    type=Number(above=0),
    default=1.0,
    help="Longer gradients are cut.",
)
@setting(
    "--weight-decay",
    "WEIGHT_DECAY",
    type=Number(low=0),
    default=0,
    help="Decoupled, on the adapter.",
)
@options.optimizer
@setting(
    "--batch-tokens", "BATCH_TOKENS", type=Number(int, low=1), default=16384, help="Tokens a step."
)
@setting(
    "--micro-batch-tokens", "MICRO_BATCH_TOKENS", type=Number(int, low=1),
    help="Tokens a forward pass; BATCH_TOKENS is a multiple. [default: the largest that fits]",
)  # fmt: skip
@setting(
    "--recompute", "RECOMPUTE", default="auto",
    type=click.Choice(["auto", "all", "none", "offload"]),
    help="Gradient checkpointing: activations computed again; offload has part of them in the host's memory "
    "instead; auto does what memory asks for.",
)  # fmt: skip
@options.seed
@setting(
    "--num-gpus", "NUM_GPUS", type=Number(int, low=1), default=1, identity=False,
    help="GPUs of this host that share each step's tokens; on the CPU, processes.",
)  # fmt: skip
@setting(
    "--tracker", "TRACKER", default="tensorboard", type=click.Choice(tracking.KINDS), identity=False,
    help="Where the curves go: event files in RUN_DIR, or another tracker, which has to be installed.",
)  # fmt: skip
@options.expect_gpu
@run_options
@click.pass_context
def train(
    ctx: click.Context, /, base_model: str, base_revision: str | None, base_precision: str, rank: int,
    alpha: float, dropout: float, targets: tuple[str, ...], init_adapter: Path | None, epochs: float,
    max_steps: int | None, batch_tokens: int, micro_batch_tokens: int | None, recompute: str, seed: int,
    num_gpus: int, tracker: str, expect_gpu: bool, **recipe: object,
) -> None:  # fmt: skip
    """Train a LoRA adapter on prepared data."""
    from stages.lib.data import bins, prepared, sources
    from stages.lib.model import adapter_files, storing
    from stages.lib.model.architecture import Setup
    from stages.lib.model.base import Base
    from stages.lib.report import card
    from stages.lib.report.table import table
    from stages.lib.run import checkpoints, gpu, preflight, several
    from stages.lib.run.artifact import sha256
    from stages.lib.run.checks import enforce

    run = Run(ctx)
    data = run.read("data")
    sources.check_unchanged(run, data)
    prepared_for = data.manifest["inputs"]["base"]
    pinned = prepared_for["revision"] if prepared_for["name"] == base_model else None
    base = Base(base_model, base_revision or pinned)
    inputs: dict[str, object] = {"data": data.digest, "base": base.reference()}
    if init_adapter:
        inputs["init_adapter"] = sha256(adapter_files.find(init_adapter) / adapter_files.WEIGHTS)
    if run.finished("adapter", inputs, replace=False):
        return
    gpu.require(base_precision, expect_gpu)
    tracking.check(tracker)
    if several.start(run, num_gpus):
        return

    from stages.lib.model.ranks import Ranks

    ranks = Ranks(ctx.obj.rank, ctx.obj.last_words)
    with several.work(run) as scratch:
        ranks.after_first(partial(base.fetch, weights=False))
        setup = Setup(base_precision, rank, targets, str(recipe["optimizer"]))
        enforce(preflight.room(storing.needs(run.folder, scratch, base.config, setup)))
        ranks.after_first(partial(base.fetch, verify=run.deep))
        inputs["base"] = base.identity()
        run.check_made_from(data, "base", base.identity())
        resumed = ranks.of_first(lambda: checkpoints.newest(run, inputs))
        names = [source["name"] for source in data.metrics["sources"]]
        rows, held_out = (prepared.Part(data.path / f"{p}.arrow", names) for p in prepared.PARTS)
        longest = int(rows.lengths.max())
        if not resumed:
            bins.check_sizes(batch_tokens, micro_batch_tokens, longest, ranks.count)

        import numpy as np

        from stages.lib.data.formats import Format
        from stages.lib.data.tokens import Tokens
        from stages.lib.model import (
            adapter,
            ceiling,
            health,
            history,
            load,
            memory,
            trackers,
            training,
        )
        from stages.lib.model.plan import Choice

        tokens = Tokens(base.folder)
        chat_format = Format.load(data.path, tokens)
        cuts = memory.sizes(batch_tokens, longest, micro_batch_tokens, ranks.count)
        if resumed:
            setup = replace(setup, precision=resumed.metrics["base_precision"])
        elif base_precision == "auto":
            config = load.config(base)
            found = ranks.of_first(lambda: memory.precision(config, setup, cuts, recompute))
            setup = replace(setup, precision=found)
        done = checkpoints.step(resumed) if resumed else None
        tracked = trackers.begin(run, tracker if ranks.first else "none", done)
        model = load.load(base, setup.precision)
        matmul = ceiling.highest(setup.precision)
        if init_adapter:
            tuned = adapter.continued(model, init_adapter, base, rank, alpha, dropout, targets)
        else:
            tuned = adapter.attach(model, base, rank, alpha, dropout, targets, seed)
        lengths = np.concatenate([rows.lengths, held_out.lengths])
        cut = Choice.kept(resumed.metrics) if resumed else None
        quick, choice = memory.prepare(tuned, setup, lengths, cuts, recompute, cut)
        choice = memory.alike(ranks, quick, lengths, choice)
        shape, size = quick.shape(lengths, choice.tokens), choice.tokens
        plan = bins.Schedule(rows.lengths, size, batch_tokens // size, epochs, max_steps, seed)
        facts = choice.facts() | {"base_precision": setup.precision}
        speed = training.train(
            quick, plan, rows, held_out, shape, scratch, recipe | {"seed": seed},
            resume=checkpoints.bring(resumed, scratch) if resumed else None,
            saved=lambda folder, step, loss: checkpoints.save(run, folder, step, loss, inputs, facts),
            ranks=ranks, attempt=run.attempt.number, matmul=matmul, tracker=tracked,
        )  # fmt: skip
        ranks.close()
        if not ranks.first:
            return
        best, last = checkpoints.finished(run.folder, plan.steps)
        out = scratch / "adapter"
        adapter.assemble(best.path, last.path, out)
        chat_format.save(out)
        tokens.save(out, chat_format.source)
        probe = rows[int(rows.lengths.argmax())][0]
        first = history.first_gradients(last.path)
        alive = health.trained(tuned, out, probe, setup.precision, first)
        metrics = history.summary(plan, rows, last.path) | facts | speed | {
            "best_step": checkpoints.step(best),
            "held_out_loss": best.metrics["held_out_loss"],
            "resumed_from_step": done,
            "trainable_parameters": sum(p.numel() for p in adapter.trainable(tuned)),
            "adapter_b_norm": math.hypot(*alive["b_norms"].values()),
            "health": alive,
            "gpus": ranks.count,
            "predicted_gpu_bytes": choice.memory and choice.memory.total,
            "peak_gpu_bytes": load.peak_gpu_bytes(),
            "matmul_ceiling_share": ceiling.share(speed.get("model_flops_per_second"), matmul, ranks.count),
        }  # fmt: skip
        trained = [(run.manifest(inputs, metrics), 1.0)]
        about = card.Made(
            base.about(), chat_format.recorded(), trained, versions(), data=data.manifest
        )
        card.write(about, out)
        run.publish("adapter", out, inputs, metrics, device=load.describe_device(), seed=seed)
    click.echo(table(("adapter", "value"), [
        ("steps", metrics["steps"]), ("tokens", metrics["tokens"]),
        ("tokens/s", metrics.get("tokens_per_second", "-")),
        ("loss of the last step, nats", metrics["loss"]), ("held-out loss, nats", metrics["held_out_loss"]),
        ("best step", metrics["best_step"]), ("folder", str(run.folder / "adapter")),
    ]))  # fmt: skip
