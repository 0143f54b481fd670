"""Benchmarks, one file per operation as in ``fastseq/ops``; ``results/`` holds the committed figures."""
