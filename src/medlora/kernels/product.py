"""Products of long rows by cuBLASLt, each by the algorithm that proves fastest where it runs.

A long row's products are bound by power on a data centre's card: an H100's clock falls from 1,980 to some 1,400 MHz
to hold its 700 W. cuBLAS ranks its algorithms as if it did not fall, and another of those that it offers is faster
then. So the first passes take turns among them, timed by events where they run, and the fastest serves from then on.
Which that is hangs on time and must change no number: only those take part whose results equal, bit for bit, those of
cuBLAS's first choice.

Shapes: T rows of x, K inputs, N outputs.
"""

# torch leaves Event untyped
# mypy: allow-untyped-calls
from __future__ import annotations

import ctypes
import statistics
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

LONG = 4096  # rows: shorter ones come in too many lengths, and are bound by other things
WORKSPACE = 2**20  # bytes; on Hopper algorithms ask for four
OFFERED = 16  # algorithms asked for; cuBLAS has eight or so
TURNS = 8  # of each algorithm before one is chosen
ALIGNED = 256  # bytes, which cuBLAS takes for granted where nothing else is said
PROVEN = 1024  # rows by which results are compared
# of cublasLt.h and library_types.h
TYPES = {torch.bfloat16: 14, torch.float16: 2}
FLOAT32, COMPUTE_FLOAT32, TRANSPOSE_FIRST, MAX_WORKSPACE = 0, 68, 3, 1


