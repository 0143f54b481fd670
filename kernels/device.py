"""What the Triton kernels share: activations, the recurrent product, and waiting for the other programs of a grid.

The recurrent product is cut over K between the warps of a program: each warp multiplies its own slice of h with its own
slice of the weights, and one sum over the warps ends it. So a program can own a few units only, which spreads the work
over all multiprocessors, and still use all its warps. Weights that are loaded before the loop over time stay in shared
memory or registers for the whole sequence; what has no room there is read again at every step.

Everything here also runs in Triton's interpreter, so there is no libdevice, and inline assembly only where a constant
says that the kernel is compiled.
"""

# Tuples that grow are what Triton has for lists.
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import triton
import triton.language as tl

from fastseq.kernels import plan

# Bits of the step flags, as fastseq.ops.flags has them.
CUT = tl.constexpr(1)
PADDING = tl.constexpr(2)


# Activations. exp overflows to infinity and underflows to zero where the results below are 1, 0 or -1: no NaN arises.


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)), for every finite x."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2|x|) + 1) with the sign of x; near zero, where that cancels, x + x^3 P(x^2) (Moshier 1989)."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = x + x * z * p
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def activation(x, NAME: tl.constexpr):
    """The nonlinearity of an Elman layer and its slope, both from x: where f saturates, its value lost the slope."""
    if NAME == "relu":
        # Written so that a NaN stays one.
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    if NAME == "tanh":
        e = tl.exp(-2.0 * tl.abs(x))
        return tanh(x), 4.0 * e / ((1.0 + e) * (1.0 + e))
    e = tl.exp(-tl.abs(x))
    return logistic(x), e / ((1.0 + e) * (1.0 + e))


