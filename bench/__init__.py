"""Benchmarks: `python bench/bench.py` prints a table."""
