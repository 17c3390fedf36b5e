"""Small JPEGs to bench the input pipeline with."""

import io

import numpy as np
from PIL import Image


def make(count: int = 6) -> list[bytes]:
  """Returns JPEGs of 70 by 50 pixels."""
  rng = np.random.default_rng(0)
  found = []
  for _ in range(count):
    blocks = rng.integers(256, size=(5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((70, 50)).save(buffer, format='JPEG')
    found.append(buffer.getvalue())
  return found
