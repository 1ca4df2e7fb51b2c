"""The training loop: Hugging Face's Trainer, fed with bins, on losses averaged by learned tokens."""

import contextlib
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from stages.lib.model import adapter, health, history, shortage
from stages.lib.model.account import Account
from stages.lib.model.batches import Bins
from stages.lib.model.conduct import Conduct
from stages.lib.model.loss import (
    Plan,
    Rows,
    Shape,
    evaluation_bins,
    mean_nll,
    nll_sum,
    to,
    unlearned,
)
from stages.lib.model.optimizer import Flat, unhurried
from stages.lib.model.pace import counter
from stages.lib.model.quick import Quick
from stages.lib.model.ranks import Lost, Ranks
from stages.lib.model.recipe import arguments, learning_rate
from stages.lib.run import checkpoints, failpoints, preemption, watchdog
from stages.lib.run.exits import BadData, Diverged, TryAgain
from stages.lib.run.progress import say


class LoraTrainer(Trainer):
    """Trainer whose batches are bins, its loss exact under accumulation, its checkpoints adapters."""

    # The loss is divided by the whole step's learned tokens, so the loop must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        quick: Quick,
        arguments: TrainingArguments,
        bins: Bins,
        held_out: Rows,
        rate: Callable[[int, int], float],
        longest_gradient: float,
        first: health.FirstGradients,
        ranks: Ranks,
    ) -> None:
        # transformers before 5.20 takes a loss function, too, as the sign that the loss is scaled.
        super().__init__(model=quick.tuned, args=arguments, compute_loss_func=nll_sum)
        self.quick, self.bins, self.held_out, self.rate = quick, bins, held_out, rate
        self.longest_gradient, self.first, self.ranks = longest_gradient, first, ranks
        self.step_loss: torch.Tensor
        self.shares: list[torch.Tensor] = []  # each bin's of it

    def get_train_dataloader(self) -> Any:
        """The bins in their order; a batch is one bin.

        They are on the device when Trainer gets them, because its own copy waits for the GPU.
        """
        return torch.utils.data.DataLoader(
            self.bins, batch_size=1, collate_fn=lambda batch: to(batch[0], self.args.device)
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that the arguments name, on the adapter as one tensor."""
        parameters = adapter.trainable(self.model)
        several = not self.ranks.alone
        self.flat = Flat(
            parameters, self.longest_gradient, lambda: self.step_loss,
            beside=self.bins.plan.bins_per_step if several else 0, summed=self._sum if several else None,
        )  # fmt: skip
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        options["weight_decay"] = self.args.weight_decay
        self.optimizer = unhurried(kind)([self.flat.parameter], **options)
        self.flat.guard(self.optimizer)
        return self.optimizer

    def _sum(self) -> None:
        """The step's gradient, and its bins' shares of the loss, from those of all processes.

        Raises:
            Stopped: one of them was asked to stop; the step is not taken. Lost: one is gone.
        """
        self.ranks.agree()
        shares = self.flat.beside.zero_()
        if self.shares:
            shares[self.ranks.number :: self.ranks.count][: len(self.shares)] = torch.stack(
                self.shares
            )
        self.ranks.sum(self.flat.buffer)
        self.shares = list(shares[: len(self.bins.plan.step(self.state.global_step))])
        self.step_loss = torch.stack(self.shares).sum()
        if not self.first.record:
            self.flat.spread()

    def numbers(self) -> torch.Tensor:
        """On the device: the last step's loss in nats, its gradient's norm, and its bins' shares of the loss.

        At the first step that can tell also the norm of each factor's gradient, before it was cut.
        """
        found = torch.stack([self.step_loss, self.flat.norm, *self.shares])
        norms = self.first.norms()
        return found if norms is None else torch.cat([found, norms])

    def _get_grad_norm(self, *_: Any, **__: Any) -> None:
        """None of Trainer's own, which it takes over every small tensor: the flat one has it."""

    def doing(self, rows: Rows) -> str:
        """What is under way, in words."""
        step = self.state.global_step
        work = shortage.of_training(self.quick, self.bins.plan, rows)
        if self.model.training:
            return f"step {step + 1}: {work}"
        return f"the evaluation after step {step}: {work}"

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not by Trainer, which walks through all parameters for every bin."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Our own schedule: Trainer's gives the first step of a warm-up a learning rate of 0."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda done: self.rate(done, num_training_steps)
        )
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any
    ) -> torch.Tensor:
        """The bin's share of the step's mean loss; dropout depends on (seed, step, bin) alone."""
        failpoints.reach("train.bin")
        self.ranks.check()
        watchdog.alive()
        self.first.look(inputs)
        if not inputs["slot"]:
            self.shares, self.step_loss = [], self.flat.norm.new_zeros(())
        if inputs["bin"] is None:
            return nll_sum(model, inputs) if self.ranks.joined else self.flat.parts[0].sum() * 0
        entropy = np.random.SeedSequence([self.args.seed, inputs["step"], inputs["bin"]])
        seed = int(entropy.generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)  # for a base that has dropout of its own
        self.quick.seed.fill_(seed % 2**31)
        loss = nll_sum(model, inputs) / max(inputs["step_tokens"], 1)
        self.shares.append(loss.detach())
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def training_step(self, *given: Any, **options: Any) -> torch.Tensor:
        """A bin's way there and back."""
        with self.ranks.passing():
            return torch.as_tensor(super().training_step(*given, **options))

    def evaluate(self, *rest: Any, **options: Any) -> dict[str, float]:
        """The held-out loss on the first held-out rows, without keeping logits."""
        failpoints.reach("train.evaluate")
        bins = evaluation_bins(self.bins.plan, self.held_out.lengths)
        rows = [[self.held_out[row] for row in bins[b]] for b in self.ranks.mine(len(bins))]
        joined = self.ranks.joined
        if joined:
            idle = [unlearned(self.held_out[0])]
            rows += [idle] * (self.ranks.rounds(len(bins)) - len(rows))
        with self.ranks.stopping(), self.ranks.passing():
            loss = mean_nll(
                self.model, self.quick.precision, rows, shape=self.bins.shape, whole=self.ranks.agree,
                check=self.ranks.agree if joined else preemption.check, every=joined,
            )  # fmt: skip
        self.log({"eval_loss": loss})
        return {"eval_loss": loss}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The first process does."""
        if self.ranks.first:
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only the adapter; Trainer's own way adds a pickle of the arguments, secrets and all.

        Raises:
            Diverged: it is not finite.
        """
        if not bool(torch.isfinite(self.flat.parameter).all()):
            raise Diverged(
                f"the adapter after step {self.state.global_step} is not finite; lower LEARNING_RATE "
                "(the checkpoint before it is kept)"
            )
        adapter.save(self.model, Path(str(output_dir)))


