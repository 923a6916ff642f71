"""Benchmarks: what is timed, on what inputs, and how the figures are kept."""
