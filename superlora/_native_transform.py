"""The Walsh–Hadamard transform of rows in memory, compiled by numba; imported on first use.

The kernels see addresses and bytes only, so that one source serves every library whose
numbers lie in this machine's memory; a number's type comes in with the scale. They are
written for whole vector registers: butterflies between vectors are additions of
vectors, butterflies inside a vector are one shuffle and one multiply-add.

A row is transformed in one sweep over tiles that stay in the cache. A row longer than a
tile is seen as a matrix with a tile a line: the lines are transformed first, and then
its columns, a few cache lines wide, which the first sweep over them gathers into scratch
memory and the last one writes back.

The threads are our own: numba's thread layers abort the process when two threads enter
them at once, or after a fork.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
import numpy
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

if getattr(numba.config, "DISABLE_JIT", 0):
    raise ImportError("NUMBA_DISABLE_JIT is set")

_FEATURES = llvmlite.binding.get_host_cpu_features()
# Bytes of a register, and registers that one sweep works on: half of those there are.
VECTOR = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx") else 16
ROWS = 8 if VECTOR == 32 else 16
# Bytes transformed at once by the innermost kernel; a shorter row is not for this module.
BLOCK = ROWS * VECTOR

# Bytes. A tile and what it is made from fit in half a core's own cache; rows so long that
# they leave the caches anyway gain more from fewer and longer lines.
_TILE = 1 << 17
_LONG_TILE = 1 << 19
_WIDTH = 1 << 10  # of a strip: enough lines side by side for the processor to fetch ahead
_LEAST_WIDTH = 1 << 7
# For one thread. Waking one is soon paid for, but the memory serves a few cores at most,
# and after an operation of torch its idle threads keep theirs busy for milliseconds.
_SHARE = 1 << 23
_LINE = 64  # of a cache
_AHEAD = 1 << 12
_PARTS = 4  # for a thread


def _emit(
    builder: ir.IRBuilder, rows: int, across: bool, number: ir.Type, args: tuple[Any, ...]
) -> None:
    """Transform `rows` vectors in registers: between them and, if `across`, inside them."""
    source, source_step, target, target_step, scale = args
    size = 4 if isinstance(number, ir.FloatType) else 8
    lanes = VECTOR // size
    vector = ir.VectorType(number, lanes)
    index = ir.IntType(32)
    undefined = ir.Constant(vector, ir.Undefined)

    def locate(address: ir.Value, step: ir.Value, row: int) -> ir.Value:
        offset = builder.mul(step, ir.Constant(ir.IntType(64), row))
        return builder.inttoptr(builder.add(address, offset), vector.as_pointer())

    found = [builder.load(locate(source, source_step, row), align=size) for row in range(rows)]
    for bit in range(lanes.bit_length() - 1 if across else 0):
        swap = [ir.Constant(index, lane ^ (1 << bit)) for lane in range(lanes)]
        signs = [ir.Constant(number, -1.0 if lane >> bit & 1 else 1.0) for lane in range(lanes)]
        order = ir.Constant(ir.VectorType(index, lanes), swap)
        sign = ir.Constant(vector, signs)
        # A product with a sign is exact: contracted or not, the sum is rounded once.
        found = [
            builder.fadd(
                builder.fmul(value, sign, flags=("contract",)),
                builder.shuffle_vector(value, undefined, order),
                flags=("contract",),
            )
            for value in found
        ]
    for bit in range(rows.bit_length() - 1):
        for low in (row for row in range(rows) if not row >> bit & 1):
            high = low | 1 << bit
            found[low], found[high] = (
                builder.fadd(found[low], found[high]),
                builder.fsub(found[low], found[high]),
            )
    first = builder.insert_element(undefined, scale, ir.Constant(index, 0))
    zeros = ir.Constant(ir.VectorType(index, lanes), None)
    factor = builder.shuffle_vector(first, undefined, zeros)
    for row, value in enumerate(found):
        builder.store(builder.fmul(value, factor), locate(target, target_step, row), align=size)


def _registers(rows: int, across: bool = False) -> Any:
    def typed(context: Any, source: Any, gap: Any, target: Any, step: Any, scale: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(builder, rows, across, context.get_value_type(signature.args[4]), args)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64, scale), generate

    return intrinsic(typed)


def _ask_for_line(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, index = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, index, index, index])
        call = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, near, data = (ir.Constant(index, value) for value in (0, 3, 1))
        builder.call(call, [builder.inttoptr(args[0], pointer), read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


_block = _registers(ROWS, across=True)
_lines_2, _lines_4, _lines_8 = _registers(2), _registers(4), _registers(8)
_lines_16 = _registers(16)
_prefetch: Any = intrinsic(_ask_for_line)


def _compiled(function: Kernel, cache: bool = False) -> Kernel:
    # Not fast maths: NaN and Inf are numbers here.
    return cast(Kernel, numba.njit(nogil=True, error_model="numpy", cache=cache)(function))


@_compiled
def _lines(
    rows: int, source: int, gap: int, target: int, step: int, width: int, scale: float
) -> None:
    """Transform `rows` lines of `width` bytes across; they lie `gap` and `step` apart."""
    if rows == 16:
        for at in range(0, width, VECTOR):
            _lines_16(source + at, gap, target + at, step, scale)
    elif rows == 8:
        for at in range(0, width, VECTOR):
            _lines_8(source + at, gap, target + at, step, scale)
    elif rows == 4:
        for at in range(0, width, VECTOR):
            _lines_4(source + at, gap, target + at, step, scale)
    else:
        for at in range(0, width, VECTOR):
            _lines_2(source + at, gap, target + at, step, scale)


@_compiled
def _next_radix(lines: int) -> int:
    """Return how many of `lines` lines to transform at once: of sweeps as equal as can be."""
    sweeps = 1
    power = ROWS
    while power < lines:
        power *= ROWS
        sweeps += 1
    radix = 2
    power = 2**sweeps
    while power < lines:
        radix *= 2
        power *= 2**sweeps
    return radix


@_compiled
def _tile(source: int, target: int, size: int, one: float, scale: float) -> None:
    """Transform `size` bytes that lie together; `one` is 1 of the type of `scale`."""
    last = scale if size == BLOCK else one
    for at in range(0, size, BLOCK):
        # The processor's own fetching ahead stops at pages, and while a tile is swept.
        for line in range(0, BLOCK, _LINE):
            _prefetch(source + at + line + _AHEAD)
        _block(source + at, VECTOR, target + at, VECTOR, last)
    width = BLOCK
    while width < size:
        rows = _next_radix(size // width)
        last = scale if width * rows == size else one
        for at in range(target, target + size, width * rows):
            _lines(rows, at, width, at, width, width, last)
        width *= rows


@_compiled
def _strip(
    target: int, pitch: int, lines: int, scratch: int, width: int, one: float, scale: float
) -> None:
    """Transform the columns of `lines` lines of `width` bytes, `pitch` apart."""
    if lines <= ROWS:
        _lines(lines, target, pitch, target, pitch, width, scale)
        return
    rows = _next_radix(lines)
    for line in range(0, lines, rows):
        _lines(rows, target + line * pitch, pitch, scratch + line * width, width, width, one)
    done = rows
    rows = _next_radix(lines // done)
    while done * rows < lines:
        part = done * width
        for at in range(scratch, scratch + lines * width, part * rows):
            _lines(rows, at, part, at, part, part, one)
        done *= rows
        rows = _next_radix(lines // done)
    for line in range(done):
        at = target + line * pitch
        _lines(rows, scratch + line * width, done * width, at, done * pitch, width, scale)


def _sweep(
    source: int,
    target: int,
    size: int,
    tile: int,
    first_tile: int,
    last_tile: int,
    first_strip: int,
    last_strip: int,
    scratch: int,
    width: int,
    one: float,
    scale: float,
) -> None:
    """Transform some tiles and then some strips, counted through all rows of `size` bytes."""
    last = scale if tile == size else one
    for at in range(first_tile * tile, last_tile * tile, tile):
        _tile(source + at, target + at, tile, one, last)
    strips = tile // width
    for strip in range(first_strip, last_strip):
        at = target + strip // strips * size + strip % strips * width
        _strip(at, tile, size // tile, scratch, width, one, scale)


class _Entry:
    """The compiled `_sweep`, from numba's cache on disk where there is one that works."""

    def __init__(self) -> None:
        self.cached = True
        try:
            self.kernel = _compiled(_sweep, cache=True)
        except RuntimeError:  # no folder to write to
            self.forgo_cache()

    def forgo_cache(self) -> None:
        self.cached = False
        self.kernel = _compiled(_sweep)

    def prepare(self, scale: Any) -> None:
        """Compile for this type of number; nothing is transformed."""
        try:
            self.kernel(0, 0, _TILE, _TILE, 0, 0, 0, 0, 0, _WIDTH, scale, scale)
        except Exception:
            if not self.cached:
                raise
            # A cache that is full, broken or read-only must not cost more than the cache.
            self.forgo_cache()
            self.kernel(0, 0, _TILE, _TILE, 0, 0, 0, 0, 0, _WIDTH, scale, scale)


