"""What the Triton kernels of points and centres share: distances, the sums over centres, and both gradients.

Points are worked on in chunks whose size depends on K and d alone, so that no more than :data:`CHUNK_NUMBERS` numbers
``[K, chunk]`` exist at a time, however many points there are. A chunk takes three kernels and one of the operation:

1. :func:`scaled_distances`, ``ratio_ij = ||z_i - mu_j||^2 / alpha``, from the differences themselves: the expanded
   square would lose every digit of a point that is much nearer to its centre than to the origin;
2. the operation's own, a walk along the centres of each point, which puts the weights w_ij of the gradients in the
   ratios' place;
3. :func:`points_gradient`, ``dz_i = sum_j w_ij (z_i - mu_j)``;
4. :func:`centers_gradient`, ``dmu_j = sum_i w_ij (mu_j - z_i)``.

All but the second are outer products: a tile of sums in registers, and for each step along the summed dimension one
column and one row that are read side by side, four numbers at a time (what a kernel reads so has its rows padded to
whole tiles, so that no mask gets in the way). There are no reductions between threads, and no program adds to another's
sums: the same bits on every run. Sums are cut into blocks that are added up, so their rounding errors stay small.
"""

# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.launch import Grid, Launch, expect
from fastseq.kernels.plan import power_of_two

#: Numbers [K, chunk] that exist at a time: 32 MiB, which L2 caches hold. A chunk has LEAST_POINTS all the same.
CHUNK_NUMBERS = 1 << 23
LEAST_POINTS = 128
#: Partial sums of the centres' gradient, in numbers, and programs that there should be to make them.
SUM_NUMBERS = 1 << 24
SUM_PROGRAMS = 512
SPAN_POINTS = 64  # at least, of each partial sum
TILE = 64  # of points, centres and features
BLOCK = 16  # terms of a sum that are added up before they are added to the rest

SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
INFINITY = tl.constexpr(float("inf"))
SMALLEST = tl.constexpr(1.17549435e-38)  # the smallest normal number


@triton.jit
def log(x):
    """The natural logarithm of positive normal numbers and infinity (Moshier, Cephes 1989). NaN stays NaN.

    Triton's own is the hardware's approximation on some targets, which has no digits near 1.
    """
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    exponent = n.to(tl.float32)
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    small = exponent * LN2_LOW + p * f * square - 0.5 * square
    return tl.where(x < INFINITY, exponent * LN2_HIGH + (f + small), x)


@triton.jit
def log_or_zero(x):
    """The same, of zero some finite number: 0 log 0 is 0."""
    return log(tl.where(x < SMALLEST, SMALLEST, x))


@triton.jit
def log1p(y):
    """log(1 + y) for y >= 0: what 1 + y has rounded away is added again."""
    x = 1.0 + y
    value = log(x)
    return tl.where(y < 1e6, value + (y - (x - 1.0)) / x, value)


@triton.jit
def careful_add(total, lost, x):
    """``(total, lost)`` with x added to a compensated sum (Kahan 1965): a plain chain over many centres, all of whose
    terms are positive, errs to one side, and the error is common to all that is made of it."""
    x = x - lost
    new = total + x
    return new, (new - total) - x


