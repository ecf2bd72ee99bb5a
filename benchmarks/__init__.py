"""Benchmarks as data, run by ``pytest benchmarks/ --benchmark-only``; see docs/benchmarks.md."""