@triton.jit
def load_unit_rows(values, u, ok, H: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``[BH]`` of a ``[ROWS, H]`` array, as ``[1, BH]`` in float32; of None, zeros that the compiler drops."""
    rows = ()
    for i in tl.static_range(ROWS):
        if values is None:
            rows = rows + (0.0,)
        else:
            rows = rows + (tl.load(values + i * H + u, mask=ok, other=0.0).to(tl.float32)[None, :],)
    return rows


# The recurrent product [BB, K] x [K, N], K in REGISTERS pieces of W * PIECE, FULL chunks of W * KC and one last of
# W * LAST. The rows on the left have BOUND numbers, a whole multiple of 16 bytes: K, and zeros. So loads of them are
# wide whatever K is. Of the weights the pieces are in registers and the first HELD chunks in shared memory. The others
# come from the L2 cache at every step, STREAMED of K for each warp at a time.

PIECE = tl.constexpr(plan.PIECE)
STREAMED = tl.constexpr(16)


@triton.jit
def row_offsets(k, stride: tl.constexpr, K: tl.constexpr):
    """Of rows ``k`` of K, ``stride`` apart: in 64 bits where 32 would not do."""
    if K * stride >= 2**31:
        k = k.to(tl.int64)
    return k * stride


@triton.jit
def weight_chunk(
    w,
    columns,
    columns_ok,
    stride: tl.constexpr,
    START: tl.constexpr,
    K: tl.constexpr,
    KC: tl.constexpr,
    W: tl.constexpr,
):
    """[W, KC, N]: row k of column n is at w + columns[n] + k * stride."""
    k = (tl.arange(0, W)[:, None] * KC + tl.arange(0, KC)[None, :] + START)[:, :, None]
    ok = columns_ok[None, None, :]
    if START + W * KC > K:
        ok = ok & (k < K)
    return tl.load(w + columns[None, None, :] + row_offsets(k, stride, K), mask=ok, other=0.0)


@triton.jit
def in_registers(piece, W: tl.constexpr):
    """``piece [W, PIECE, N]`` as it is, in the registers from which a product reads it.

    The compiler would put it into shared memory and read it from there at every step. But what a product has left lies
    as a transposed operand does and stays where it is, and a product by the identity is exact. (A weight that is not
    finite makes 16 of its column NaN.)
    """
    k = tl.arange(0, PIECE)
    identity = tl.broadcast_to((k[:, None] == k[None, :]).to(piece.dtype)[None, :, :], (W, PIECE, PIECE))
    columns = tl.dot(tl.trans(piece, (0, 2, 1)), identity, input_precision="ieee")
    return tl.trans(columns.to(piece.dtype), (0, 2, 1))


@triton.jit
def hold_weights(
    w,
    columns,
    columns_ok,
    stride: tl.constexpr,
    K: tl.constexpr,
    KC: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    HELD: tl.constexpr,
    REGISTERS: tl.constexpr,
    W: tl.constexpr,
):
    """The pieces and the first HELD chunks of the weights of a program's columns, read once, for
    :func:`recurrent_product`."""
    FROM: tl.constexpr = REGISTERS * W * PIECE
    chunks = ()
    for i in tl.static_range(HELD if HELD < FULL else FULL):
        chunks = chunks + (weight_chunk(w, columns, columns_ok, stride, FROM + i * W * KC, K, KC, W),)
    if HELD > FULL:
        chunks = chunks + (weight_chunk(w, columns, columns_ok, stride, FROM + FULL * W * KC, K, LAST, W),)
    # Last, since loading chunks of which no two numbers can be read at once takes most registers.
    pieces = ()
    for i in tl.static_range(REGISTERS):
        piece = weight_chunk(w, columns, columns_ok, stride, i * W * PIECE, K, PIECE, W)
        pieces = pieces + (in_registers(piece, W),)
    return pieces + chunks


@triton.jit
def state_chunk(rows, rows_ok, START: tl.constexpr, BOUND: tl.constexpr, KC: tl.constexpr, W: tl.constexpr):
    """[W, BB, KC] of the rows that begin at the pointers ``rows``, from the L2 cache: other programs wrote them."""
    k = (tl.arange(0, W)[:, None] * KC + tl.arange(0, KC)[None, :] + START)[:, None, :]
    ok = rows_ok[None, :, None]
    if START + W * KC > BOUND:
        ok = ok & (k < BOUND)
    return tl.load(rows[None, :, None] + k, mask=ok, other=0.0, cache_modifier=".cg")


@triton.jit
def recurrent_product(
    rows,
    rows_ok,
    held,
    w,
    columns,
    columns_ok,
    stride: tl.constexpr,
    K: tl.constexpr,
    BOUND: tl.constexpr,
    KC: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    W: tl.constexpr,
    BB: tl.constexpr,
    N: tl.constexpr,
    HELD: tl.constexpr,
    REGISTERS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BB, N] in float32: the rows by the weights, held or read again.

    Rows that are not ``rows_ok`` are zero. DEPTH chunks of the rows are on their way before the first is used.
    """
    acc = tl.zeros([W, BB, N], dtype=tl.float32)
    # So many pieces are on their way before the first is used, in the place of one chunk.
    AHEAD: tl.constexpr = KC // PIECE
    EARLY: tl.constexpr = DEPTH - 1 if REGISTERS > 0 else DEPTH
    pieces = ()
    for i in tl.static_range(AHEAD if AHEAD < REGISTERS else REGISTERS):
        pieces = pieces + (state_chunk(rows, rows_ok, i * W * PIECE, BOUND, PIECE, W),)
    FROM: tl.constexpr = REGISTERS * W * PIECE
    COUNT: tl.constexpr = HELD if HELD < FULL else FULL
    h = ()
    for i in tl.static_range(EARLY if EARLY < COUNT else COUNT):
        h = h + (state_chunk(rows, rows_ok, FROM + i * W * KC, BOUND, KC, W),)
    last = ()
    if HELD > FULL:
        last = (state_chunk(rows, rows_ok, FROM + FULL * W * KC, BOUND, LAST, W),)
    for i in tl.static_range(REGISTERS):
        acc = tl.dot(pieces[i], held[i], acc, input_precision=PRECISION)
        if i + AHEAD < REGISTERS:
            pieces = pieces + (state_chunk(rows, rows_ok, (i + AHEAD) * W * PIECE, BOUND, PIECE, W),)
    for i in tl.static_range(EARLY, DEPTH if DEPTH < COUNT else COUNT):
        h = h + (state_chunk(rows, rows_ok, FROM + i * W * KC, BOUND, KC, W),)
    for i in tl.static_range(COUNT):
        acc = tl.dot(h[i], held[REGISTERS + i], acc, input_precision=PRECISION)
        if i + DEPTH < COUNT:
            h = h + (state_chunk(rows, rows_ok, FROM + (i + DEPTH) * W * KC, BOUND, KC, W),)
    if HELD > FULL:
        acc = tl.dot(last[0], held[REGISTERS + FULL], acc, input_precision=PRECISION)
    elif FROM + HELD * W * KC < K:
        for start in range(FROM + HELD * W * KC, K, W * STREAMED):
            k = start + tl.arange(0, W)[:, None] * STREAMED + tl.arange(0, STREAMED)[None, :]
            ok = (k[:, None, :] < BOUND) & rows_ok[None, :, None]
            chunk = tl.load(rows[None, :, None] + k[:, None, :], mask=ok, other=0.0, cache_modifier=".cg")
            k = k[:, :, None]
            weights = tl.load(
                w + columns[None, None, :] + row_offsets(k, stride, K),
                mask=(k < K) & columns_ok[None, None, :],
                other=0.0,
            )
            acc = tl.dot(chunk, weights, acc, input_precision=PRECISION)
    return tl.sum(acc, axis=0)


@triton.jit
def settled(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """``x [ROWS, COLUMNS]`` as it is, spread over the threads as memory is read and written: ``WIDTH`` numbers that
    follow one another to each warp.

    The compiler would otherwise keep what a product leaves as the product's instructions have it, every warp with a
    copy, and bring each tile that meets it into that form through shared memory. It carries no layout through a gather.
    """
    LINES: tl.constexpr = ROWS * COLUMNS // WIDTH
    lines = tl.reshape(x, (LINES, WIDTH))
    lines = tl.gather(lines, tl.broadcast_to(tl.arange(0, WIDTH)[None, :], (LINES, WIDTH)), axis=1)
    return tl.reshape(lines, (ROWS, COLUMNS))


# Waiting. Every program of a group arrives once per step and waits for all of them before the next.


@triton.jit
def arrive(signals, tile, epoch, SYNC: tl.constexpr):
    """Tell the group that this program has written what step ``epoch`` (from 1) is waited for.

    The barrier orders the stores of all threads before the one thread that signals; the release makes them visible.
    """
    tl.debug_barrier()
    if SYNC == "counter":
        tl.atomic_add(signals, 1, sem="release")
    else:
        tl.atomic_xchg(signals + tile, epoch, sem="release")


@triton.jit
def wait(signals, programs, epoch, SYNC: tl.constexpr, SIGNALS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return when all ``programs`` of the group have arrived at ``epoch``.

    "counter": one number that all add to and poll; how far it is behind is told rightly where the count has wrapped
    around. "flags": one number per program, read as a vector; the polling reads are relaxed, so a fence follows them.
    """
    if SYNC == "counter":
        while tl.atomic_add(signals, 0, sem="acquire") - programs * epoch < 0:
            pass
    else:
        n = tl.arange(0, SIGNALS)
        seen = tl.load(signals + n, mask=n < programs, other=epoch, volatile=True)
        while tl.min(seen, axis=0) < epoch:
            seen = tl.load(signals + n, mask=n < programs, other=epoch, volatile=True)
        if not INTERPRETED:
            tl.inline_asm_elementwise(
                "fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [seen], dtype=tl.int32, is_pure=False, pack=1
            )
    tl.debug_barrier()
