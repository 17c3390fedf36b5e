"""Reading and writing of weights that others have published.

`load` returns the parameters in a file, `read` and `write` all that belongs to
them, and `fetch` downloads the released ones.
"""

# ruff: noqa: E402
from nfnets_jax import extras

extras.need('models', 'haiku', 'ml_dtypes', 'safetensors', 'tqdm')

from nfnets_jax.weights.download import fetch
from nfnets_jax.weights.files import FORMS, Weights, load, read, write

__all__ = ['FORMS', 'Weights', 'fetch', 'load', 'read', 'write']
