import contextlib
from unittest import mock

import jax
from jax import lax

from nfnets_jax.models.settings import NFNetSettings

# Groups of 128 channels, for which TPUs have a form of their own.
WHOLE_LANES = NFNetSettings(
  width=(512,), depth=(1,), strides=(1,), group_width=(128,), drop_rate=0.0
)


@contextlib.contextmanager
def of(platform):
  """Makes programs on CPU take the forms for another platform."""

  def choose(*args, default, **forms):
    return forms.get(platform, default)(*args)

  jax.clear_caches()
  try:
    with mock.patch.object(lax, 'platform_dependent', choose):
      yield
  finally:
    jax.clear_caches()


def lowered(function, *args):
  """The text of a function for each platform."""
  traced = jax.jit(function).trace(*args)
  return {
    platform: traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ('cpu', 'tpu', 'cuda')
  }