_entry = _Entry()
_prepared: set[type] = set()


def transform(
    source: int,
    target: int,
    count: int,
    size: int,
    number: type,
    scale: float,
    threads: int | None = None,
) -> None:
    """Write ``scale H x`` of rows of `size` entries to `target`, which may be `source` itself.

    A row is of at least ``BLOCK`` bytes; without `threads` all processors may be used.
    """
    one, factor = number(1), number(scale)
    if number not in _prepared:
        _entry.prepare(factor)
        _prepared.add(number)
    kernel = _entry.kernel
    size *= factor.itemsize
    if count * size < 2 * _SHARE:
        threads = 1
    elif threads is None:
        threads = processors()
    if size <= _TILE:
        parts = min(threads, count * size // _SHARE)
        if parts < 2:
            kernel(source, target, size, size, 0, count, 0, 0, 0, size, one, factor)
            return

        def sweep(start: int, stop: int) -> None:
            kernel(source, target, size, size, start, stop, 0, 0, 0, size, one, factor)

        _share_out(sweep, count, parts)
        return
    _transform_long(source, target, count, size, factor, threads)


def _transform_long(
    source: int, target: int, count: int, size: int, scale: Any, threads: int
) -> None:
    """Transform rows that are longer than a tile."""
    kernel, one = _entry.kernel, type(scale)(1)
    tile = _TILE if size <= 8 * _TILE else _LONG_TILE
    lines = size // tile
    width = max(_LEAST_WIDTH, min(_WIDTH, _LONG_TILE // lines))
    strips = tile // width

    def sweep(tiles: tuple[int, int], columns: tuple[int, int]) -> None:
        # Above so many lines a strip is collected; aligned, as all that is written.
        room = numpy.empty(lines * width + VECTOR if lines > ROWS else 0, numpy.uint8)
        scratch = -(-room.ctypes.data // VECTOR) * VECTOR
        kernel(source, target, size, tile, *tiles, *columns, scratch, width, one, scale)

    def sweep_rows(start: int, stop: int) -> None:
        # One row after the other, so that its tiles are in a cache when its columns follow.
        for row in range(start, stop):
            sweep((row * lines, row * lines + lines), (row * strips, row * strips + strips))

    # Shares of whole rows need one meeting of the threads, shares of tiles and strips two.
    helped = min(threads, count, count * size // _SHARE)
    split = min(threads, count * size // (2 * _SHARE))
    even = count % max(1, helped) == 0 or count >= _PARTS * helped
    if helped > 1 and (split < 2 or (even and helped >= split)):
        _share_out(sweep_rows, count, helped)
    elif split > 1:
        _share_out(lambda start, stop: sweep((start, stop), (0, 0)), count * lines, split)
        _share_out(lambda start, stop: sweep((0, 0), (start, stop)), count * strips, split)
    else:
        sweep_rows(0, count)


_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _forget_threads() -> None:
    # A forked child has none of its parent's threads, and maybe a lock that stays held.
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def processors() -> int:
    """Return how many processors this process may use, and at most ``NUMBA_NUM_THREADS``."""
    found = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        found = len(os.sched_getaffinity(0))
    return min(found, int(getattr(numba.config, "NUMBA_NUM_THREADS", found)))


def _share_out(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Call ``work(start, stop)`` for all parts of `count`, with the help of other threads.

    Parts are taken one at a time by who is free: a processor that is busy elsewhere gets
    fewer, and a helper that never starts gets none. This thread waits for nothing but
    parts at work.
    """
    global _pool
    parts = min(count, _PARTS * threads)
    taken = itertools.count()  # one bytecode a step: no two threads get the same number

    def help_out() -> None:
        while (part := next(taken)) < parts:
            work(count * part // parts, count * (part + 1) // parts)

    helpers: list[Future[None]] = []
    try:
        with _lock:
            if _pool is None:
                _pool = ThreadPoolExecutor(max(1, processors() - 1), "superlora")
            helpers.extend(_pool.submit(help_out) for _ in range(threads - 1))
    except RuntimeError:
        pass  # no threads to be had: the process is ending, or has too many
    try:
        help_out()
    finally:
        errors = [_end_of(helper) for helper in helpers if not helper.cancel()]
    for error in errors:
        if error is not None:
            raise error


def _end_of(helper: Future[None]) -> BaseException | None:
    """Wait for a helper, which writes to memory that an interruption would give away."""
    interrupted: BaseException | None = None
    while True:
        try:
            return helper.exception() or interrupted
        except KeyboardInterrupt as error:
            interrupted = error
