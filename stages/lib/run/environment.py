"""The process' environment, which the libraries read: secrets, caches, and what they would say."""

import contextlib
import logging
import os
import re
import socket
import sys
import tempfile
from pathlib import Path

from stages.lib.run.exits import BadSetting, CannotWrite
from stages.lib.run.rank import Hosts, Rank, first_host, interface

SECRETS = (
    "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "JUDGE_API_KEY",
    "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "TRACKIO_WRITE_TOKEN",
)  # fmt: skip
SECRETS_FILE = "secrets.env"
# Of which each may hold USER:PASSWORD@.
ADDRESSES = (
    "DATASET", "HF_ENDPOINT", "AWS_ENDPOINT_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy",
    "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL",
)  # fmt: skip
# What torchrun says to each process, and what `several` says beside it.
LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE", "STAGES_ENDS", "STAGES_PARENT",
)  # fmt: skip
# By scheduler: how many hosts there are, which this is, and where the first one is reached.
SCHEDULERS = (
    ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR"),  # Kubeflow's TrainJob, and torchrun itself
    ("AWS_BATCH_JOB_NUM_NODES", "AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"),
    ("SLURM_STEP_NUM_NODES", "SLURM_NODEID", "SLURM_STEP_NODELIST"),
    ("NNODES", "JOB_COMPLETION_INDEX", "MASTER_ADDR"),  # JobSet, whose spec names the first two
    ("NNODES", "NODE_RANK", "MASTER_ADDR"),
)  # fmt: skip
OPENER = re.compile(r"://([^\s/?#@]+:[^\s/?#]+)@")