@triton.jit
def spread(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x [ROWS, COLUMNS]`` as it is, over the threads as a matrix product has its sums: four by four numbers each, so
    that sixteen steps of a sum read eight numbers. Left alone, a thread has one column, and reads as much as it
    computes; a product (here of zeros) is where the compiler decides on that form and carries it through a loop."""
    rows, columns = tl.zeros([ROWS, 16], dtype=tl.float32), tl.zeros([16, COLUMNS], dtype=tl.float32)
    return tl.dot(rows, columns, x, input_precision="ieee")


@triton.jit
def squared_distances(points, centers, n, j, stride, width, d, BN: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr):
    """[BN, BK] of ``points [d, stride]`` and ``centers [d, width]``, float32; squares in blocks, these compensated."""
    total = spread(tl.zeros([BN, BK], dtype=tl.float32), BN, BK)
    lost = tl.zeros([BN, BK], dtype=tl.float32)
    wide = tl.zeros([], dtype=tl.int64)
    for begin in range(0, d, BLOCK):
        part = tl.zeros([BN, BK], dtype=tl.float32)
        for i in tl.static_range(BLOCK):
            k = wide + (begin + i)
            z = tl.load(points + k * stride + n, mask=k < d, other=0.0)
            mu = tl.load(centers + k * width + j, mask=k < d, other=0.0)
            difference = z[:, None] - mu[None, :]
            part += difference * difference
        total, lost = careful_add(total, lost, part)
    return total


@triton.jit(do_not_specialize=["N"])
def scaled_distances(
    points, centers, ratios, N, K, d, stride, width, alpha, BN: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr
):
    """``ratios [K, stride]``: the squared distances over alpha."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.program_id(1) * BK + tl.arange(0, BK)
    value = squared_distances(points, centers, n, j, stride, width, d, BN, BK, BLOCK)
    at = ratios + j.to(tl.int64)[None, :] * stride + n[:, None]
    tl.store(at, tl.div_rn(value, alpha), mask=(n < N)[:, None] & (j < K)[None, :])


@triton.jit(do_not_specialize=["N"])
def points_gradient(
    z, centers, weights, dz, N, K, d, stride, width, BN: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr
):
    """``dz [N, d]``, the sum over j of w_ij (z_i - mu_j), with ``weights [K, stride]`` and ``centers [K, width]``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    ok = (n < N)[:, None] & (k < d)[None, :]
    at = n.to(tl.int64)[:, None] * d + k[None, :]
    x = spread(tl.load(z + at, mask=ok, other=0.0).to(tl.float32), BN, BD)
    total = tl.zeros([BN, BD], dtype=tl.float32)
    wide = tl.zeros([], dtype=tl.int64)
    for begin in range(0, K, BLOCK):
        part = tl.zeros([BN, BD], dtype=tl.float32)
        for i in tl.static_range(BLOCK):
            j = wide + (begin + i)
            w = tl.load(weights + j * stride + n, mask=j < K, other=0.0)
            mu = tl.load(centers + j * width + k, mask=j < K, other=0.0)
            part += w[:, None] * (x - mu[None, :])
        total += part
    tl.store(dz + at, total, mask=ok)


@triton.jit(do_not_specialize=["N", "span"])
def centers_gradient(
    z, centers, weights, sums, N, K, d, width, span, BK: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds to ``sums [splits, K, d]`` the sum over i of w_ij (mu_j - z_i), with ``weights [N, width]``; split s takes
    the ``span`` points from s * span."""
    j = tl.program_id(0) * BK + tl.arange(0, BK)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    split = tl.program_id(2)
    k_ok = k < d
    ok = (j < K)[:, None] & k_ok[None, :]
    mu = tl.load(centers + j.to(tl.int64)[:, None] * d + k[None, :], mask=ok, other=0.0).to(tl.float32)
    mu = spread(mu, BK, BD)
    total = tl.zeros([BK, BD], dtype=tl.float32)
    wide = tl.zeros([], dtype=tl.int64)
    begin = split * span
    end = tl.minimum(begin + span, N)
    for first in range(begin, end, BLOCK):
        part = tl.zeros([BK, BD], dtype=tl.float32)
        for i in tl.static_range(BLOCK):
            n = wide + (first + i)
            w = tl.load(weights + n * width + j, mask=n < end, other=0.0)
            x = tl.load(z + n * d + k, mask=k_ok & (n < end), other=0.0).to(tl.float32)
            part += w[:, None] * (mu - x[None, :])
        total += part
    at = sums + (wide + split) * K * d + j.to(tl.int64)[:, None] * d + k[None, :]
    tl.store(at, tl.load(at, mask=ok, other=0.0) + total, mask=ok)


# Along the centres of a point. Numerators of q are relative to that of the nearest centre, so the largest is 1 however
# far all centres are: (1 + ratio_j) / (1 + least) is 1 + excess_j, and u_j = (1 + excess_j)^(-(alpha + 1) / 2).


@triton.jit
def excess_of(ratio, least):
    """(1 + ratio) / (1 + least) - 1."""
    return tl.div_rn(ratio - least, 1.0 + least)


@triton.jit
def numerator(excess, half_power, UNIT: tl.constexpr):
    """u relative to the largest. ``UNIT`` says that alpha is 1, and then there is no power."""
    if UNIT:
        u = tl.div_rn(1.0, 1.0 + excess)
    else:
        u = tl.exp(-half_power * log1p(excess))
    return u


@triton.jit
def load_ratios(ratios, n, n_ok, j, K, stride):
    """[BN, BK], infinite beyond the last centre."""
    ok = n_ok[:, None] & (j < K)[None, :]
    return tl.load(ratios + j.to(tl.int64)[None, :] * stride + n[:, None], mask=ok, other=INFINITY)


@triton.jit
def row_sums(
    ratios,
    given,
    n,
    n_ok,
    K,
    stride,
    half_power,
    UNIT: tl.constexpr,
    SECOND: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``least [BN]``, the sum of u, and a second sum of the same walk: SECOND is "" (none), "given" (of ``given
    [N, K]``), "product" (of given times u) or "sharp" (of u^2 times ``given [K]``).

    The least ratio is known only at the end, so what has been summed is brought to each new one.
    """
    least = tl.full([BN], INFINITY, dtype=tl.float32)
    total = tl.zeros([BN], dtype=tl.float32)
    total_lost = tl.zeros([BN], dtype=tl.float32)
    second = tl.zeros([BN], dtype=tl.float32)
    second_lost = tl.zeros([BN], dtype=tl.float32)
    for begin in range(0, K, BK):
        j = begin + tl.arange(0, BK)
        ok = n_ok[:, None] & (j < K)[None, :]
        ratio = load_ratios(ratios, n, n_ok, j, K, stride)
        now = tl.minimum(least, tl.min(ratio, axis=1))
        shrink = numerator(excess_of(least, now), half_power, UNIT)
        least = now
        u = tl.where(ok, numerator(excess_of(ratio, now[:, None]), half_power, UNIT), 0.0)
        total, total_lost = careful_add(total * shrink, total_lost * shrink, tl.sum(u, axis=1))
        if SECOND == "given" or SECOND == "product":
            value = tl.load(given + n.to(tl.int64)[:, None] * K + j[None, :], mask=ok, other=0.0).to(tl.float32)
            if SECOND == "product":
                second, second_lost = careful_add(second * shrink, second_lost * shrink, tl.sum(value * u, axis=1))
            else:
                second, second_lost = careful_add(second, second_lost, tl.sum(value, axis=1))
        if SECOND == "sharp":
            inverse = tl.load(given + j, mask=j < K, other=0.0)
            square = shrink * shrink
            sharp = tl.sum(u * (u * inverse[None, :]), axis=1)
            second, second_lost = careful_add(second * square, second_lost * square, sharp)
    return least, total, second


@triton.jit
def store_weights(columns, rows, w, n, n_ok, j, K, stride, width):
    """The weights for the gradients: ``columns [K, stride]`` for that of the points, ``rows [N, width]`` for that of
    the centres; None for one that is not wanted."""
    ok = n_ok[:, None] & (j < K)[None, :]
    if columns is not None:
        tl.store(columns + j.to(tl.int64)[None, :] * stride + n[:, None], w, mask=ok)
    if rows is not None:
        tl.store(rows + n.to(tl.int64)[:, None] * width + j[None, :], w, mask=ok)


# Launchers.


def check_points(op: str, z: Tensor, centers: Tensor) -> tuple[int, int, int]:
    """The sizes (N, d, K), with both inputs found to have the size they say.

    Raises:
        RuntimeError: the dtype is float64.
        ValueError: the centres have another size, dtype or device than the points.
    """
    if z.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"the Triton {op} serves float32, float16 and bfloat16, not {z.dtype}; use the reference")
    points, features = z.shape
    expect((("centers", centers, (centers.shape[0], features), z.dtype),), z.device)
    return points, features, centers.shape[0]


@dataclass(frozen=True)
class Sizes:
    """N points, d features, K centres, and what follows of d and K: the points of a chunk, the tiles, the blocks."""

    N: int
    d: int
    K: int

    @property
    def chunk(self) -> int:
        """Points that are worked on at a time: a multiple of :data:`TILE`."""
        return min(max(LEAST_POINTS, CHUNK_NUMBERS // max(self.K, self.d)) // TILE * TILE, whole(self.N))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """``(begin, end)`` of each."""
        for begin in range(0, self.N, self.chunk):
            yield begin, min(begin + self.chunk, self.N)

    @property
    def splits(self) -> int:
        """How many partial sums the centres' gradient has."""
        tiles = -(-self.K // tile(self.K)) * -(-self.d // tile(self.d))
        room = SUM_NUMBERS // (self.K * self.d)
        return max(1, min(SUM_PROGRAMS // tiles, room, self.chunk // SPAN_POINTS))


def tile(size: int) -> int:
    """The tile that cuts a dimension of that size."""
    return min(TILE, max(16, power_of_two(size)))


def whole(size: int) -> int:
    """The size rounded up to whole tiles."""
    return -(-size // TILE) * TILE


def outer_grid(programs: tuple[int, ...], rows: int, columns: int) -> Grid:
    """For programs with a tile of sums [rows, columns]: sixteen numbers for each thread, and more threads than rows or
    columns, or these would be read once and handed round, and not by each thread that needs them."""
    return Grid(programs, max(4, rows * columns // 512))


def block(size: int) -> int:
    """Terms that are added up before they are added to the rest."""
    return min(BLOCK, power_of_two(size))


def padded(values: Tensor, width: int) -> Tensor:
    """``[rows, columns]`` as ``[rows, width]`` in float32. What is beyond is undefined."""
    made = values.new_empty((values.shape[0], width), dtype=torch.float32)
    made[:, : values.shape[1]] = values
    return made


def distances_launch(points: Tensor, centers: Tensor, ratios: Tensor, N: int, alpha: float) -> Launch:
    """:func:`scaled_distances` of ``points [d, stride]`` and ``centers [d, width]`` into ``ratios [K, stride]``."""
    (d, width), K = centers.shape, ratios.shape[0]
    BK = tile(K)
    return Launch(
        scaled_distances,
        outer_grid((-(-N // TILE), -(-K // BK)), TILE, BK),
        {
            "points": points,
            "centers": centers,
            "ratios": ratios,
            "N": N,
            "K": K,
            "d": d,
            "stride": ratios.shape[1],
            "width": width,
            "alpha": alpha,
        },
        {"BN": TILE, "BK": BK, "BLOCK": block(d)},
    )


def points_gradient_launch(z: Tensor, centers: Tensor, weights: Tensor, dz: Tensor) -> Launch:
    """:func:`points_gradient` of ``z [N, d]``, ``centers [K, width]``, ``weights [K, stride]`` into ``dz [N, d]``."""
    (N, d), (K, width) = z.shape, centers.shape
    BD = tile(d)
    return Launch(
        points_gradient,
        outer_grid((-(-N // TILE), -(-d // BD)), TILE, BD),
        {
            "z": z,
            "centers": centers,
            "weights": weights,
            "dz": dz,
            "N": N,
            "K": K,
            "d": d,
            "stride": weights.shape[1],
            "width": width,
        },
        {"BN": TILE, "BD": BD, "BLOCK": block(K)},
    )


def centers_gradient_launch(z: Tensor, centers: Tensor, weights: Tensor, sums: Tensor) -> Launch:
    """:func:`centers_gradient` of ``z [N, d]``, ``centers [K, d]``, ``weights [N, width]``, into ``sums``."""
    (N, d), K = z.shape, centers.shape[0]
    splits = sums.shape[0]
    BK, BD = tile(K), tile(d)
    return Launch(
        centers_gradient,
        outer_grid((-(-K // BK), -(-d // BD), splits), BK, BD),
        {
            "z": z,
            "centers": centers,
            "weights": weights,
            "sums": sums,
            "N": N,
            "K": K,
            "d": d,
            "width": weights.shape[1],
            "span": -(-N // (splits * BLOCK)) * BLOCK,
        },
        {"BK": BK, "BD": BD, "BLOCK": BLOCK},
    )


@dataclass(frozen=True)
class Chunk:
    """What the operation's own kernel sees of a chunk: points ``begin`` to ``end``, ``ratios [K, stride]``, in whose
    place go the weights for the points' gradient if ``columns``, and ``rows [N, width]`` for those of the centres'."""

    begin: int
    end: int
    ratios: Tensor
    columns: bool
    rows: Tensor | None


def walk(
    z: Tensor,
    centers: Tensor,
    alpha: float,
    own: Callable[[Chunk], Launch],
    dz: Tensor | None,
    dcenters: Tensor | None,
) -> None:
    """All chunks of ``z [N, d]``: distances, the operation's ``own`` kernel, and the gradients that are not None."""
    z, centers = z.contiguous(), centers.contiguous()
    (N, d), K = z.shape, centers.shape[0]
    sizes = Sizes(N, d, K)
    columns = padded(centers.t(), whole(K))
    beside = None if dz is None else padded(centers, whole(d))
    ratios = z.new_empty((K, sizes.chunk), dtype=torch.float32)
    rows = sums = None
    if dcenters is not None:
        rows = z.new_empty((sizes.chunk, whole(K)), dtype=torch.float32)
        sums = z.new_zeros((sizes.splits, K, d), dtype=torch.float32)
    for begin, end in sizes.chunks():
        part = z[begin:end]
        distances_launch(padded(part.t(), sizes.chunk), columns, ratios, end - begin, alpha).run()
        own(Chunk(begin, end, ratios, dz is not None, rows)).run()
        if dz is not None and beside is not None:
            points_gradient_launch(part, beside, ratios, dz[begin:end]).run()
        if rows is not None and sums is not None:
            centers_gradient_launch(part, centers, rows, sums).run()
    if dcenters is not None and sums is not None:
        dcenters.copy_(sums.sum(0))
