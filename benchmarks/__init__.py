"""The benchmarks, written as data and run by ``pytest benchmarks/ --benchmark-only``; see docs/benchmarks.md."""
