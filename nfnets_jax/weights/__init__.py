"""Reads and writes published weights.

`load` returns the parameters in a file, `read` and `write` also the metadata,
`fetch` downloads the released weights, and `locate` quickly checks a path.
"""

# ruff: noqa: E402
from nfnets_jax import extras

extras.need('models', 'haiku', 'ml_dtypes', 'safetensors', 'tqdm')

from nfnets_jax.weights.download import fetch
from nfnets_jax.weights.files import FORMS, Weights, load, read, write
from nfnets_jax.weights.sources import locate

__all__ = ['FORMS', 'Weights', 'fetch', 'load', 'locate', 'read', 'write']
