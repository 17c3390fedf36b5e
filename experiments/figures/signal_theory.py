r"""Theory of signal propagation at initialisation, for nets with SkipInit off.

Activations are taken as Gaussian over pixels and images.

  * Normaliser-free: no mean; branches have variance 1; the stream has variance
    1 after the stem, 1 + α² after a transition, and α² more after each block.
  * Batch-normalised: a branch ends with BN → ReLU → He-initialised convolution.
    E[relu(z)²] = 1/2 and E[relu(z)]² = 1/(2π) for z ~ N(0, 1), and the
    convolution doubles both, so its second moment is 1, with squared mean 1/π
    and variance 1 − 1/π. The stream sums the branches since the last
    transition and the shortcut, which counts as one more.
  * Plain: ReLU and a He-initialised convolution keep the second moment q, so
    every block doubles it, as shortcut and branch have q each. The fraction c
    of q in the squared mean is the correlation of two pixels of different
    images, which ReLU maps to k(c) = (√(1 − c²) + c·(π − arccos c)) / π > c,
    three times in a branch and once in the shortcut of a transition. The max
    pooling of the stem leaves a positive mean, so the first ReLU cuts little
    and the first block has 4·E[relu(h)²], about 4q.

The last two start from the stem as measured.

Reference:
  Brock, De and Smith 2021, sections 3 and 4, https://arxiv.org/abs/2101.08692;
  for k, Cho and Saul 2009, "Kernel methods for deep learning".
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nfnets_jax.models import layout


@dataclasses.dataclass(frozen=True)
class Signal:
  """The statistics of a net of L blocks, averaged over channels.

  Attributes:
    sq_mean: `[L + 1]`, squared mean after the stem and after each block.
    variance: `[L + 1]`, variance likewise.
    branch: `[L]`, variance of each residual branch.
  """

  sq_mean: np.ndarray
  variance: np.ndarray
  branch: np.ndarray


def normaliser_free(arguments: Mapping[str, Any], measured: Signal) -> Signal:
  """Predicts the variance that every β assumes, and no mean.

  Example:
    >>> arguments = {'depth': (2, 1), 'alpha': 0.2}
    >>> normaliser_free(arguments, None).variance.round(2).tolist()
    [1.0, 1.04, 1.08, 1.04]
  """
  del measured
  # The β of an additional stage is that of the last block's output.
  betas = layout.predicted_stds((*arguments['depth'], 1), arguments['alpha'])
  variance = np.square(betas)
  return Signal(np.zeros(len(variance)), variance, np.ones(len(variance) - 1))


def batch_normalised(arguments: Mapping[str, Any], measured: Signal) -> Signal:
  """Predicts linear growth, reset at the transitions."""
  # The first block of a stage counts twice, for its shortcut.
  counts = [n + 2 for depth in arguments['depth'] for n in range(depth)]
  sq_mean, variance = 1 / math.pi, 1 - 1 / math.pi
  return Signal(
    np.array([measured.sq_mean[0], *(sq_mean * n for n in counts)]),
    np.array([measured.variance[0], *(variance * n for n in counts)]),
    np.full(len(counts), variance),
  )


def plain(arguments: Mapping[str, Any], measured: Signal) -> Signal:
  """Predicts a second moment that doubles with every block."""
  sq_mean, variance = float(measured.sq_mean[0]), float(measured.variance[0])
  moment = sq_mean + variance
  c = sq_mean / moment
  sq_means, variances, branches = [sq_mean], [variance], []
  for depth in arguments['depth']:
    for block in range(depth):
      if len(sq_means) == 1 and arguments['stem_pool']:
        inner, inner_c = rectify(sq_mean, variance)
      else:
        inner, inner_c = moment, relu_kernel(c)
      # After the convolution, which keeps c.
      branch_c = relu_kernel(relu_kernel(inner_c))
      if block == 0:
        moment, c = inner, inner_c
      c = (moment * c + inner * branch_c) / (moment + inner)
      moment += inner
      sq_means.append(moment * c)
      variances.append(moment * (1 - c))
      branches.append(inner * (1 - branch_c))
  return Signal(np.array(sq_means), np.array(variances), np.array(branches))


def relu_kernel(c: float) -> float:
  """Returns k(c), the correlation after a ReLU for correlation c before."""
  c = min(c, 1.0)
  return (math.sqrt(1 - c**2) + c * (math.pi - math.acos(c))) / math.pi


def rectify(sq_mean: float, variance: float) -> tuple[float, float]:
  """Applies ReLU and convolution to a Gaussian of positive mean.

  Returns:
    The second moment, and the fraction of it in the squared mean.
  """
  mean, std = math.sqrt(sq_mean), math.sqrt(variance)
  density = math.exp(-sq_mean / variance / 2) / math.sqrt(2 * math.pi)
  above = (1 + math.erf(mean / std / math.sqrt(2))) / 2
  first = mean * above + std * density
  second = (sq_mean + variance) * above + mean * std * density
  return 2 * second, first**2 / second
