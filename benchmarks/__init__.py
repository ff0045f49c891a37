"""Timing protocols; peers are measured in the same run. See `python -m benchmarks --help`."""
