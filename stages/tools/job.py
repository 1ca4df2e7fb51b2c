"""job: the spec of a batch job, for the client of the service to submit.

Reads the preset, and settings of the stages that the environment overrides. Writes the spec, alone, to standard
output, and nothing else; runs nothing.
"""

from pathlib import Path

import click

from stages.lib.jobs.order import CHAIN, Order
from stages.lib.jobs.rules import COMMANDS
from stages.lib.jobs.targets import TARGETS, check, rendered
from stages.lib.run import options
from stages.lib.run.exits import BadSetting, Missing
from stages.lib.run.progress import say
from stages.lib.run.settings import Stage, Stages, from_environment, setting
from stages.lib.run.values import Number


def _preset(ctx: click.Context, _: click.Parameter, name: str | None) -> str:
    """The name of the preset, whose values are then this command's defaults."""
    root = ctx.find_root()
    assert isinstance(root.command, Stages)
    path = Path("env", f"{name}.env") if name else root.params["env_file"]
    if path is None:
        raise BadSetting("no preset is named; give --preset NAME, of a file in env/")
    if path.parent.resolve() != Path("env").resolve():
        raise BadSetting(f"{path} is not in env/, which is what the image holds; move it there")
    if path != root.params["env_file"]:
        root.command.use_preset(root, path)
        root.params["env_file"] = path
        ctx.default_map = (root.default_map or {}).get(str(ctx.info_name))
    return str(path.stem)


@click.command("job", cls=Stage)
@click.argument("target", type=click.Choice(list(TARGETS)))
@setting(
    "--preset", "PRESET", is_eager=True, callback=_preset,
    help="Name of a preset in env/. [default: that of --env-file]",
)  # fmt: skip
@setting(
    "--stage", "STAGE", default="chain", type=click.Choice(COMMANDS),
    help="What the job runs; chain is prepare-data, train, evaluate and merge.",
)  # fmt: skip
@setting("--image", "IMAGE", default="lora-stages", help="The image, with its registry.")
@setting(
    "--volume", "VOLUME",
    help="Where runs lie: folder, claim, bucket or file system, as docs/jobs.md says for each target.",
)  # fmt: skip
@setting(
    "--run-dir", "RUN_DIR", "folder", metavar="PATH",
    help="Its last part names the run's folder on the volume, and the job. [default: the preset]",
)  # fmt: skip
@setting(
    "--num-gpus", "NUM_GPUS", type=Number(int, low=1, high=16), default=1,
    help="GPUs of the machine.",
)  # fmt: skip
@setting(
    "--num-hosts", "NUM_HOSTS", type=Number(int, low=1), default=1,
    help="Machines that train together, each with NUM_GPUS; with --stage train.",
)  # fmt: skip
@setting("--gpu", "GPU", help="Kind of GPU, by the service's own name.")
@setting("--spot", "SPOT", is_flag=True, help="Take a machine that may be taken away.")
@options.grace_seconds
@options.max_runtime
@setting("--secret", "SECRET", help="What holds HF_TOKEN, by the service's own name.")
@setting("--queue", "QUEUE", help="Queue of Kueue, or partition of Slurm.")
@setting(
    "--role", "ROLE",
    help="AWS: role that reads image and secret. Google: e-mail of the service account.",
)  # fmt: skip
@click.option("--check", "checked", is_flag=True, help="Validate it too, without a network.")
@click.option(
    "--spec", type=click.Path(path_type=Path), help="Validate this file, and render nothing."
)
@click.pass_context
def job(
    ctx: click.Context, target: str, preset: str, stage: str, image: str, volume: str | None,
    folder: str | None, num_gpus: int, num_hosts: int, gpu: str | None, spot: bool, grace_seconds: float,
    max_runtime: float | None, secret: str | None, queue: str | None, role: str | None, checked: bool,
    spec: Path | None,
) -> None:  # fmt: skip
    """Render a batch job: docker, kubernetes, skypilot, aws-batch, slurm or gcp-batch."""
    if spec:
        if not spec.is_file():
            raise Missing(f"there is no {spec}; render it first")
        say(f"{spec} is sound, by our rules and {check(target, spec.read_text(), str(spec))}")
        return
    service = TARGETS[target]
    if not volume:
        raise BadSetting(f"no VOLUME is set: for {target} give {service.volume}")
    if service.unused and (gpu or spot):
        say(f"GPU and SPOT change nothing for {target}: {service.unused}")
    stages = CHAIN if stage == "chain" else (stage,)
    order = Order(
        preset=preset, run=Path(folder or preset).name, stage=stage, image=image, volume=volume,
        variables=from_environment(ctx, stages), gpus=num_gpus, hosts=num_hosts, gpu=gpu, spot=spot,
        grace=int(grace_seconds), runtime=int(max_runtime) if max_runtime else None, secret=secret,
        queue=queue, role=role,
    )  # fmt: skip
    text = rendered(target, order)
    if checked:
        say(f"the spec is sound, by our rules and {check(target, text, 'the spec')}")
    click.echo(text, nl=False)
