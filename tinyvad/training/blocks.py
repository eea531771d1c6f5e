"""Work in fixed blocks on a few threads: how a result stays the same to the last bit on any number of them.

Rows are split by the shape of the data alone. A block is worked on by one thread, its matrix products by one thread of
BLAS, and sums over blocks are made in the order of the blocks. Threads only change who does which block. The number of
threads is that of the processors this process may use, or what ``threads`` says.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import ThreadpoolController

ROWS = 400  # of a block, about: with some hundred channels it fits a core's own cache
PORTIONS = 4  # a thread, of each work: whoever is free takes the next
SHARES = 4  # blocks come in multiples of this, so that two or four threads get equal parts
SMALL = 1 << 14  # values that stay in one block
# Work is counted in passes over one value, half a nanosecond each. Waking a thread and waiting for it takes some 50
# microseconds on a virtual machine: less than WORTH of work is done faster alone.
WORTH = 1 << 19
PRODUCT = 1 / 20  # passes that a multiplication and addition in a matrix product costs,
TAP = 1 / 6  # and one in a depthwise convolution

_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process (threads do not survive a fork) and size
_limits: list[contextlib.AbstractContextManager[object]] = []  # one entry a caller inside; the first holds the limit
_controllers: list[ThreadpoolController] = []
_count: list[int] = []  # set by ``threads``


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Use ``count`` threads inside the block."""
    _count.append(count)
    try:
        yield
    finally:
        _count.pop()


def block_rows(rows: int, width: int) -> int:
    """Rows of a block of a (rows, width) array: depends on nothing else."""
    if rows * width <= SMALL:
        return max(rows, 1)
    count = SHARES * -(-rows // (SHARES * ROWS))
    return -(-rows // count)


def run_blocks(work: Callable[[int, int], None], count: int, cost: float) -> None:
    """Call ``work(first, last)`` on ranges that cover ``count`` blocks, several at once where it is worth it.

    Args:
        work: handles blocks first to last - 1; must let go of the interpreter's lock to gain anything.
        cost: of the whole work, in passes over one value; less than ``WORTH`` stays on the caller's thread.
    """
    workers = min(_count[-1] if _count else processors(), count)
    if workers <= 1 or cost < WORTH:
        work(0, count)
        return
    portions = min(count, workers * PORTIONS)
    tickets = iter(range(portions))

    def take() -> None:
        for i in tickets:
            work(count * i // portions, count * (i + 1) // portions)

    pool = _pool(workers - 1)
    others = [pool.submit(take) for _ in range(workers - 1)]
    try:
        take()
    finally:
        for other in others:
            if not other.cancel():  # a thread that the system has not let run yet is not waited for: all is done
                other.result()


def _pool(size: int) -> ThreadPoolExecutor:
    key = (os.getpid(), size)
    with _lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(size, thread_name_prefix="tinyvad-training")
        return _pools[key]


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS on one thread a caller inside the block; blocks may nest and may be entered by several threads."""
    with _lock:
        if not _limits:
            if not _controllers:  # finding the libraries takes a millisecond: once
                _controllers.append(ThreadpoolController())
            limit = _controllers[0].limit(limits=1, user_api="blas")
            limit.__enter__()
        else:
            limit = contextlib.nullcontext()
        _limits.append(limit)
        first = _limits[0]
    try:
        yield
    finally:
        with _lock:
            _limits.pop()
            if not _limits:
                first.__exit__(None, None, None)


def multiply_rows(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """x (R, K) times matrix (K, N) -> (R, N), block by block of rows."""
    rows, width = x.shape
    step = block_rows(rows, max(width, matrix.shape[1]))
    out = np.empty((rows, matrix.shape[1]), x.dtype)

    def work(first: int, last: int) -> None:
        for start in range(first * step, last * step, step):
            np.matmul(x[start : start + step], matrix, out=out[start : start + step])

    with one_blas_thread():
        run_blocks(work, -(-rows // step), x.size * matrix.shape[1] * PRODUCT)
    return out


def multiply_back(
    g: np.ndarray, x: np.ndarray | None, matrix: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Both derivatives of x matrix^T, where g (R, N) is that of the result; each block of g is read once for both.

    Returns:
        g matrix (R, K), None without ``matrix`` (N, K); g^T x (N, K), None without ``x`` (R, K).
    """
    rows, outputs = g.shape
    width = (x if x is not None else matrix).shape[1]  # type: ignore[union-attr]
    step = block_rows(rows, max(width, outputs))
    count = -(-rows // step)
    dx = np.empty((rows, width), g.dtype) if matrix is not None else None
    parts = np.empty((count, outputs, width), g.dtype) if x is not None else None

    def work(first: int, last: int) -> None:
        for block in range(first, last):
            chosen = slice(block * step, (block + 1) * step)
            if dx is not None and matrix is not None:
                np.matmul(g[chosen], matrix, out=dx[chosen])
            if parts is not None and x is not None:
                np.matmul(g[chosen].T, x[chosen], out=parts[block])

    with one_blas_thread():
        run_blocks(work, count, g.size * width * PRODUCT * ((x is not None) + (matrix is not None)))
    return dx, None if parts is None else parts.sum(0) if count > 1 else parts[0]
