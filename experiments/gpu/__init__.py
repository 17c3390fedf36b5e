"""Checks and measurements for an accelerator; see `run`."""
