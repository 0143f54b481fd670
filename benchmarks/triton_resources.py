"""``python -m benchmarks.triton_resources``: compiles every Triton kernel for GPUs that are not there, prints what each
takes of one and writes the table to ``benchmarks/results/triton_resources.md``. tests/test_triton_compile.py compiles
the same and fails on a spill."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastseq.kernels import (
    clustering_loss,
    clusters,
    lstm,
    nearest_center,
    plan,
    rnn,
    student_t,
    target_distribution,
)
from fastseq.kernels.ahead import TARGETS, Resources, compile_ahead
from fastseq.kernels.launch import Grid, Launch, whole_loads
from fastseq.ops.tape import padded, slopes_shape, tape_shapes

TABLE = Path(__file__).resolve().parent / "results" / "triton_resources.md"

#: Multiprocessors and shared memory of the GPU that a plan is made for: A100, H100, B200 and MI300X.
CHIPS = {
    "sm_80": plan.Chip(108, TARGETS["sm_80"][1], 8),
    "sm_90": plan.Chip(132, TARGETS["sm_90"][1], 9),
    "sm_100": plan.Chip(148, TARGETS["sm_100"][1], 10),
    "gfx942": plan.Chip(304, TARGETS["gfx942"][1], 0),
}


@dataclass(frozen=True)
class Configuration:
    """One pass of one layer. ``options`` is "" (plain), "flags", or "all": flags, masks, zoneout, peepholes at once."""

    op: str
    backward: bool
    T: int
    B: int
    H: int
    dtype: str
    precision: str = "ieee"
    options: str = ""
    sync: str = "counter"

    @property
    def sizes(self) -> str:
        """As the table shows them."""
        return f"{self.T}, {self.B}, {self.H}"

    @property
    def name(self) -> str:
        """What the row of the table is called."""
        kind = self.dtype if self.dtype != "float32" else f"float32 {self.precision}"
        notes = [self.options] * bool(self.options) + ([f"sync by {self.sync}"] if self.sync != "counter" else [])
        return ", ".join([f"{self.op} {'backward' if self.backward else 'forward'}", kind, *notes])

    def tiles(self, chip: plan.Chip) -> str:
        """The regime and the tile that the shape takes on a chip, as the table shows them."""
        made, _ = self.launch(chip)
        spread = {"held": "P", "held in part": "q", "streamed": "p"}[made.cut.kept]
        letter = {"resident": "R", "persistent": spread, "step": "S"}[made.regime]
        return f"{letter} {made.BB}×{made.BH}"

    def launch(self, chip: plan.Chip) -> tuple[plan.Plan, Launch]:
        """The plan on a chip, and its first launch on tensors without memory."""
        chosen = {"sync": self.sync} if self.sync != "counter" else {}
        with plan.override(**chosen):
            dtype = getattr(torch, self.dtype)
            gates = 4 if self.op == "lstm" else 1
            shape = plan.Shape(gates, self.backward, self.T, self.B, self.H, dtype.itemsize)
            made = plan.choose(shape, chip, self.precision)
        launches = _lstm(self, made, dtype) if self.op == "lstm" else _rnn(self, made, dtype)
        return made, next(launches)


#: Kernels of points and centres, by the operation's own walk along the centres where there is one.
CLUSTERING = (
    "distances",
    "points' gradient",
    "centres' gradient",
    "assignment",
    "arriving gradient",
    "loss of a target",
    "loss of frequencies",
    "nearest centre",
    "target",
)


@dataclass(frozen=True)
class ClusteringConfiguration:
    """One kernel of :data:`CLUSTERING` on a chunk of points."""

    kernel: str
    d: int
    K: int
    dtype: str
    alpha: float = 1.0

    @property
    def sizes(self) -> str:
        """As the table shows them."""
        return f"d {self.d}, K {self.K}"

    @property
    def name(self) -> str:
        """What the row of the table is called."""
        return f"clustering, {self.kernel}, {self.dtype}" + ("" if self.alpha == 1 else f", alpha {self.alpha:g}")

    def tiles(self, chip: plan.Chip) -> str:
        """The tile, as the table shows it."""
        _, launch = self.launch(chip)
        sizes = [str(launch.constants[name]) for name in ("BN", "BK", "BD") if name in launch.constants]
        return "×".join(sizes)

    def launch(self, chip: plan.Chip) -> tuple[Grid, Launch]:
        """Its launch on tensors without memory; the same on every chip."""
        found = _clustering(self)
        assert isinstance(found.plan, Grid)
        return found.plan, found


def _clustering(case: ClusteringConfiguration) -> Launch:
    d, K, dtype, wide = case.d, case.K, getattr(torch, case.dtype), torch.float32
    N = clusters.Sizes(1 << 20, d, K).chunk
    z, by_center, of_centers = _meta(N, d, dtype=dtype), _meta(N, K, dtype=dtype), _meta(K, d, dtype=dtype)
    points, columns = _meta(d, N, dtype=wide), _meta(d, clusters.whole(K), dtype=wide)
    ratios, rows = _meta(K, N, dtype=wide), _meta(N, clusters.whole(K), dtype=wide)
    losses = _meta(N, dtype=wide)
    chunk = clusters.Chunk(0, N, ratios, True, rows)
    if case.kernel == "distances":
        return clusters.distances_launch(points, columns, ratios, N, case.alpha)
    if case.kernel == "points' gradient":
        return clusters.points_gradient_launch(z, _meta(K, clusters.whole(d), dtype=wide), ratios, z)
    if case.kernel == "centres' gradient":
        return clusters.centers_gradient_launch(z, of_centers, rows, _meta(8, K, d, dtype=wide))
    if case.kernel == "assignment":
        return student_t.assign_launch(chunk, by_center, case.alpha)
    if case.kernel == "arriving gradient":
        return student_t.arriving_launch(chunk, by_center, case.alpha)
    if case.kernel == "loss of a target":
        return clustering_loss.loss_launch(chunk, by_center, None, losses, case.alpha, 1.0)
    if case.kernel == "loss of frequencies":
        return clustering_loss.loss_launch(chunk, None, _meta(K, dtype=wide), losses, case.alpha, 1.0)
    if case.kernel == "nearest centre":
        return nearest_center.nearest_launch(points, columns, K, _meta(N, dtype=torch.int64), _meta(N, dtype=dtype))
    return target_distribution.sharpen_launch(by_center, _meta(K, dtype=wide), by_center)


def compiles(case: Configuration | ClusteringConfiguration, target: str) -> bool:
    """Whether Triton compiles it to any use: on AMD there is no tf32x3, and the flags' fence is NVIDIA's assembly."""
    if isinstance(case, ClusteringConfiguration):
        # On AMD the form that sums of outer products take makes them spill: not served there until it has its own.
        return target != "gfx942"
    return target != "gfx942" or (case.precision != "tf32x3" and case.sync != "flags")


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lstm(case: Configuration, made: plan.Plan, dtype: torch.dtype) -> Iterator[Launch]:
    T, B, H = case.T, case.B, case.H
    c_shape, gates_shape = tape_shapes(T, B, H)
    gates, c = _meta(*gates_shape, dtype=torch.float32), _meta(*c_shape, dtype=torch.float32)
    y, h, w = _meta(T, B, H, dtype=dtype), _meta(B, H, dtype=dtype), _meta(4 * H, H, dtype=dtype)
    b, wide = _meta(4 * H, dtype=dtype), _meta(B, H, dtype=torch.float32)
    flags = _meta(T, B, dtype=torch.uint8) if case.options else None
    options: dict[str, Any] = {}
    if case.options == "all":
        zoneout = _meta(T, B, H, dtype=torch.uint8)
        options = {"h_mask": h, "zoneout_h": zoneout, "zoneout_c": zoneout, "peephole": _meta(3, H, dtype=dtype)}
    if case.backward:
        dgates = _meta(T, B, whole_loads(4 * H, dtype), dtype=dtype)
        return lstm.backward_launches(made, y, w, gates, c, h, dgates, wide, wide, flags, False, **options)
    return lstm.forward_launches(made, gates, w, b, b, h, wide, y, c, flags, False, **options)


def _rnn(case: Configuration, made: plan.Plan, dtype: torch.dtype) -> Iterator[Launch]:
    T, B, H = case.T, case.B, case.H
    tape = _meta(*slopes_shape(T, B, H), dtype=torch.float32)
    y, h, w, b = (_meta(*shape, dtype=dtype) for shape in ((T, B, H), (B, H), (H, H), (H,)))
    flags = _meta(T, B, dtype=torch.uint8) if case.options else None
    mask = h if case.options == "all" else None
    if case.backward:
        dsums, wide = _meta(T, B, padded(H), dtype=dtype), _meta(B, H, dtype=torch.float32)
        return rnn.backward_launches(made, y, w, tape, dsums, wide, flags, False, mask)
    return rnn.forward_launches(made, tape, w, b, b, h, y, True, flags, "tanh", False, mask)


def configurations() -> list[Configuration]:
    """The shapes of the GPU benchmark in every dtype, each regime with every option, and the corners of the plans."""
    lstm_shapes = [
        (1024, 16, 768),
        (512, 64, 512),
        (128, 32, 256),
        (100, 256, 128),
        (2000, 8, 384),
        (1000, 32, 1024),
        (35, 20, 650),
    ]
    rnn_shapes = [(1000, 4, 1792), (512, 64, 512), (100, 256, 128)]
    corners = [
        (64, 16, 20),
        (64, 40, 63),
        (64, 300, 512),
        (64, 16, 331),
        (64, 16, 1500),
        (64, 16, 1900),
        (1, 16, 512),
        (64, 128, 320),
    ]
    precise = [("float16", "ieee"), ("bfloat16", "ieee"), *(("float32", precision) for precision in plan.PRECISIONS)]
    found = []
    for op, shapes in (("lstm", lstm_shapes + corners), ("rnn", rnn_shapes + corners)):
        for backward in (False, True):
            for shape in shapes:
                found += [Configuration(op, backward, *shape, *kind) for kind in precise]
                found += [Configuration(op, backward, *shape, "float16", options=what) for what in ("flags", "all")]
            # The most units of a cooperative launch, and rows of which no two numbers may be read at once.
            odd = [("float16", ""), ("float16", "flags"), ("float16", "all"), ("bfloat16", ""), ("bfloat16", "all")]
            for size in (2045, 2111):
                found += [Configuration(op, backward, 64, 16, size, dtype, options=what) for dtype, what in odd]
                found.append(Configuration(op, backward, 64, 16, size, "float32", "tf32"))
            found.append(Configuration(op, backward, 512, 64, 512, "float32", options="all"))
            found.append(Configuration(op, backward, 512, 64, 512, "float16", sync="flags"))
            found.append(Configuration(op, backward, 512, 64, 512, "bfloat16", options="all", sync="flags"))
    return found


def clustering_configurations() -> list[ClusteringConfiguration]:
    """Every kernel of clustering at the shapes of the GPU benchmark, large ones and small ones, in every dtype."""
    return [
        ClusteringConfiguration(kernel, d, K, dtype, alpha)
        for kernel in CLUSTERING
        for d, K in ((10, 10), (64, 1000))
        for dtype, alpha in (("float32", 1.0), ("bfloat16", 2.0))
    ]


Case = Configuration | ClusteringConfiguration


def compile_pair(pair: tuple[Case, str]) -> Resources:
    """What a case takes on a target."""
    case, target = pair
    return compile_ahead(case.launch(CHIPS[target])[1], target)


def compile_all(cases: Sequence[Case], targets: list[str]) -> dict[tuple[Case, str], Resources]:
    """What each takes on each target."""
    pairs = [(case, target) for case in cases for target in targets if compiles(case, target)]
    # In processes: compilations side by side in one have been seen to disturb each other's registers.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = {}
        for pair, resources in zip(pairs, pool.map(compile_pair, pairs), strict=True):
            found[pair] = resources
            if len(found) % 40 == 0:
                print(f"{len(found)} of {len(pairs)}", file=sys.stderr, flush=True)
    return found


def table(found: dict[tuple[Case, str], Resources], targets: list[str]) -> str:
    """The figures as Markdown."""
    lines = [
        "# What the Triton kernels take of a GPU",
        "",
        f"Compiled ahead of time by Triton {triton.__version__} with no GPU (`python -m benchmarks.triton_resources`).",
        "The kernels have **not run on a GPU yet**. A cell is registers of a thread / shared memory of a program in",
        "KiB, the bytes of a thread that are spilled where there are any, and the plan that the shape takes there:",
        "R resident, P persistent (q: with part of the weights streamed, p: with all of them), S one launch per",
        "step; the tile of batch by units.",
        "Of the clustering kernels, the tile of points or centres by centres or features. Not in the table: an LSTM",
        "forward in float32 without tensor cores, at 2,111 units, spills 32 to 56 bytes of a thread on sm_100.",
        "",
        "| kernel | T, B, H | " + " | ".join(targets) + " |",
        "|---|---|" + "---|" * len(targets),
    ]
    for case in dict.fromkeys(case for case, _ in found):
        cells = []
        for target in targets:
            if not compiles(case, target):
                cells.append("–")
                continue
            resources = found[case, target]
            spilled = f" **spills {resources.spilled}**" if resources.spilled else ""
            cells.append(f"{resources.registers} / {resources.shared / 1024:.0f}{spilled} {case.tiles(CHIPS[target])}")
        lines.append(f"| {case.name} | {case.sizes} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def merged(old: str, new: str, cases: list[Case]) -> str:
    """The new table with the rows of the old one that it has not, in the order of the cases."""
    starts = [f"| {case.name} | {case.sizes} |" for case in cases]
    rows = {
        start: line for text in (old, new) for line in text.splitlines() for start in starts if line.startswith(start)
    }
    head = [line for line in new.splitlines() if not line.startswith(tuple(starts))]
    return "\n".join([*head, *(rows[start] for start in dict.fromkeys(starts) if start in rows)]) + "\n"


def main() -> int:
    """Compiles, prints, writes; 1 when a kernel spills or takes more shared memory than there is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_resources", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target (may be repeated)")
    parser.add_argument("--rows", default="", help="only rows whose name contains this; the others stay as they are")
    parser.add_argument("--output", type=Path, default=TABLE, help="where the table goes (%(default)s)")
    args = parser.parse_args()
    targets = args.target or list(TARGETS)
    cases: list[Case] = [*configurations(), *clustering_configurations()]
    found = compile_all([case for case in cases if args.rows in case.name], targets)
    text = table(found, targets)
    if args.rows:
        text = merged(args.output.read_text(encoding="utf-8"), text, cases)
    print(text)
    args.output.write_text(text, encoding="utf-8")
    wrong = [key for key, value in found.items() if value.spilled or value.shared > TARGETS[key[1]][1]]
    for case, target in wrong:
        print(f"{target}: {case.name} {case.sizes}: {found[case, target]}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
