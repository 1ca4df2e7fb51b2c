"""An NVIDIA driver's library and a torch wheel as files, for what is asked of them before torch is imported."""

import subprocess
from pathlib import Path

SOURCE = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long Bytes;
static int said(const char *name, int other) {
    const char *value = getenv(name);
    return value ? atoi(value) : other;
}
static int text(const char *value, char *out, unsigned room) { strncpy(out, value, room); return 0; }
int nvmlInit_v2(void) { return said("FAKE_INIT", 0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) {
    if (code == 15) return "GPU is lost";
    return code == 18 ? "Driver/library version mismatch" : "Driver Not Loaded";
}
int nvmlSystemGetDriverVersion(char *out, unsigned room) {
    const char *value = getenv("FAKE_DRIVER");
    return text(value ? value : "580.65.06", out, room);
}
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = said("FAKE_CUDA", 13000); return 0; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = said("FAKE_COUNT", 2); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    *out = (void *)(size_t)(index + 1);
    return said("FAKE_HANDLE", 0);
}
int nvmlDeviceGetName(void *gpu, char *out, unsigned room) { return text("Fake GPU", out, room); }
int nvmlDeviceGetUUID(void *gpu, char *out, unsigned room) {
    return text(gpu == (void *)1 ? "GPU-aaaa" : "GPU-bbbb", out, room);
}
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) {
    *major = said("FAKE_CAPABILITY", 90) / 10;
    *minor = said("FAKE_CAPABILITY", 90) % 10;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *gpu, Bytes *out) {
    out[0] = (Bytes)80 << 30;
    out[1] = (Bytes)said("FAKE_FREE", 79) << 30;
    out[2] = out[0] - out[1];
    return 0;
}
"""


def driver(folder: Path) -> Path:
    """A folder for LD_LIBRARY_PATH with a driver's library; it answers what FAKE_... in the environment say."""
    source = folder / "nvml.c"
    source.write_text(SOURCE)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return folder


def wheel(folder: Path, cuda: str | None) -> Path:
    """A folder for PYTHONPATH with as much of torch as is read: the version that it was built for."""
    package = folder / "torch"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text('raise RuntimeError("torch was imported")\n')
    said = f"cuda: Optional[str] = {cuda!r}"
    (package / "version.py").write_text(
        f"from typing import Optional\n__version__ = '2.13.0'\n{said}\n"
    )
    return folder
