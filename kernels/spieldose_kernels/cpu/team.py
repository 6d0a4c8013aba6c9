"""Run compiled work on the threads PyTorch already has.

A pool of one's own beside OpenMP's competes with it for the same cores, because the workers of both
spin between products. PyTorch's OpenMP runtime takes any function, so the work joins its team.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# sums may be reordered and fused, but NaN and infinity stay what they are
_compile = numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"})

_runtime = ctypes.CDLL(None)  # PyTorch loads its OpenMP runtime for the whole process to see
_SHARED = hasattr(_runtime, "GOMP_parallel")  # GNU's entry points; without them one thread works
_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_team_size = types.ExternalFunction("omp_get_num_threads", types.int32())


def compiled(function: Any) -> Any:
    """Compile a function at its first call, and keep the code for later processes if that works.

    A full disk is no reason not to run what was just compiled.
    """
    dispatcher = _compile(function)
    keep = dispatcher._cache.save_overload

    def keep_if_it_works(*arguments: Any) -> None:
        with suppress(OSError):
            keep(*arguments)

    dispatcher._cache.save_overload = keep_if_it_works
    return dispatcher


class Work:
    """Hold a compiled function of (arguments, thread, threads), run once by every thread.

    `arguments` are the int64 numbers of the call: sizes, and addresses for `array_at`.
    """

    def __init__(self, body: Callable[[Any, int, int], None], arguments: int) -> None:
        self._pack = ctypes.c_int64 * arguments
        self._entry = _entry(compiled(body), arguments)  # kept: it owns the machine code
        self._address = ctypes.c_void_p(self._entry.address)

    def __call__(self, *arguments: int, threads: int) -> None:
        """Run on so many threads and wait for all."""
        packed = ctypes.byref(self._pack(*arguments))
        if _SHARED and threads > 1:
            _runtime.GOMP_parallel(self._address, packed, threads, 0)
        else:
            self._entry.ctypes(packed)


def threads_for(work: int) -> int:
    """Return how many threads a number of multiplications is worth."""
    return torch.get_num_threads() if work >= WORTH_A_TEAM else 1


# to wake a second thread costs about 2 us, as long as 2,000 multiplications take (2 cores, EPYC)
WORTH_A_TEAM = 4096


def _entry(body: Any, count: int) -> Any:
    if _SHARED:

        @numba.cfunc(types.void(types.voidptr))
        def entry(arguments: Any) -> None:
            body(numba.carray(arguments, count, np.int64), _thread_number(), _team_size())
    else:

        @numba.cfunc(types.void(types.voidptr))
        def entry(arguments: Any) -> None:
            body(numba.carray(arguments, count, np.int64), 0, 1)

    return entry


@intrinsic
def array_at(_: Any, address: Any) -> Any:
    """Return an address, int64, as the pointer that `numba.carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate
