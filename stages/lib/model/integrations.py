"""Trainer's integrations, each as a run of ours opens it: with its settings alone, and where it was left."""

import contextlib
import io
from typing import Any

from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.integrations.integration_utils import rewrite_logs

from stages.lib.model.event_file import EventFile
from stages.lib.run import environment
from stages.lib.run.tracking import PROJECT, Curves

# Errors by which a service says that it does not let us in, by name: their packages may not be there.
REFUSALS = ("AuthenticationError", "UsageError", "LocalTokenNotFoundError", "WriteTokenError")
REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")


def is_refusal(error: BaseException) -> bool:
    """Whether it would be no better later."""
    return (
        type(error).__name__ in REFUSALS
        or getattr(error, "error_code", None) in REFUSED
        or getattr(error, "status_code", None) in (401, 403)
    )


class Opened:
    """What an integration of ours has beside Trainer's.

    Attributes:
        keeps_what_it_has: steps that come again after a resume are left out.
    """

    keeps_what_it_has = True
    curves: Curves
    _initialized: bool

    def is_open(self) -> bool:
        """Whether it takes entries."""
        return self._initialized

    def run_id(self) -> str:
        """By which it knows the run."""
        return self.curves.run_id

    def at(self, when: float) -> None:
        """When the next entry was measured, UNIX seconds; most take the time at which they get it."""

    def sync(self) -> None:
        """What was logged is to be where it belongs."""


class TensorBoard(Opened, TensorBoardCallback):
    """Event files in the run directory, one an attempt."""

    keeps_what_it_has = False  # a reader drops what a later file begins with

    tb_writer: EventFile | None

    def __init__(self, curves: Curves) -> None:
        # Trainer's own would import torch's writer, and with it TensorBoard, where that is installed.
        self.curves, self.tb_writer, self.logging_dir = curves, None, str(curves.home)

    def is_open(self) -> bool:
        """Whether it takes entries."""
        return self.tb_writer is not None

    def _init_summary_writer(self, args: Any) -> None:
        first = self.curves.begins + 1
        self.tb_writer = EventFile(self.curves.home, self.curves.attempt, first)

    def _writer(self) -> EventFile:
        assert self.tb_writer
        return self.tb_writer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new file, with the settings."""
        self._init_summary_writer(args)
        rows = [f"| {name} | {value} |" for name, value in self.curves.settings.items()]
        with self._mended():
            self._writer().add_text(
                "settings", "\n".join(["| setting | value |", "| --- | --- |", *rows])
            )
            self._writer().sync()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """As Trainer's."""
        with self._mended():
            super().on_log(args, state, control, logs, **kwargs)
            self.curves.begins = max(self.curves.begins, state.global_step - 1)

    @contextlib.contextmanager
    def _mended(self) -> Any:
        """Behind half of a record a reader finds nothing more: what comes next goes into another file."""
        whole = False
        try:
            yield
            whole = True
        finally:
            if not whole:
                self.tb_writer = None

    def at(self, when: float) -> None:
        """When the next entry was measured."""
        self._writer().at = when

    def sync(self) -> None:
        """Have it on the disk."""
        with self._mended():
            self._writer().sync()


class Wandb(Opened, WandbCallback):
    """Weights & Biases: online, or with WANDB_MODE=offline in files that `wandb sync` sends later."""

    def __init__(self, curves: Curves) -> None:
        super().__init__()
        self.curves = curves

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Open the run, or go on with it."""
        self.curves.home.mkdir(parents=True, exist_ok=True)
        settings = self._wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self._wandb.init(
            project=environment.given("WANDB_PROJECT") or PROJECT, name=self.curves.name,
            id=self.curves.run_id, resume="allow", dir=str(self.curves.home),
            config=dict(self.curves.settings), settings=settings,
        )  # fmt: skip
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)
        self._initialized = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have all of it sent, or on the disk."""
        if self._initialized:
            self._wandb.finish()


class Mlflow(Opened, MLflowCallback):
    """MLflow: the server of MLFLOW_TRACKING_URI, else a database in the run directory."""

    def __init__(self, curves: Curves) -> None:
        super().__init__()
        self.curves, self._given = curves, curves.run_id if curves.step else None
        self._log_artifacts, self._async_log = (
            False,
            False,
        )  # in our thread, and so that errors are heard

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Open the run, or go on with it."""
        uri = environment.given("MLFLOW_TRACKING_URI")
        if not uri:
            self.curves.home.mkdir(parents=True, exist_ok=True)
            home = self.curves.home.resolve()
            uri = f"sqlite:///{home}/mlflow.db"
            # Else its database would name a folder of the working directory.
            environment.provide({"_MLFLOW_SERVER_ARTIFACT_ROOT": str(home / "artifacts")})
        self._ml_flow.set_tracking_uri(uri)
        self._ml_flow.set_experiment(environment.given("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        if self._ml_flow.active_run() is None:
            named = {"run_id": self._given} if self._given else {"run_name": self.curves.name}
            self._ml_flow.start_run(**named, log_system_metrics=False)
            self._auto_end_run = True
        if not self._given:
            told = {
                n: str(v)[: self._MAX_PARAM_VAL_LENGTH] for n, v in self.curves.settings.items()
            }
            self._ml_flow.log_params(told, synchronous=True)
        self._given = self._ml_flow.active_run().info.run_id
        self._initialized = True

    def run_id(self) -> str:
        """The server gives it."""
        return self._given or self.curves.run_id

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Under the names that the other integrations give."""
        super().on_log(args, state, control, rewrite_logs(logs), **kwargs)


class Trackio(Opened, TrackioCallback):
    """Trackio: a database in the run directory, or the Space of TRACKIO_SPACE_ID."""

    def __init__(self, curves: Curves) -> None:
        environment.provide({"TRACKIO_DIR": str(curves.home.resolve())})  # read when it is imported
        super().__init__()
        self.curves = curves

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Open the run, or go on with it."""
        with contextlib.redirect_stdout(io.StringIO()):  # results alone go there
            self._trackio.init(
                project=environment.given("TRACKIO_PROJECT") or PROJECT, name=self.curves.name,
                resume="allow", embed=False, private=True, config=dict(self.curves.settings),
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        self._initialized = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have all of it stored; nothing is published."""
        if self._initialized:
            with contextlib.redirect_stdout(io.StringIO()):
                self._trackio.finish()


def of(curves: Curves) -> Any:
    """The integration for some curves."""
    environment.provide({
        "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "WANDB_WATCH": "false",
        "WANDB_LOG_MODEL": "false", "WANDB_ERROR_REPORTING": "false",
    })  # fmt: skip
    kinds = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
    return kinds[curves.kind](curves)