def lines_of(path: Path) -> dict[str, str]:
    """The NAME=value lines of a file, as python-dotenv reads them; it passes over others in silence."""
    from dotenv.parser import parse_stream

    values = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in parse_stream(file):
                place = f"{path}:{line.original.line}"
                bad = line.error or (line.key and line.value is None)
                if bad and path.name == SECRETS_FILE:  # whatever it is, it may be a secret
                    raise BadSetting(f"{place} is no NAME=value; mend it")
                if line.error:
                    raise BadSetting(f"{place} is no NAME=value: {line.original.string.strip()!r}")
                if bad:
                    raise BadSetting(
                        f"{place} names {line.key} without a value: write {line.key}=VALUE"
                    )
                if line.key:
                    values[line.key] = line.value or ""
    except UnicodeDecodeError as error:
        raise BadSetting(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    return values


def load_secrets(folder: Path) -> None:
    """Put the secrets of `env/secrets.env`, where there is one, into the environment of the libraries."""
    path = folder / SECRETS_FILE
    if path.is_file():
        for key, value in lines_of(path).items():
            if value and not os.environ.get(key):
                os.environ[key] = value
    for key in SECRETS:
        if os.environ.get(key) == "":  # empty means unset
            del os.environ[key]


def secrets() -> tuple[str, ...]:
    """The values that must not be written anywhere: of the secrets, and what opens an address in these."""
    values = [os.environ[name] for name in SECRETS if os.environ.get(name)]
    for name in ADDRESSES:
        for opener in OPENER.findall(os.environ.get(name, "")):
            values += [opener, opener.partition(":")[2]]
    return tuple(value for value in values if value)


def has_token() -> bool:
    """Whether a Hugging Face token was given."""
    return bool(os.environ.get("HF_TOKEN"))


def given(name: str) -> str:
    """What a library is told by a variable of its own; empty where nothing."""
    return os.environ.get(name, "")


def provide(values: dict[str, str]) -> None:
    """Tell libraries what nobody else has told them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def knows_wandb() -> bool:
    """Whether Weights & Biases may find a key: in the environment, or where its login leaves it."""
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return bool(os.environ.get("WANDB_API_KEY")) or netrc.is_file()


def settle() -> None:
    """Give the libraries a home, a user's name and a place for temporary files where they would find none.

    So it is under a UID that nobody knows, with a root file system that cannot be written.

    Raises:
        CannotWrite: nothing can be written at all.
    """
    import getpass

    try:
        at_home = Path.home().is_dir()
    except RuntimeError:
        at_home = False
    if not at_home:
        os.environ["HOME"] = str(scratch_parent())
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"
    with contextlib.suppress(FileNotFoundError):
        if tempfile.gettempdir() != os.getcwd():  # which is where it looks last
            return
    os.environ["TMPDIR"] = str(scratch_parent())
    tempfile.tempdir = None


def cache_dir() -> Path:
    """The user's cache folder for this product."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-stages"


def have_home() -> None:
    """Give a process without a home, as under a UID that nobody knows, one in scratch; and a name.

    A home that cannot be written stays, for what may lie in it: the caches alone go elsewhere.
    """
    home = os.path.expanduser("~")
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")
    if not any(map(os.environ.get, names)) and home == "~":  # torch asks for it
        os.environ["USER"] = f"uid-{os.getuid()}"
    cache = Path(home, ".cache")
    if home != "~" and os.access(cache if cache.is_dir() else home, os.W_OK):
        return
    folder = scratch_parent() / f"lora-stages-home-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not folder.is_dir() or folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return  # somebody else's; whoever needs a home says so
    if home == "~":
        os.environ["HOME"] = str(folder)
    elif not os.environ.get("XDG_CACHE_HOME"):
        os.environ["XDG_CACHE_HOME"] = str(folder / ".cache")
        if (cache / "huggingface").is_dir():
            os.environ.setdefault("HF_HOME", str(cache / "huggingface"))


def keep_compiled() -> None:
    """Have the compiler keep its results there, if that can be written and its own variables are unset.

    Before bitsandbytes is imported: it compiles, and torch then chooses a temporary folder for the process.
    """
    for variable, kind in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        folder = cache_dir() / "compiled" / kind
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                os.environ.setdefault(variable, str(folder))


def visible_gpus() -> str | None:
    """Which GPUs CUDA is to see, by number or name with commas between; None for all of them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def offline() -> bool:
    """Whether the hub's library is told to ask nobody; as it reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def failpoints() -> str:
    """Where this process is to fail; see `failpoints`."""
    return os.environ.get("FAILPOINTS", "")


def scratch_parent() -> Path:
    """The local folder that holds unfinished work."""
    try:
        return Path(os.environ.get("SCRATCH_DIR") or tempfile.gettempdir())
    except FileNotFoundError as error:
        raise CannotWrite(
            "there is no folder for temporary files that can be written; name one in SCRATCH_DIR"
        ) from error


def use_one_thread() -> None:
    """Keep a worker process from starting threads of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of a log that programs read."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "critical",
        "HF_HUB_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "BITSANDBYTES_NOWELCOME": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "DISABLE_MULTIPROC": "1",  # lm-eval would fork this process for every core to resample a score
    }.items():
        os.environ.setdefault(name, value)
    # It reports a kernel that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        import warnings

        warnings.filterwarnings("ignore", module="transformers", category=FutureWarning)
        warnings.filterwarnings("ignore", module="huggingface_hub")


def take_rank() -> Rank | None:
    """The rank that a launcher gave this process, if one did; from here on the process sees one GPU.

    The variables go: Trainer and accelerate would wrap the model in a DDP of their own, and average.
    """
    given = {name: os.environ.get(name, "") for name in LAUNCHED}
    if not given["LOCAL_RANK"]:
        return None
    for name in LAUNCHED:
        os.environ.pop(name, None)
    local, seen = int(given["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen is not None else []
    if seen is None or len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            gpus[local] if local < len(gpus) else "" if gpus else str(local)
        )
    return Rank(
        int(given["RANK"]), int(given["WORLD_SIZE"] or 1), int(given["LOCAL_WORLD_SIZE"] or 1),
        given["MASTER_ADDR"] or "localhost", int(given["MASTER_PORT"] or 29500),
        given["TORCHELASTIC_USE_AGENT_STORE"] == "True",
        Path(given["STAGES_ENDS"]) if given["STAGES_ENDS"] else None, int(given["STAGES_PARENT"] or 0),
    )  # fmt: skip


def use_interface(address: str) -> None:
    """Have gloo offer itself where this host reaches another, which it else does where its own name is.

    On Debian that is 127.0.1.1, on which others wait in vain. What GLOO_SOCKET_IFNAME says stays.
    """
    with contextlib.suppress(OSError):
        if name := interface(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def for_ranks(folder: Path, near: int) -> dict[str, str]:
    """The environment of what starts `near` ranks here; `folder`: where they leave their ends."""
    threads = str(max((os.cpu_count() or 1) // near, 1))
    own = {"STAGES_ENDS": str(folder), "STAGES_PARENT": str(os.getpid())}
    return {"OMP_NUM_THREADS": threads} | os.environ | own


def hosts() -> Hosts:
    """The hosts of this job as its scheduler names them, in the spelling of the first one that does.

    Raises:
        BadSetting: it says how many, and not where the first one is.
    """
    for count, number, address in SCHEDULERS:
        if int(os.environ.get(count) or 1) > 1 and os.environ.get(number):
            index = int(os.environ[number])
            first = os.environ.get("MASTER_ADDR") or os.environ.get(address, "")
            first = first_host(first) or ("" if index else socket.gethostname())
            if not first:
                raise BadSetting(
                    f"{count} is {os.environ[count]}, and nothing says where the first host is; set MASTER_ADDR"
                )
            port = os.environ.get("PET_MASTER_PORT") or os.environ.get("MASTER_PORT") or 29500
            return Hosts(int(os.environ[count]), index, first, int(port))
    return Hosts()
