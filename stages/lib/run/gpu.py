"""The GPU before torch knows of it: what the driver (NVML) has, what the torch wheel needs, whether they fit.

Torch itself computes on the CPU, with a warning at most, where the driver is too old or a GPU is lost.
"""

import contextlib
import ctypes
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib.run import compiler, environment
from stages.lib.run.checks import Check, enforce, failed, warned
from stages.lib.run.exits import CannotRun, TryAgain

LIBRARY = "libnvidia-ml.so.1"
# By CUDA's major version: the first driver for it, and the first compute capability that torch is built for.
DRIVERS = {13: 580, 12: 525, 11: 450}
# Beside the usual one, by CUDA's major version: the torch that PyPI has for it, which the image's locks pin.
OTHERS = {12: "2.10.0"}
OLDEST = {13: (7, 5), 12: (7, 0), 11: (3, 5)}
BF16, FP8 = (8, 0), (8, 9)  # compute capabilities
NEEDS = {"nf4": BF16, "int8": BF16, "bf16": BF16, "fp8": FP8}
LOST = {15, 16}  # NVML's codes for a GPU that was there: lost, or to be reset
MISMATCH = 18  # of the driver in the kernel and its library, as after an update without a restart
SPARE = 0.9  # of a GPU's memory that is free where nobody else is on it
Version = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it: its compute capability, and bytes of its memory."""

    index: int
    name: str
    uuid: str
    capability: Version
    total: int
    free: int

    def __str__(self) -> str:
        return f"{self.name}, {self.total / 2**30:.0f} GiB, compute capability {dotted(self.capability)}"


@dataclass(frozen=True)
class Found:
    """What there is to compute on.

    Attributes:
        problem: why there is no GPU for this process, in words; empty where there is one. remedy: against it.
        code: NVML's, or 0.
        cuda: the newest CUDA that the driver serves. gpus: those that this process may use.
    """

    problem: str = ""
    remedy: str = ""
    code: int = 0
    driver: str = ""
    cuda: Version = (0, 0)
    gpus: list[Gpu] = field(default_factory=list)


class _Refused(Exception):
    """An NVML function returned an error."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


class _Nvml:
    """The functions of the library that are needed, with its error codes as `_Refused`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            words = self._library.nvmlErrorString
            words.restype = ctypes.c_char_p
            raise _Refused(code, (words(code) or b"").decode(errors="replace"))

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        self._call("nvmlInit_v2")
        try:
            yield
        finally:
            self._library.nvmlShutdown()

    def text(self, name: str, *args: Any) -> str:
        buffer = ctypes.create_string_buffer(96)
        self._call(name, *args, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode(errors="replace")

    def number(self, name: str, *args: Any) -> int:
        value = ctypes.c_int()
        self._call(name, *args, ctypes.byref(value))
        return value.value

    def gpu(self, index: int) -> Gpu:
        device, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call(
            "nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor)
        )
        with contextlib.suppress(_Refused):  # parts of a shared GPU do not say
            self._call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        name, uuid = (self.text(f"nvmlDeviceGet{what}", device) for what in ("Name", "UUID"))
        return Gpu(index, name, uuid, (major.value, minor.value), memory[0], memory[1])


def look() -> Found:
    """What the driver says; without one, or without a GPU, why."""
    try:
        nvml = _Nvml()
    except OSError:
        return Found(
            f"no NVIDIA driver is mounted here ({LIBRARY})",
            "start the container with --gpus all, or install the driver",
        )
    try:
        with nvml.open():
            driver = nvml.text("nvmlSystemGetDriverVersion")
            cuda = nvml.number("nvmlSystemGetCudaDriverVersion_v2")
            there = [nvml.gpu(n) for n in range(nvml.number("nvmlDeviceGetCount_v2"))]
    except (_Refused, AttributeError) as error:
        remedy = "see what nvidia-smi says on the host"
        return Found(f"the NVIDIA driver fails: {error}", remedy, getattr(error, "code", 0))
    gpus = _visible(there)
    why = ("", "") if gpus else _nothing(len(there))
    return Found(*why, 0, driver, (cuda // 1000, cuda % 1000 // 10), gpus)


def _visible(gpus: list[Gpu]) -> list[Gpu]:
    said = environment.visible_gpus()
    if said is None:
        return gpus
    found = []
    for word in map(str.strip, said.split(",")):
        # As CUDA does: the list ends at the first that there is not; parts of a GPU are taken for it.
        match = [g for g in gpus if word and (str(g.index) == word or g.uuid.startswith(word))]
        if word.startswith("MIG-"):
            match = gpus[:1]
        if not match:
            break
        found += match[:1]
    return found


def _nothing(there: int) -> tuple[str, str]:
    if there:
        said = environment.visible_gpus()
        return f"CUDA_VISIBLE_DEVICES={said!r} hides every GPU, of {there}", "unset it"
    return "there is an NVIDIA driver and no GPU", "give the container one, or take another machine"


def wheel() -> Version | None:
    """The CUDA version that the installed torch is built for, read without importing it; None for the CPU.

    Raises:
        CannotRun: torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotRun("torch is not installed: pip install -r requirements.txt")
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*= *'(\d+)\.(\d+)", text, re.M)
    return (int(found[1]), int(found[2])) if found else None


