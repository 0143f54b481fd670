"""What is timed: one list of cases, behind ``python -m fastseq bench`` and ``python -m pytest benchmarks`` alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

# forward: without gradient. training: forward and BPTT, with the gradients of the input and of every weight. first: the
# first forward call of a shape that the process has not seen. step: one time step, the state going in and coming out.
MODES = ("forward", "training", "first", "step")

# How the time structure or the precision differs from a plain padded batch:
#   lengths   sequences of uneven length; fastseq takes `lengths`, torch.nn packs the padded batch and pads the result
#   packed    the same sequences, code unchanged: both libraries pack the padded batch and pad the result
#   reset     episodes that start within a sequence; fastseq takes `reset`, the peer is a loop over steps with torch.nn
#   autocast  float32 layers under torch.autocast("cpu", bfloat16)
#   recompute fastseq keeps no gates for the backward; the peer is torch.nn's plain layer
# and these of one LSTM layer, as fastseq.functional.lstm takes them; the peer is the loop over steps in PyTorch's own
# operations that they replace (fastseq.reference.lstm):
#   reset_state, recurrent_dropout, zoneout, peephole, cell_clip, grad_clip, layer_norm (torchaudio's)
OPTION_VARIANTS = (
    "reset_state",
    "recurrent_dropout",
    "zoneout",
    "peephole",
    "cell_clip",
    "grad_clip",
    "layer_norm",
)
VARIANTS = ("plain", "lengths", "packed", "reset", "autocast", "recompute", *OPTION_VARIANTS)
# Timed beside fastseq's plain layer too, which shows what the option costs.
COSTED_VARIANTS = ("lengths", "reset", "recompute", *OPTION_VARIANTS)

MEAN_LENGTH = 0.62  # of T, where lengths are uneven
RESET_PROBABILITY = 0.02  # per step and sequence
QUICK_GFLOP = 15.0  # --quick leaves out what takes more arithmetic than this


@dataclass(frozen=True)
class Case:
    """One operation at one shape, dtype and mode."""

    op: str
    mode: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    dtype: str = "float32"
    nonlinearity: str = "tanh"  # RNN only
    proj_size: int = 0  # LSTM only
    variant: str = "plain"

    @property
    def kind(self) -> str:
        """What the case is, besides its shape and mode."""
        notes = [self.op if self.op == "lstm" else f"{self.op} {self.nonlinearity}"]
        if self.dtype != "float32":
            notes.append(self.dtype)
        if self.proj_size:
            notes.append(f"proj_size {self.proj_size}")
        if self.variant != "plain":
            named = {"lengths": "uneven lengths", "autocast": "bfloat16 autocast"}
            notes.append(named.get(self.variant, self.variant.replace("_", " ")))
        return ", ".join(notes)

    @property
    def shape(self) -> str:
        """T, B, I, H and layers."""
        return f"{self.T}, {self.B}, {self.I}, {self.H}, {self.layers}"

    @property
    def key(self) -> str:
        """The name by which a case is selected, and found again in an older run."""
        parts = [self.op if self.op == "lstm" else f"{self.op}_{self.nonlinearity}"]
        parts.append(f"{self.T}x{self.B}x{self.I}x{self.H}x{self.layers}")
        parts.append(self.dtype)
        if self.proj_size:
            parts.append(f"proj{self.proj_size}")
        if self.variant != "plain":
            parts.append(self.variant)
        return "-".join([*parts, self.mode])

    @property
    def gates(self) -> int:
        """Pre-activations per hidden unit."""
        return 4 if self.op == "lstm" else 1

    @property
    def P(self) -> int:
        """The width of h."""
        return self.proj_size or self.H

    @property
    def item_bytes(self) -> int:
        """Bytes of a number as it is stored."""
        return {"bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]

    def gflop(self, steps: int | None = None) -> float:
        """Arithmetic of one call in 10^9 operations: the matrix products, a multiply-add counted as two.

        Training counts three times the forward: the products with the transposed weights, and the weights' gradients.

        Args:
            steps: time steps that are no padding, over all sequences (default T · B).
        """
        per_step = 0
        for layer in range(self.layers):
            width = self.I if layer == 0 else self.P
            per_step += self.gates * self.H * (width + self.P) + (self.H * self.P if self.proj_size else 0)
        passes = 3 if self.mode == "training" else 1
        return 2e-9 * passes * per_step * (self.T * self.B if steps is None else steps)

    def recurrent_bytes(self) -> int:
        """Size of one layer's recurrent weights, every byte of which each step reads."""
        return self.item_bytes * (self.gates * self.H * self.P + (self.H * self.P if self.proj_size else 0))


# T, B, I, H, layers: from one streaming step to what fills the machine, on both sides of every cache, odd widths too.
Shape = tuple[int, int, int, int, int]
SHAPES: tuple[Shape, ...] = (
    (128, 32, 256, 256, 1),
    (128, 1, 256, 256, 1),
    (1, 1, 256, 256, 1),
    (512, 64, 512, 512, 1),
    (100, 64, 128, 128, 2),
    (1000, 1, 128, 128, 1),
    (35, 20, 650, 650, 2),
    (64, 256, 64, 64, 1),
    (1000, 8, 32, 1024, 1),
    (365, 256, 27, 256, 1),
    (2000, 1, 96, 384, 1),
)
AUTOCAST_SHAPES = ((128, 32, 256, 256, 1), (64, 256, 64, 64, 1), (100, 64, 128, 128, 2), (35, 20, 650, 650, 2))


def _cases() -> Iterator[Case]:
    """Modes of one shape follow one another, so that the problem is made and the truth is computed once for them."""
    for shape in SHAPES:
        yield from (Case("lstm", mode, *shape) for mode in ("forward", "training"))
    yield from (Case("lstm", "forward", *shape, dtype="bfloat16") for shape in SHAPES)
    yield from (Case("lstm", "training", *shape, variant="autocast") for shape in AUTOCAST_SHAPES)
    standard = Case("lstm", "training", 128, 32, 256, 256)
    for special in (
        replace(standard, variant="lengths"),
        replace(standard, dtype="float64"),
        replace(standard, proj_size=128),
    ):
        yield from (replace(special, mode="forward"), special)
    yield replace(standard, variant="packed")
    yield replace(standard, variant="reset")
    yield replace(standard, variant="recompute")
    yield from (replace(standard, variant=variant) for variant in OPTION_VARIANTS)
    yield Case("lstm", "training", 4096, 16, 256, 256)
    yield Case("lstm", "training", 4096, 16, 256, 256, variant="recompute")
    for elman in (
        Case("rnn", "training", 128, 32, 256, 256),
        Case("rnn", "training", 128, 32, 256, 256, nonlinearity="relu"),
        Case("rnn", "training", 64, 256, 64, 64),
        Case("rnn", "training", 1000, 1, 128, 128),
    ):
        yield from (replace(elman, mode="forward"), elman)
    yield Case("lstm", "step", 1, 1, 256, 256)
    yield Case("lstm", "first", 32, 8, 128, 128)
    yield Case("lstm", "first", 128, 32, 256, 256)


CASES = tuple(_cases())


def select(
    cases: Sequence[Case],
    *,
    ops: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    patterns: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Case]:
    """The cases of the given operations and modes whose key contains, or as a whole matches, one of the patterns."""
    return [
        case
        for case in cases
        if (ops is None or case.op in ops)
        and (modes is None or case.mode in modes)
        and (patterns is None or any(text in case.key or fnmatchcase(case.key, text) for text in patterns))
        and not (quick and case.gflop() > QUICK_GFLOP)
    ]
