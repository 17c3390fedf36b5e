"""Configs of runs, benchmarks, figures and results."""
