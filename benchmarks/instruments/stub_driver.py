"""A stub of the CUDA driver that launches nothing: runs Triton's real launch path without a GPU.

Triton compiles for sm_90, loads the machine code and launches it as usual; the stub reports success and records the
last launch. Requires a C compiler, no GPU, and a process in which TRITON_INTERPRET was not set.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from mnistnorm.kernels.triton_impl import launches

# The most parameters of a kernel that are recorded; the same in _SOURCE.
MAX_PARAMETERS = 32

_SOURCE = r"""
#include <stdint.h>
#include <string.h>

enum { SUCCESS = 0, MAX_PARAMETERS = 32 };
typedef struct { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned n; } Config;

long stub_launches;
int stub_parameters;
unsigned stub_grid[3];
uint32_t stub_values[MAX_PARAMETERS];
void *stub_stream, *stub_function;

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return SUCCESS; }
int cuCtxSetCurrent(void *context) { return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
int cuDeviceGet(int *device, int index) { *device = index; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 75: *value = 9; break;            /* compute capability, major */
  case 76: *value = 0; break;            /* minor */
  case 81: *value = 233472; break;       /* shared memory of a multiprocessor */
  case 97: *value = 232448; break;       /* of a block, at most */
  default: *value = 132;
  }
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return SUCCESS; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return SUCCESS; }
int cuModuleUnload(void *module) { return SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  static uintptr_t next = 1;
  *function = (void *)next++;
  return SUCCESS;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads of a block, at most; registers, spills and shared memory */
  return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return SUCCESS; }
int cuTensorMapEncodeTiled(void) { return SUCCESS; }
int cuTensorMapEncodeIm2col(void) { return SUCCESS; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  *(uint64_t *)value = pointer;
  return SUCCESS;
}
int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  stub_launches++;
  memcpy(stub_grid, config->grid, sizeof stub_grid);
  stub_stream = config->stream, stub_function = function;
  for (int i = 0; i < stub_parameters && i < MAX_PARAMETERS; i++) memcpy(&stub_values[i], parameters[i], 4);
  return SUCCESS;
}
"""


def unavailable() -> str | None:
    """Returns why the stub cannot be used, or None if it can."""
    if torch.cuda.is_available():
        return "this machine has a GPU"
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter is on"
    return None if shutil.which("cc") or shutil.which("gcc") else "no C compiler found"


class Launched(NamedTuple):
    """A launch as the driver saw it; parameters are their lowest 32 bits."""

    function: int
    grid: tuple[int, ...]
    stream: int
    parameters: tuple[int, ...]


class Stub:
    """The launches that the driver recorded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @property
    def launches(self) -> int:
        return ctypes.c_long.in_dll(self._library, "stub_launches").value

    def keep_parameters(self, count: int) -> None:
        """Sets how many parameters the next kernels have, which the driver does not know."""
        ctypes.c_int.in_dll(self._library, "stub_parameters").value = count

    @property
    def last(self) -> Launched:
        count = ctypes.c_int.in_dll(self._library, "stub_parameters").value
        values = (ctypes.c_uint32 * MAX_PARAMETERS).in_dll(self._library, "stub_values")
        grid = (ctypes.c_uint * 3).in_dll(self._library, "stub_grid")
        function, stream = (
            ctypes.c_void_p.in_dll(self._library, name).value or 0 for name in ("stub_function", "stub_stream")
        )
        return Launched(function, tuple(grid), stream, tuple(values)[:count])


class _StubDriver(CudaDriver):
    """Triton's CUDA driver without torch.cuda: one device, with streams numbered by device."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0 if device is None else 16 * device

    def get_current_target(self) -> GPUTarget:
        return launches.INTERPRETED_TARGET


@contextmanager
def stub_driver() -> Iterator[Stub]:
    """Makes Triton compile and launch without a GPU, and launches of CPU tensors take the direct path.

    Raises:
        RuntimeError: see `unavailable`.
    """
    reason = unavailable()
    if reason:
        raise RuntimeError(f"cannot use the stub of the CUDA driver: {reason}")
    driver: Any = triton.runtime.driver
    file = _build()
    library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)  # later loads by name find it
    previous, libcuda_path = driver._active, triton.knobs.nvidia.libcuda_path
    triton.knobs.nvidia.libcuda_path = str(file.parent)
    try:
        driver.set_active(_StubDriver())
        with mock.patch.object(launches, "launches_directly", return_value=True):
            yield Stub(library)
    finally:
        driver._active = previous
        triton.knobs.nvidia.libcuda_path = libcuda_path


def _build() -> Path:
    """Compiles the stub, in Triton's cache: what Triton compiles against it depends on its path."""
    digest = hashlib.sha256(_SOURCE.encode()).hexdigest()[:16]
    file = Path(triton.knobs.cache.dir, f"stub-driver-{digest}", "libcuda.so.1")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            source, built = Path(folder, "stub.c"), Path(folder, "stub.so")
            source.write_text(_SOURCE)
            flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
            subprocess.run([shutil.which("cc") or "gcc", *flags, source, "-o", built], check=True, capture_output=True)
            built.replace(file)
    return file
