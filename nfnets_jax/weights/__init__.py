"""Reads and writes published weights.

`load` returns the parameters in a file; `read` and `write` also the metadata;
`locate` checks a path, 'released' or 'hf-hub:OWNER/NAME', and `fetch` also
downloads.
"""

# ruff: noqa: E402
from nfnets_jax import extras

extras.need('models', 'haiku', 'ml_dtypes', 'safetensors', 'tqdm')

from nfnets_jax.weights.metadata import Weights
from nfnets_jax.weights.reading import load, read
from nfnets_jax.weights.sources import fetch, locate
from nfnets_jax.weights.writing import FORMS, write

__all__ = ['FORMS', 'Weights', 'fetch', 'load', 'locate', 'read', 'write']
