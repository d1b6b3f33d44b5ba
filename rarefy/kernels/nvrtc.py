"""CUDA C++ kept as text and compiled when it is first run, by NVRTC, which every CUDA build of torch carries.

For kernels that want what Triton does not give: atomics in shared memory, fragments of tensor cores by hand, weights
that are read before the kernel in front has ended (programmatic dependent launch). No header is read and nothing is
written to disk; a kernel takes a second, once a process.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_PDL = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FIRST_WITH_PDL = (9, 0)


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((f"{of}_{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Kernel:
    """A compiled function. Arguments: tensors (their addresses), ints (32 bits), floats (32 bits)."""

    def __init__(self, function: ctypes.c_void_p, early: bool) -> None:
        """early: it may begin before the kernel in front has ended, and waits for it by itself."""
        self._function, self._early, self._shared = function, early, 48 * 1024

    def __call__(
        self, grid: tuple[int, int, int], threads: int, *arguments: Tensor | int | float, shared: int = 0
    ) -> None:
        """shared: bytes of memory a block is given. Raises RuntimeError where the launch fails."""
        if shared > self._shared:
            _checked(_driver().cuFuncSetAttribute(self._function, _MOST_SHARED, shared))
            self._shared = shared
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(id=_PDL, value=1)
        config = _Config(*grid, threads, 1, 1, shared, torch.cuda.current_stream().cuda_stream)
        config.attributes, config.count = ctypes.pointer(attribute), int(self._early)
        _checked(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None))


def kernel(source: str, name: str, defines: Sequence[tuple[str, int | str]] = ()) -> Kernel:
    """``name`` (extern "C") of ``source``, for the current device. Raises RuntimeError with the compiler's words."""
    return _kernel(source, name, tuple(defines), torch.cuda.current_device())


@functools.cache
def _kernel(source: str, name: str, defines: tuple[tuple[str, int | str], ...], device: int) -> Kernel:
    capability = torch.cuda.get_device_capability(device)
    early = capability >= _FIRST_WITH_PDL and "griddepcontrol.wait" in source
    image = compiled(source, capability, defines)
    torch.zeros((), device=device)  # makes torch's context, which the module is loaded into
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _checked(_driver().cuModuleLoadData(ctypes.byref(module), image))
    _checked(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return Kernel(function, early)


def compiled(source: str, capability: tuple[int, int], defines: Sequence[tuple[str, int | str]] = ()) -> bytes:
    """Machine code (cubin) of ``source``; needs no device."""
    library, program = _compiler(), ctypes.c_void_p()
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "-default-device"]
    options += [f"-D{key}={value}" for key, value in defines]
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        raise RuntimeError("NVRTC makes no program")
    try:
        failed = library.nvrtcCompileProgram(program, len(options), words)
        size = ctypes.c_size_t()
        if failed:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"a kernel does not compile for {options}: {log.value.decode(errors='replace')}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, image)
        return image.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _value(argument: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def _checked(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'error').decode()} ({code})")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def _compiler() -> ctypes.CDLL:
    """NVRTC as torch brought it. Raises RuntimeError where there is none."""
    major = (torch.version.cuda or "").partition(".")[0]
    names = [f"libnvrtc.so.{major}"]
    for folder in sys.path:
        names += glob.glob(os.path.join(folder, "nvidia", "*", "lib", f"libnvrtc.so.{major}*"))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError("NVRTC is not found; install a CUDA build of torch")
