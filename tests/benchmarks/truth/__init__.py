"""The tables of the truth page: `python -m tests.benchmarks.truth`."""
