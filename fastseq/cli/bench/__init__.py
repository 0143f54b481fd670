"""``python -m fastseq bench``: the layers beside torch.nn, onnxruntime and OpenVINO, in one process.

``cases`` says what is timed, ``providers`` who is, ``problem`` checks results before, ``measure`` times one case,
``goals`` judges a run, ``results`` stores and compares it, ``report`` and ``plots`` show it, and ``command`` is the
command line. ``benchmarks/`` uses the same cases.
"""

from fastseq.cli.bench.command import add_parser, run

__all__ = ["add_parser", "run"]
