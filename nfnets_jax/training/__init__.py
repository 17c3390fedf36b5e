"""The recipe and the training loop."""

from nfnets_jax import extras

extras.need(
  'train',
  'chex',
  'haiku',
  'jmp',
  'matplotlib',
  'ml_collections',
  'orbax.checkpoint',
  'tensorboardX',
  'tqdm',
)