def dotted(version: Version) -> str:
    """`13.0` for (13, 0)."""
    return f"{version[0]}.{version[1]}"


def require(precision: str | None, promised: bool) -> None:
    """Before torch is imported: refuse a GPU that it would pass over or fail on, and say where there is none.

    Raises:
        TryAgain, CannotRun: see `checks`.
    """
    enforce(checks(precision, promised))


def checks(precision: str | None, promised: bool) -> list[Check]:
    """Whether there is a GPU that torch can use, checked without torch.

    Args:
        precision: BASE_PRECISION; None where the model is not run in it, by kernels of our own.
        promised: EXPECT_GPU, by which a GPU that is not there is a failure worth a retry elsewhere.
    """
    cuda, found = wheel(), look()
    presence = _presence(found, cuda, promised)
    if presence.failure or cuda is None or not found.gpus:
        return [presence]
    first = found.gpus[0]
    fits = [presence, _driver(found, cuda), _capability(found, cuda), _tenants(first)]
    return fits + ([_precision(precision, first), compiler.check()] if precision else [])


def _presence(found: Found, cuda: Version | None, promised: bool) -> Check:
    name = "GPU"
    if found.code == MISMATCH:
        return failed(name, CannotRun, found.problem, "restart the machine, or its driver")
    if found.code in LOST:
        return failed(name, TryAgain, found.problem, "the same command goes on, on another machine")
    cpu_only = "the installed torch is built for the CPU alone"
    if cuda is None and promised:
        return failed(name, CannotRun, f"EXPECT_GPU is set, and {cpu_only}", "install one for CUDA")
    if cuda is None and found.gpus:
        return warned(name, f"{found.gpus[0].name} stays idle: {cpu_only}", "install one for CUDA")
    if cuda is None:
        return Check(name, "none, and a torch for the CPU")
    if found.problem and promised:
        return failed(name, TryAgain, f"EXPECT_GPU is set, and {found.problem}", found.remedy)
    if found.problem:
        return warned(name, f"computing on the CPU: {found.problem}", found.remedy)
    return Check(name, "; ".join(map(str, found.gpus)))


def _driver(found: Found, cuda: Version) -> Check:
    serves = f"driver {found.driver} serves CUDA {dotted(found.cuda)}"
    if found.cuda[0] >= cuda[0]:
        return Check("driver", f"{serves}, torch needs {dotted(cuda)}")
    least = DRIVERS.get(cuda[0], max(DRIVERS.values()))
    return failed(
        "driver", CannotRun,
        f"{serves}, and the installed torch, built for CUDA {dotted(cuda)}, needs driver {least} or newer",
        _or_older("update the driver", found.cuda[0]),
    )  # fmt: skip


def _or_older(remedy: str, cuda: int) -> str:
    """A remedy, or else the torch for another major version of CUDA, where there is one."""
    if cuda not in OTHERS:
        return remedy
    return (
        f"{remedy}, or take torch {OTHERS[cuda]}, which is built for CUDA {cuda}: the image of "
        f"`make docker-build TORCH=cu{cuda}`, or pip install -r env/locks/cu{cuda}.txt"
    )


def _capability(found: Found, cuda: Version) -> Check:
    oldest = OLDEST.get(cuda[0], OLDEST[max(OLDEST)])
    for gpu in found.gpus:
        if gpu.capability < oldest:
            older = cuda[0] - 1 if gpu.capability >= OLDEST.get(cuda[0] - 1, oldest) else 0
            return failed(
                "capability", CannotRun,
                f"{gpu.name} has compute capability {dotted(gpu.capability)}, and the installed torch, built "
                f"for CUDA {dotted(cuda)}, begins at {dotted(oldest)}",
                _or_older("use a newer GPU", older),
            )  # fmt: skip
    return Check("capability", f"CUDA {dotted(cuda)} begins at {dotted(oldest)}")


def _precision(precision: str, gpu: Gpu) -> Check:
    why = lacks(precision, gpu.name, gpu.capability)
    return failed("precision", CannotRun, *why) if why else Check("precision", precision)


def lacks(precision: str, name: str, capability: Version) -> tuple[str, str] | None:
    """Why a GPU cannot compute in a BASE_PRECISION, and the remedy; None where it can."""
    if capability >= NEEDS.get(precision, (0, 0)):
        return None
    if precision == "fp8" and capability >= BF16:
        return (
            f"{name} has no FP8 products (compute capability {dotted(capability)}, {dotted(FP8)} is the first)",
            "use an Ada or Hopper GPU, or BASE_PRECISION=nf4",
        )
    return (
        f"{name} has no bf16, which BASE_PRECISION={precision} computes in",
        "use an Ampere GPU or newer, or BASE_PRECISION=fp32",
    )


def _tenants(gpu: Gpu) -> Check:
    name, free, total = "its memory", gpu.free / 2**30, gpu.total / 2**30
    if gpu.free >= SPARE * gpu.total:
        return Check(name, f"{free:.1f} of {total:.1f} GiB free")
    used = f"others have {total - free:.1f} of the {total:.1f} GiB of GPU {gpu.index}"
    return warned(name, used, "what is left may be too little: choose a free one, or wait")
