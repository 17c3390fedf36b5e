r"""Draws how the signal propagates at initialisation, and how it should.

  make signal-plots
  python -m experiments.figures.signal_plots --output_dir=DIR --photos=FOLDER

For four nets, the squared mean and the variance of the stream after each block,
both averaged over channels, and the variance of each residual branch; measured
on one batch, beside the prediction of theory. Every other stage is shaded. One
picture is of white noise N(0, 1), the other of random crops of photographs,
normalised: of a folder's, or of the two that scikit-learn comes with (CC BY
2.0, danielbuechele and vultilion on Flickr). `docs/signal-noise.png` and
`docs/signal-photos.png` are of these, made with WORKDIR=docs.

SkipInit starts every branch of a normaliser-free net at zero, so that nothing
grows; the gains are set to one here. Stochastic depth and dropout are off, and
batch normalisation takes the statistics of the batch.

Predicted, of nets with activations that are Gaussian over pixels and images:

  * Normaliser-free: the squared mean is 0, every branch has variance 1, and the
    variance of the stream is 1 after the stem, 1 + α² after a transition, and
    grows by α² a block.
  * Batch-normalised: each branch ends with BN → ReLU → He-initialised
    convolution. E[relu(z)²] = 1/2 and E[relu(z)]² = 1/(2π) for z ~ N(0, 1), and
    the convolution doubles both on average, so a branch has second moment 1, of
    which 1/π is squared mean and 1 − 1/π = 0.68 variance. The stream is the sum
    of the branches since the last transition and of its shortcut, which is like
    one more: it grows linearly and is reset.
  * Without normalisation: ReLU and a He-initialised convolution keep the second
    moment q, so each block doubles it; so does a transition, whose shortcut and
    branch have q each. What share c of q is squared mean is the correlation of
    two pixels of different images, and ReLU takes it to
    k(c) = (√(1 − c²) + c·(π − arccos c)) / π, thrice in a branch and once in
    the shortcut of a transition. k(c) > c: the mean takes over, and the
    variance grows a little less than twofold. The max-pooling of the stem
    leaves a mean that is positive in all channels, so that the first ReLU cuts
    hardly anything off, and the first block has 4·E[relu(h)²], about 4q.

The last two start from the stem as measured. What else differs from theory:

  * The prediction for NFNets asks that neighbouring pixels agree. On white
    noise each 2×2 average pooling of a transition's shortcut takes a factor of
    four. So F0 goes 0.96 → 0.28 → 0.06 → 0.01 over its stages: a little more
    than four each, for two reasons. GELU is about x/2 where x is small, so that
    γ·GELU keeps only γ²/4 = 0.72 of a small variance; and 1/β² takes off what
    would have been α² of each block.
  * On photographs pixels agree in part: the transitions of F0 keep 0.52 to 0.59
    of the variance, of which pooling alone would leave 0.70 to 0.82. The stem
    is low to begin with, at 0.19: a standardised filter sums to zero, and sees
    only in what a pixel differs from its neighbours and red from green. No
    normalisation brings the variance back to 1, as every β is a constant. The
    branches fall with the stream, and faster, having up to four GELUs each.
  * ReLU is homogeneous and NF-ResNets pick pixels in place of averaging, so
    they agree with theory on noise, and on photographs keep the scale that the
    stem left, 0.6 to 0.8.
  * The max-pooling in the stem of an NF-ResNet leaves a mean and less variance;
    the standardised convolutions after it remove the mean.
  * Padding with zeros thins the border, nearly half of the pixels of 7 × 7. Its
    smaller mean counts as variance where the mean is all there is: without
    normalisation the variance on noise ends at 2·10⁵ and not 2·10⁴; with
    padding that wraps round it is 3·10⁴.
  * Each net is one draw. Without normalisation the chances of all blocks
    multiply, to a factor of two in the second moment.
  * On photographs the activations are no Gaussians but have heavier tails, so
    E[relu(z)]² is less than 1/(2π): the branches of the batch-normalised net
    have 0.70 to 0.78 variance, with as much less in the squared mean.

Differences:
  * The published plots are of a ResNet of 600 layers without SkipInit;
    these are of nets that are trained here.

Reference:
  Brock, De and Smith 2021, sections 3 and 4, figures 1 and 2,
  https://arxiv.org/abs/2101.08692; for k, Cho and Saul 2009, "Kernel methods
  for deep learning".
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from sklearn import datasets

from nfnets_jax import devices, models, paths
from nfnets_jax.data import transforms
from nfnets_jax.models import layout
from nfnets_jax.predict import find_images
from nfnets_jax.training import normalize


@dataclasses.dataclass(frozen=True)
class Signal:
  """The statistics of a net of L blocks.

  Attributes:
    sq_mean: `[L + 1]`, the squared mean of a channel, averaged over channels,
      after the stem and after each block.
    variance: `[L + 1]`, likewise of the variance.
    branch: `[L]`, the variance of each residual branch.
  """

  sq_mean: np.ndarray
  variance: np.ndarray
  branch: np.ndarray


# Maps a net's arguments and what was measured to what is predicted.
Predict = Callable[[Mapping[str, Any], Signal], Signal]


@dataclasses.dataclass(frozen=True)
class Net:
  """A net of the pictures.

  Attributes:
    title: how it is called there.
    name: the variant.
    predict: the theory of its family.
    overrides: of the variant's arguments.
  """

  title: str
  name: str
  predict: Predict
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def arguments(self) -> dict[str, Any]:
    """Returns the arguments of the net, without what drops signals."""
    return {
      **models.arguments(self.name),
      **self.overrides,
      'stochdepth_rate': 0.0,
      'drop_rate': 0.0,
    }


def measure(
  net: Net, batches: Sequence[np.ndarray], seed: int = 0
) -> list[Signal]:
  """Measures the signal of a net at initialisation, with SkipInit gains of one.

  Args:
    net: which.
    batches: normalised images, `[B, H, W, 3]` each.
    seed: of the parameters.

  Returns:
    The statistics on each batch.
  """

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    module = models.create(net.name, **net.arguments())
    # Training takes the batch's statistics; there is nothing to drop.
    return module(images, is_training=True, return_metrics=True)

  function = hk.transform_with_state(forward)
  # The parameters are of no image's size.
  small = jnp.zeros((1, 32, 32, 3), jnp.float32)
  params, state = jax.jit(function.init)(jax.random.key(seed), small)
  params = hk.data_structures.map(
    lambda _, name, x: jnp.ones_like(x) if name == 'skip_gain' else x, params
  )
  apply = jax.jit(function.apply)
  signals = []
  for batch in batches:
    outputs, _ = apply(params, state, None, jnp.asarray(batch, jnp.float32))

    def series(
      name: str, outputs: dict[str, jax.Array] = outputs
    ) -> np.ndarray:
      count = sum(key.startswith(name) for key in outputs)
      return np.array([float(outputs[f'{name}{i}']) for i in range(count)])

    signals.append(
      Signal(series('avg_sq_mean_'), series('avg_var_'), series('res_avg_var_'))
    )
  return signals


def predict_normaliser_free(
  arguments: Mapping[str, Any], measured: Signal
) -> Signal:
  """Predicts no mean, and the variance that every β is made for.

  Args:
    arguments: of the net, `depth` and `alpha` among them.
    measured: not asked.

  Returns:
    The prediction.

  Example:
    >>> arguments = {'depth': (2, 1), 'alpha': 0.2}
    >>> predict_normaliser_free(arguments, None).variance.round(2).tolist()
    [1.0, 1.04, 1.08, 1.04]
  """
  del measured
  # Of one more stage, whose β is of what the last block gives.
  betas = layout.predicted_stds((*arguments['depth'], 1), arguments['alpha'])
  variance = np.square(betas)
  return Signal(np.zeros(len(variance)), variance, np.ones(len(variance) - 1))


def predict_batch_normalised(
  arguments: Mapping[str, Any], measured: Signal
) -> Signal:
  """Predicts linear growth, reset at the transitions.

  Args:
    arguments: of the net, `depth` among them.
    measured: of which the stem is taken.

  Returns:
    The prediction.
  """
  branches = [
    # The first block of a stage counts twice, for its shortcut.
    count + 2
    for num_blocks in arguments['depth']
    for count in range(num_blocks)
  ]
  sq_mean, variance = 1 / math.pi, 1 - 1 / math.pi
  return Signal(
    np.array([measured.sq_mean[0], *(sq_mean * n for n in branches)]),
    np.array([measured.variance[0], *(variance * n for n in branches)]),
    np.full(len(branches), variance),
  )


def predict_plain(arguments: Mapping[str, Any], measured: Signal) -> Signal:
  """Predicts a second moment that doubles with every block.

  Args:
    arguments: of the net, `depth` and `stem_pool` among them.
    measured: of which the stem is taken.

  Returns:
    The prediction.
  """
  sq_mean, variance = float(measured.sq_mean[0]), float(measured.variance[0])
  moment = sq_mean + variance
  share = sq_mean / moment
  sq_means, variances, branch_variances = [sq_mean], [variance], []
  for num_blocks in arguments['depth']:
    for block in range(num_blocks):
      if len(sq_means) == 1 and arguments['stem_pool']:
        inner, inner_share = _rectify(sq_mean, variance)
      else:
        inner, inner_share = moment, _relu_kernel(share)
      # Both shares are those after the convolution, which keeps them.
      branch_share = _relu_kernel(_relu_kernel(inner_share))
      if block == 0:
        moment, share = inner, inner_share
      share = (moment * share + inner * branch_share) / (moment + inner)
      moment += inner
      sq_means.append(moment * share)
      variances.append(moment * (1 - share))
      branch_variances.append(inner * (1 - branch_share))
  return Signal(
    np.array(sq_means), np.array(variances), np.array(branch_variances)
  )


def _relu_kernel(c: float) -> float:
  """k(c), the correlation after a ReLU of what was correlated by c before."""
  c = min(c, 1.0)
  return (math.sqrt(1 - c**2) + c * (math.pi - math.acos(c))) / math.pi


def _rectify(sq_mean: float, variance: float) -> tuple[float, float]:
  """Rectifies and convolves a Gaussian of positive mean.

  Args:
    sq_mean: the mean's square.
    variance: of the Gaussian.

  Returns:
    The second moment, and the share of the squared mean in it.
  """
  mean, std = math.sqrt(sq_mean), math.sqrt(variance)
  density = math.exp(-sq_mean / variance / 2) / math.sqrt(2 * math.pi)
  above = (1 + math.erf(mean / std / math.sqrt(2))) / 2
  first = mean * above + std * density
  second = (sq_mean + variance) * above + mean * std * density
  return 2 * second, first**2 / second


NETS = (
  Net('NFNet-F0', 'nfnet_f0', predict_normaliser_free),
  Net('NF-ResNet-50', 'nf_resnet50', predict_normaliser_free),
  Net('BN-ResNet-50', 'resnet50', predict_batch_normalised),
  Net('ResNet-50, neither', 'resnet50', predict_plain, {'norm': None}),
)


def make_noise(count: int, image_size: int, seed: int) -> np.ndarray:
  """Returns white noise N(0, 1), `[count, image_size, image_size, 3]`."""
  rng = np.random.default_rng(seed)
  shape = (count, image_size, image_size, 3)
  return rng.standard_normal(shape, np.float32)


def make_crops(
  photos: Sequence[bytes | np.ndarray], count: int, image_size: int, seed: int
) -> np.ndarray:
  """Cuts random crops out of photographs in turn, as training does.

  Args:
    photos: encoded, or uint8 `[H, W, 3]`.
    count: how many crops.
    image_size: their side, in pixels.
    seed: of the crops.

  Returns:
    `[count, image_size, image_size, 3]`, normalised.

  Raises:
    ValueError: if a photograph cannot be decoded.
  """
  rng = np.random.default_rng(seed)
  make = transforms.train_transform(image_size)
  crops = []
  for i in range(count):
    example = {'image': photos[i % len(photos)], 'label': 0}
    examples = [transforms.decode_example(example)]
    uniform = rng.random((1, transforms.NUM_DRAWS))
    crops.append(make(examples, examples, uniform, np.array([i]))['image'])
  return np.asarray(normalize.normalize(jnp.asarray(np.concatenate(crops))))


def read_photos(path: str | None, count: int) -> list[bytes | np.ndarray]:
  """Reads photographs.

  Args:
    path: a folder of them; None for scikit-learn's two.
    count: at most so many, the first by their paths.

  Returns:
    The photographs, encoded or uint8 `[H, W, 3]`.

  Raises:
    FileNotFoundError: if the folder holds none.
  """
  if path is None:
    return list(datasets.load_sample_images().images)
  files = find_images([paths.expand(path, '--photos')])
  return [file.read_bytes() for file in files[:count]]


def table(measured: Signal, predicted: Signal) -> str:
  """Writes what was measured and what was predicted, a line a block."""
  lines = [
    f'{"after":>8}{"squared mean":>24}{"variance":>24}{"branch variance":>24}',
    ' ' * 8 + f'{"measured":>12}{"predicted":>12}' * 3,
  ]
  for i in range(len(measured.variance)):
    cells = [measured.sq_mean[i], predicted.sq_mean[i]]
    cells += [measured.variance[i], predicted.variance[i]]
    if i:
      cells += [measured.branch[i - 1], predicted.branch[i - 1]]
    lines.append(
      (f'block {i}' if i else 'stem').rjust(8)
      + ''.join(f'{cell:12.4g}' for cell in cells)
    )
  return '\n'.join(lines)


def draw(
  nets: Sequence[Net],
  measured: Sequence[Signal],
  predicted: Sequence[Signal],
  title: str,
) -> matplotlib.figure.Figure:
  """Draws a column a net, with one row for each statistic.

  Args:
    nets: which.
    measured: of each net.
    predicted: of each net.
    title: one line.

  Returns:
    The figure.
  """
  figure = matplotlib.figure.Figure(
    figsize=(3.1 * len(nets), 7), layout='constrained'
  )
  figure.suptitle(title)
  rows = figure.subplots(3, len(nets), sharex='col', squeeze=False)
  names = {
    'sq_mean': 'squared mean',
    'variance': 'variance',
    'branch': 'variance of the branch',
  }
  for axes_row, (name, label) in zip(rows, names.items(), strict=True):
    axes_row[0].set_ylabel(label)
    for axes, net, ours, theory in zip(
      axes_row, nets, measured, predicted, strict=True
    ):
      _draw_panel(axes, net, getattr(ours, name), getattr(theory, name))
  for axes, net in zip(rows[0], nets, strict=True):
    axes.set_title(net.title)
  for axes in rows[-1]:
    axes.set_xlabel('block (0: stem)')
  figure.legend(
    *rows[1, 0].get_legend_handles_labels(), loc='outside lower center', ncols=2
  )
  return figure


def _draw_panel(
  axes: Any, net: Net, measured: np.ndarray, predicted: np.ndarray
) -> None:
  depth = net.arguments()['depth']
  ends = np.cumsum((0, *depth))
  for start, end in zip(ends[::2], ends[1::2], strict=False):
    axes.axvspan(start + 0.5, end + 0.5, color='black', alpha=0.06, linewidth=0)
  # Branches have no value for the stem.
  block = np.arange(ends[-1] + 1)[-len(measured) :]
  axes.plot(block, measured, 'o-', markersize=3.5, label='measured')
  axes.set_yscale('log')
  if np.any(predicted > 0):
    axes.plot(block, predicted, '--', color='C1', label='predicted')
  else:
    axes.text(
      0.5,
      0.9,
      'predicted: 0',
      color='C1',
      ha='center',
      transform=axes.transAxes,
    )
  low, high = axes.get_ylim()
  # A scatter of some per cent should not fill a panel.
  margin = max(1.0, math.sqrt(20 / (high / low)))
  axes.set_ylim(low / margin, high * margin)
  subs = (1.0,) if high / low > 100 else (1.0, 3.0)
  axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
  axes.yaxis.set_major_formatter('{x:g}')
  axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axes.set_xlim(-0.5, ends[-1] + 0.5)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
  axes.grid(alpha=0.3)


def main() -> None:
  """Draws both pictures and prints their numbers."""
  parser = argparse.ArgumentParser(description='Signal at initialisation.')
  parser.add_argument(
    '--output_dir', default='runs/signal-plots', help='for both pictures'
  )
  parser.add_argument(
    '--photos', help="folder of photographs (default: scikit-learn's two)"
  )
  parser.add_argument('--images', type=int, default=16, help='of the batch')
  parser.add_argument('--image_size', type=int, default=224, help='pixels')
  parser.add_argument('--seed', type=int, default=0, help='of all draws')
  args = parser.parse_args()
  devices.start_or_exit()
  count, size, seed = args.images, args.image_size, args.seed
  if count < 2 or size < 32:
    parser.error(
      f'{count} images of {size} px: give at least 2 of at least 32 px'
    )
  try:
    photos = read_photos(args.photos, count)
    crops = make_crops(photos, count, size, seed)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  inputs = {
    'noise': ('white noise N(0, 1)', make_noise(count, size, seed)),
    'photos': ('photographs', crops),
  }
  signals = [
    measure(net, [images for _, images in inputs.values()], seed)
    for net in NETS
  ]
  output_dir = paths.expand(args.output_dir, '--output_dir')
  output_dir.mkdir(parents=True, exist_ok=True)
  for i, (name, (title, images)) in enumerate(inputs.items()):
    measured = [signal[i] for signal in signals]
    predicted = [
      net.predict(net.arguments(), signal)
      for net, signal in zip(NETS, measured, strict=True)
    ]
    title = (
      f'At initialisation, skip_gain = 1, on {count} images of {size} px: '
      f'{title}'
    )
    print(
      f'{title}, mean {images.mean():.2f}, variance {images.var():.2f}', end=''
    )
    for net, ours, theory in zip(NETS, measured, predicted, strict=True):
      print(f'\n\n{net.title}\n{table(ours, theory)}', end='')
    path = output_dir / f'signal-{name}.png'
    draw(NETS, measured, predicted, title).savefig(path, dpi=80)
    print(f'\n\nDrawn in {path}\n')


if __name__ == '__main__':
  main()
