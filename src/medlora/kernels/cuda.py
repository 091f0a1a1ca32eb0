"""CUDA C++ kernels, compiled when first used by NVRTC, which PyTorch brings along: no toolkit is needed. What it made
lies where PyTorch keeps what NVRTC makes for PyTorch itself, for the next process.

On Hopper and later a kernel may start before the one ahead of it in the stream has ended ("programmatic dependent
launch"), to do what does not depend on it, and then waits for it by itself: see `griddepcontrol` in its source.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dispatch import jit, tl

EARLY_START = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DIGEST = hashlib.sha256().digest_size


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class CudaKernel:
    """kernel(programs, *arguments), the arguments tensors and 32-bit numbers in the order of the source."""

    def __init__(self, module: Any, function: Any, early: bool, threads: int, shared: int) -> None:
        self.module, self.function, self.early = module, function, early  # the module must outlive its function
        self.threads, self.shared = threads, shared
        _check(_driver().cuFuncSetAttribute(function, SHARED, shared))
        resident = ctypes.c_int()
        size = ctypes.c_size_t(shared)
        _check(_driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(resident), function, threads, size))
        self.resident = resident.value
        """Programs that a multiprocessor holds at once."""

    def __call__(self, programs: int, *arguments: Tensor | int | float) -> None:
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(EARLY_START, 0, (1,))
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(
            programs, 1, 1, self.threads, 1, 1, self.shared, stream, ctypes.pointer(attribute), int(self.early)
        )  # fmt: skip
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None))


def _value(argument: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


def starts_early(device: torch.device | int) -> bool:
    """Whether a kernel on this GPU may start before the one ahead has ended."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def early_start(x: Tensor) -> dict[str, bool]:
    """Options of a Triton kernel, its EARLY for `wait_for_inputs` among them."""
    return {"EARLY": True, "launch_pdl": True} if x.is_cuda and starts_early(x.device) else {"EARLY": False}


@jit
def wait_for_inputs(EARLY: tl.constexpr) -> None:
    """Let the next kernel start, and wait for the one ahead."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def cuda_kernel(
    file: str, name: str, device: int, defined: Mapping[str, Any], threads: int, shared: int = 0
) -> CudaKernel | None:
    """The function `name` of a file beside this one.

    Args:
        device: index of the GPU it runs on.
        defined: the macros.
        threads: of a program.
        shared: bytes of dynamic shared memory of a program.

    Returns:
        None, with one warning, where it cannot be compiled: the caller has another way.
    """
    try:
        with torch.cuda.device(device):
            capability = torch.cuda.get_device_capability()
            suffix = "a" if capability == (9, 0) else ""  # what only Hopper has
            options = ["--gpu-architecture=sm_{}{}{}".format(*capability, suffix), "--std=c++17"]
            options += [f"-D{name}={value}" for name, value in defined.items()]
            binary = compiled(source(file), file, options)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), binary))
            _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
            return CudaKernel(module, function, starts_early(device), threads, shared)
    except (AttributeError, OSError, RuntimeError) as error:
        _warn(file, str(error))
        return None


def source(file: str) -> str:
    """A file beside this one, and in their places those that it includes."""
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda found: source(found[1]), text, flags=re.MULTILINE)


@cache
def _warn(file: str, why: str) -> None:
    warnings.warn(f"{file} does not serve here, a slower kernel does: {why}", stacklevel=2)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(failed: int) -> None:
    if failed:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(failed, ctypes.byref(text))
        raise RuntimeError((text.value or b"unknown CUDA error").decode())


def compiled(code: str, file: str, options: list[str]) -> bytes:
    """Machine code, from the folder of PyTorch's compiled kernels if it lies there whole, else made and laid there.

    The folder is PYTORCH_KERNEL_CACHE_PATH or, if that is not set, torch/kernels in the user's cache;
    USE_PYTORCH_KERNEL_CACHE=0 keeps nothing.

    Raises:
        RuntimeError: NVRTC's messages.
    """
    if os.environ.get("USE_PYTORCH_KERNEL_CACHE") == "0":
        return _compile(code, file, options)
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("PYTORCH_KERNEL_CACHE_PATH") or user / "torch" / "kernels")
    made_of = "\0".join([torch.__version__, str(torch.version.cuda), *options, code])
    place = folder / f"medlora_{hashlib.sha256(made_of.encode()).hexdigest()}"
    with suppress(OSError):
        kept = place.read_bytes()
        if hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]:
            return kept[DIGEST:]
    binary = _compile(code, file, options)
    with suppress(OSError):  # a folder that cannot be written costs the next process time, and this one nothing
        folder.mkdir(parents=True, exist_ok=True)
        place.write_bytes(hashlib.sha256(binary).digest() + binary)
    return binary


def _compile(code: str, file: str, options: list[str]) -> bytes:
    library = torch.cuda._utils._get_gpu_rtc_library()
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), file.encode(), 0, None, None)
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), encoded)
        text = _read(library, program, "ProgramLog" if failed else "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(text.decode(errors="replace").strip("\0\n"))
    return text


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
