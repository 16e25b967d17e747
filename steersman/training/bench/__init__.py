"""Benchmarks: `steersman bench`."""