def train(
    quick: Quick,
    plan: Plan,
    rows: Rows,
    held_out: Rows,
    shape: Shape | None,
    scratch: Path,
    recipe: dict[str, Any],
    *,
    resume: Path | None,
    saved: Callable[[Path, int, float | None], None],
    ranks: Ranks | None = None,
    attempt: int = 0,
    matmul: float | None = None,
    tracker: Any = None,
) -> dict[str, Any]:
    """Run all steps of a plan, from the beginning or from a checkpoint.

    Args:
        shape: of the bins, as `quick` wants it. scratch: local folder for unfinished checkpoints.
        recipe: seed, learning_rate, schedule, warmup, max_grad_norm, weight_decay, optimizer.
        resume: a local copy of a checkpoint.
        saved: told of every checkpoint: its folder, its step, and its held-out loss in nats, if measured.
        ranks: the processes that share each step's bins; of them the first alone has checkpoints.
        attempt: its number. matmul: FLOP/s of large products on one GPU, where known.
        tracker: see `trackers`; it ends with the steps.

    Returns:
        What this attempt measured, see `Pace`.

    Raises:
        TryAgain: stopped by a signal, the last whole step saved. Diverged: a loss or gradient is not finite.
        GateFailed: an adapted module has no gradient at the first step. OutOfMemory: the GPU's ends.
        BadData: a file of the checkpoint is no plain data.
    """
    done = history.steps_done(resume) if resume else 0
    if done >= plan.steps:
        adapter.take(quick.tuned, Path(str(resume)))
        return {}  # Trainer would take one more step
    known = history.first_gradients(resume) if resume else None
    first = health.FirstGradients(quick.tuned, quick.packed, known)
    ranks = ranks or Ranks()
    if ranks.count > plan.bins_per_step:
        say(
            f"a step of this run is {plan.bins_per_step} passes: of {ranks.count} GPUs the others are idle"
        )
    bins = Bins(plan, rows, shape, counter(quick.tuned), ranks)
    rate = functools.partial(learning_rate, recipe["schedule"], recipe["warmup"])
    given = arguments(scratch, bins.slots, quick.precision, **recipe)
    trainer = LoraTrainer(quick, given, bins, held_out, rate, recipe["max_grad_norm"], first, ranks)
    trainer.remove_callback(PrinterCallback)
    seen = sum(held_out.lengths[rows].sum() for rows in evaluation_bins(plan, held_out.lengths))
    account = Account(
        plan.steps, done, attempt=attempt, ceiling=matmul, gpus=ranks.count, held_out=int(seen),
        compiles=quick.compiles, tracker=tracker,
    )  # fmt: skip
    with tracker or contextlib.nullcontext(), preemption.deferred(), account.progress:
        words = quick.tuned.config.vocab_size
        conduct = Conduct(
            bins, len(held_out) > 0, saved if ranks.first else _not_saved, account, trainer.numbers,
            first.judge, words,
        )  # fmt: skip
        trainer.add_callback(conduct)
        doing = functools.partial(trainer.doing, rows)
        changes = shortage.remedies(quick, plan, rows, recipe["optimizer"])
        try:
            with shortage.explained(doing, changes):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            (preemption.check if ranks.alone else ranks.agree)()
        except pickle.UnpicklingError as error:
            raise BadData(
                f"a file of the checkpoint after step {done} holds more than numbers, and was not run "
                f"({str(error).splitlines()[0]}): this program did not make it; remove that checkpoint"
            ) from error
        except Lost:
            raise  # what the GPU does may never end
        except TryAgain:
            _keep(trainer, conduct)
            with contextlib.suppress(Lost):
                ranks.wait()
            raise
    ranks.check_same(trainer.flat.parameter)
    return account.pace.metrics()


def _not_saved(folder: Path, step: int, loss: float | None) -> None:
    """In a process that has no checkpoints."""


def _keep(trainer: LoraTrainer, conduct: Conduct) -> None:
    """Save the last whole step of a run that is stopped, if it is sound, owes nothing, and time allows."""
    conduct.settle(trainer.state)
    step, left = trainer.state.global_step, preemption.left()
    if left is not None and left < checkpoints.expected_seconds():
        say(
            f"step {step} is not saved: that took {checkpoints.expected_seconds():.0f} s before, and "
            f"{left:.0f} s are left; the checkpoint after step {conduct.saved_step} stands"
        )
        return
    if step > conduct.saved_step and not conduct.owes_evaluation(step):
        trainer._save_checkpoint(trainer.model, None)
        conduct.on_save(trainer.args, trainer.state, trainer.control)
