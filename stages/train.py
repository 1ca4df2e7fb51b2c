"""train: a LoRA adapter from prepared data.

Reads `data/` in the run directory and the base model.
Writes `checkpoints/step-*/` on the way, and `adapter/`: the adapter with the least held-out loss as plain peft
reads it, its tokenizer and prompt format, and the last adapter in `last/`; losses are in the manifest.
"""

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click

from stages.lib.run import learning, options, tracking
from stages.lib.run.options import run_options
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, setting
from stages.lib.run.versions import versions


@click.command("train", cls=Stage)
@learning.settings
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
    num_gpus: int, sharding: str, tracker: str, expect_gpu: bool, **recipe: object,
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
        from stages.lib.model.speed import Rows, predicted

        tokens = Tokens(base.folder)
        chat_format = Format.load(data.path, tokens)
        cuts = memory.sizes(batch_tokens, longest, micro_batch_tokens, ranks.count)
        config = load.config(base) if ranks.count > 1 or base_precision == "auto" else {}
        if resumed:
            setup = replace(setup, precision=resumed.metrics["base_precision"])
        elif base_precision == "auto":
            found = ranks.of_first(
                lambda: memory.precision(config, setup, cuts, recompute, sharding, ranks)
            )
            setup = replace(setup, precision=found)
        cut = Choice.kept(resumed.metrics) if resumed else None
        setup = replace(
            setup, shared=memory.shared(sharding, config, setup, cuts, recompute, cut, ranks)
        )
        done = checkpoints.step(resumed) if resumed else None
        tracked = trackers.begin(run, tracker if ranks.first else "none", done)
        read = load.on_host if setup.shared > 1 else load.load
        model = read(base, setup.precision)
        matmul = ceiling.highest(setup.precision)
        if init_adapter:
            tuned = adapter.continued(model, init_adapter, base, rank, alpha, dropout, targets)
        else:
            tuned = adapter.attach(model, base, rank, alpha, dropout, targets, seed)
        lengths = np.concatenate([rows.lengths, held_out.lengths])
        quick, choice = memory.prepare(tuned, setup, lengths, cuts, recompute, cut, ranks)
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
        probe = rows[int(rows.lengths.argmax())][0]
        held = memory.held(tuned, ranks)
        if not ranks.first:
            if ranks.joined:
                health.beside(tuned, probe, setup.precision)
            ranks.close()
            return
        best, last = checkpoints.finished(run.folder, plan.steps)
        out = scratch / "adapter"
        adapter.assemble(best.path, last.path, out)
        chat_format.save(out)
        tokens.save(out, chat_format.source)
        first = history.first_gradients(last.path)
        alive = health.trained(tuned, out, probe, setup.precision, first)
        ranks.close()
        metrics = history.summary(plan, rows, last.path) | facts | speed | held | {
            "best_step": checkpoints.step(best),
            "held_out_loss": best.metrics["held_out_loss"],
            "resumed_from_step": done,
            "trainable_parameters": sum(p.numel() for p in adapter.trainable(tuned)),
            "adapter_b_norm": math.hypot(*alive["b_norms"].values()),
            "health": alive,
            "gpus": ranks.count,
            "predicted_gpu_bytes": choice.memory and choice.memory.total,
            "predicted_gpu_parts": choice.memory and asdict(choice.memory),
            "predicted_tokens_per_second": predicted(
                tuned.config.to_dict(), replace(setup, unpacked=quick.unpacked), load.describe_device()["name"],
                Rows.of(rows.lengths, rows.trained), choice, batch_tokens, ranks.count,
            ) if quick.packed else None,
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
