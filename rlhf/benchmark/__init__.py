"""Benchmarks: the same work done by this trainer and by TRL 1.12's, each run in a separate process."""
