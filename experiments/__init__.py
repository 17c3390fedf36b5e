"""Which runs: configs, benchmarks, reports, and what came out."""
