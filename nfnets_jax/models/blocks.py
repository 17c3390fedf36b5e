"""Parts of residual blocks: SkipInit and squeeze-excite gates."""

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax.models import activations, layers, precision


def skip_init(branch: jax.Array, scale: float = 1.0) -> jax.Array:
  """Multiplies a branch by `scale` and a learnable scalar, initially zero.

  The scalar is the parameter `skip_gain` of the calling module.

  Args:
    branch: residual branch `[B, H, W, C]`.
    scale: constant factor.

  Reference:
    De and Smith 2020, https://arxiv.org/abs/2002.10444.
  """
  gain = hk.get_parameter(
    'skip_gain', (), jnp.float32, hk.initializers.Constant(0.0)
  )
  return (precision.widen(branch) * (gain * scale)).astype(branch.dtype)


class SqueezeExcite(hk.Module):
  """Squeeze-and-excitation gate: sigmoid(W₂·act(W₁·mean(h))).

  Returns only the gate, in (0, 1); `gated` multiplies by it.

  Differences:
    The paper's formula has a scaled GELU between the two layers; here, as in
    the released code, it is an unscaled ReLU.

  Reference:
    Hu et al. 2018, https://arxiv.org/abs/1709.01507; Brock et al. 2021,
    appendix C.
  """

  def __init__(
    self,
    channels: int,
    hidden_channels: int,
    *,
    act: Callable[[jax.Array], jax.Array] = activations.relu,
    w_init: hk.initializers.Initializer | None = None,
    name: str | None = None,
  ):
    """Constructs the gate.

    Args:
      channels: C, channels of the features.
      hidden_channels: channels between the two layers.
      act: nonlinearity between them.
      w_init: initialiser of both weights; None means that of `Linear`.
      name: name of the Haiku module.
    """
    super().__init__(name=name)
    self.act = act
    self.reduce = layers.Linear(hidden_channels, w_init=w_init, name='linear')
    self.expand = layers.Linear(channels, w_init=w_init, name='linear_1')

  def __call__(self, mean: jax.Array) -> jax.Array:
    """Maps the mean over the pixels `[B, C]` to the gate `[B, 1, 1, C]`."""
    gate = jax.nn.sigmoid(self.expand(self.act(self.reduce(mean))))
    return gate[:, None, None, :]


def gate(channels: int, se_ratio: float) -> SqueezeExcite:
  """Returns a gate with `se_ratio · channels` hidden channels, at least 1."""
  return SqueezeExcite(channels, max(1, int(channels * se_ratio)))


def gated(
  x: jax.Array,
  squeeze_excite: SqueezeExcite,
  scale: float = 2.0,
  mean: jax.Array | None = None,
) -> jax.Array:
  """Multiplies features by a squeeze-excite gate and by `scale`.

  Args:
    x: features `[B, H, W, C]`.
    squeeze_excite: the gate.
    scale: 2 preserves the variance, as the gate is initially about one half.
    mean: mean of `x` over the pixels, `[B, C]`, if known.
  """
  if mean is None:
    mean = jnp.mean(x, axis=(1, 2))
  factor = precision.widen(scale * squeeze_excite(mean))
  return (precision.widen(x) * factor).astype(x.dtype)
