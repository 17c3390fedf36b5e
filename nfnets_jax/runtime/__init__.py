"""Devices, processes and files of a run; independent of the model."""