class _Offer(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class _Failed(Exception):
    """cuBLASLt does not do what is asked."""


class _Library:
    """cuBLASLt, by its C interface."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.handle = self.made("cublasLtCreate")

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise _Failed(f"{name}: status {status}")

    def made(self, name: str, *arguments: Any) -> c_void_p:
        """What a constructor writes through its first argument."""
        found = c_void_p()
        self.call(name, byref(found), *arguments)
        return found


@cache
def _library(device: torch.device) -> _Library | None:
    """With a handle of the device, which is the current one; None without CUDA's own."""
    with suppress(OSError, _Failed):
        return _Library(ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}"))
    return None


@cache
def _workspace(device: torch.device, stream: int) -> Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


class _Product:
    """Products that differ in T alone.

    Row-major y = x w is y' = w' x' to cuBLAS, whose matrices are column-major.
    """

    def __init__(self, library: _Library, x: Tensor, w: Tensor, y: Tensor, adds: bool) -> None:
        self.library, self.adds, self.kind = library, c_float(adds), TYPES[x.dtype]
        self.transposed = w.stride(0) == 1
        self.how = library.made("cublasLtMatmulDescCreate", c_int(COMPUTE_FLOAT32), c_int(FLOAT32))
        if self.transposed:
            one = c_int(1)
            library.call("cublasLtMatmulDescSetAttribute", self.how, c_int(TRANSPOSE_FIRST), byref(one), c_size_t(4))
        self.layouts: dict[tuple[int, ...], tuple[c_void_p, c_void_p, c_void_p]] = {}
        self.offers = self._offers(x, w, y)
        self.turns: list[tuple[int, int, Any, Any]] = []
        """(offer, rows, events before and after)."""
        self.chosen: _Offer | None = self.offers[0] if len(self.offers) == 1 else None

    def _offers(self, x: Tensor, w: Tensor, y: Tensor) -> list[_Offer]:
        """cuBLAS's choices, best first, that give the bits of its first, by random rows: those at hand may be zero."""
        preference = self.library.made("cublasLtMatmulPreferenceCreate")
        self.library.call(
            "cublasLtMatmulPreferenceSetAttribute", preference, c_int(MAX_WORKSPACE), byref(c_uint64(WORKSPACE)),
            c_size_t(8),
        )  # fmt: skip
        found, count = (_Offer * OFFERED)(), c_int()
        a, b, c = self._layouts(x, w, y)
        self.library.call(
            "cublasLtMatmulAlgoGetHeuristic", self.library.handle, self.how, a, b, c, c, preference, c_int(OFFERED),
            found, byref(count),
        )  # fmt: skip
        results: list[Tensor] = []
        same: list[_Offer] = []
        draw = torch.Generator(x.device).manual_seed(0)
        rows, before = (
            torch.empty(PROVEN, t.shape[1], dtype=t.dtype, device=t.device).normal_(generator=draw) for t in (x, y)
        )
        for offer in found[: count.value]:
            result = before.clone()
            with suppress(_Failed):
                self._run(offer, rows, w, result)
                if not results or torch.equal(results[0], result):
                    same.append(offer)
                    results = results or [result]
        if not same:
            raise _Failed("no algorithm")
        return same

    def _layouts(self, x: Tensor, w: Tensor, y: Tensor) -> tuple[c_void_p, c_void_p, c_void_p]:
        """Of w', x' and y'."""
        key = (len(x), x.stride(0), w.stride(0), w.stride(1), y.stride(0))
        if key not in self.layouts:
            stored = w.t() if self.transposed else w
            self.layouts[key] = (self._layout(stored), self._layout(x), self._layout(y))
        return self.layouts[key]

    def _layout(self, x: Tensor) -> c_void_p:
        """Of a row-major matrix, as its transpose."""
        rows, columns = x.shape
        sizes = c_uint64(columns), c_uint64(rows), c_int64(x.stride(0))
        return self.library.made("cublasLtMatrixLayoutCreate", c_int(self.kind), *sizes)

    def _run(self, offer: _Offer, x: Tensor, w: Tensor, y: Tensor) -> None:
        a, b, c = self._layouts(x, w, y)
        out, stream = c_void_p(y.data_ptr()), torch.cuda.current_stream(x.device).cuda_stream
        self.library.call(
            "cublasLtMatmul", self.library.handle, self.how, byref(c_float(1)), c_void_p(w.data_ptr()), a,
            c_void_p(x.data_ptr()), b, byref(self.adds), out, c, out, c, byref(offer.algorithm),
            c_void_p(_workspace(x.device, stream).data_ptr()), c_size_t(WORKSPACE), c_void_p(stream),
        )  # fmt: skip

    def __call__(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """Writes, or adds, to y.

        Raises:
            _Failed: nothing has been written then.
        """
        if self.chosen is None:
            self._choose()
        if self.chosen is not None:
            self._run(self.chosen, x, w, y)
            return
        if not self.offers:
            raise _Failed("no algorithm is left")
        turn = len(self.turns) % len(self.offers)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        try:
            self._run(self.offers[turn], x, w, y)
        except _Failed:  # of this length, say
            del self.offers[turn]
            self.turns = []
            raise
        after.record()
        self.turns.append((turn, len(x), before, after))

    def _choose(self) -> None:
        """The fastest, once all are timed; without waiting for the device."""
        turns = self.turns[: TURNS * len(self.offers)]
        if not turns or len(turns) < TURNS * len(self.offers) or not turns[-1][3].query():
            return
        times: list[list[float]] = [[] for _ in self.offers]
        for turn, rows, before, after in turns:
            times[turn].append(before.elapsed_time(after) / rows)
        medians = [statistics.median(each) for each in times]
        self.chosen = self.offers[medians.index(min(medians))]
        self.turns = []


PRODUCTS: dict[tuple[Any, ...], _Product | None] = {}


def _product(x: Tensor, w: Tensor, y: Tensor, adds: bool) -> _Product | None:
    key = (x.device, x.dtype, w.shape, w.stride(0) == 1, adds)
    if key not in PRODUCTS:
        library = _library(x.device)
        PRODUCTS[key] = None
        with suppress(_Failed):
            PRODUCTS[key] = _Product(library, x, w, y, adds) if library else None
    return PRODUCTS[key]


def matmul(x: Tensor, w: Tensor, out: Tensor | None = None, *, adds: bool = False) -> Tensor:
    """x w [T, N], in `out` where given, which it may add to. No gradient.

    Args:
        x: [T, K], rows dense.
        w: [K, N], rows dense, or the transpose of such a matrix.
        out: [T, N], as x.
    """
    y = x.new_empty(len(x), w.shape[1]) if out is None else out
    if x.is_cuda and len(x) >= LONG and x.dtype in TYPES and not torch.cuda.is_current_stream_capturing():
        alike = x.dtype == w.dtype == y.dtype and not (x.data_ptr() | w.data_ptr() | y.data_ptr()) % ALIGNED
        with torch.cuda.device(x.device), suppress(_Failed):
            product = _product(x, w, y, adds) if alike else None
            if product:
                product(x, w, y)
                return y
    return torch.addmm(y, x, w, out=y) if adds else torch.mm(x, w, out=y)
