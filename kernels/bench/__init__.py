"""Benchmarks of the operators: every backend is held against float64 first, then timed beside its floor."""
