r"""Plots the signal of four nets at initialisation against the theory.

  make signal-plots
  python -m experiments.figures.signal_plots --output_dir=DIR --photos=FOLDER

For each net: squared mean and variance of the stream after each block, and the
variance of each residual branch, measured on a batch and predicted by
`signal_theory`. Every other stage is shaded. One picture is of white noise
N(0, 1), the other of normalised random crops of photographs, from a folder or
the two of scikit-learn (CC BY 2.0, danielbuechele and vultilion on Flickr).
SkipInit gains are set to one, stochastic depth and dropout are off, and batch
normalisation uses batch statistics. WORKDIR=docs makes the pictures in docs/.

Where measurements and theory disagree:

  * The theory of NFNets assumes that neighbouring pixels agree. On white noise
    each 2×2 average pooling of a shortcut divides the variance by four: F0 goes
    0.96 → 0.28 → 0.06 → 0.01 over its stages. It loses a little more, as γ·GELU
    keeps γ²/4 = 0.72 of a small variance, and 1/β² outweighs the missing α².
  * On photographs the transitions of F0 keep 0.52 to 0.59 of the variance, of
    which pooling alone would leave 0.70 to 0.82. A standardised filter sums to
    zero, so the stem starts at 0.19, and no constant β restores it.
  * ReLU is homogeneous, and NF-ResNets subsample instead of averaging, so they
    agree on noise, and on photographs keep the scale of the stem, 0.6 to 0.8.
    The standardised convolutions after its max pooling remove the mean.
  * Zero padding thins the border, nearly half of 7×7 pixels, which counts as
    variance where the mean is all there is: without normalisation the variance
    on noise ends at 2·10⁵, and with circular padding at 3·10⁴.
  * Without normalisation random factors multiply, to 2 in the second moment.
  * Photographs have heavier tails than Gaussians, so E[relu(z)]² < 1/(2π): the
    branches of the batch-normalised net have variance 0.70 to 0.78.

Reference:
  Brock, De and Smith 2021, figures 1 and 2, https://arxiv.org/abs/2101.08692,
  of a ResNet of 600 layers without SkipInit
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

from experiments.figures import signal_theory
from experiments.figures.signal_theory import Signal
from nfnets_jax import devices, models, paths
from nfnets_jax.data import transforms
from nfnets_jax.predict import find_images
from nfnets_jax.training import normalize

# Maps the arguments of a net and its measured signal to the predicted one.
Predict = Callable[[Mapping[str, Any], Signal], Signal]


@dataclasses.dataclass(frozen=True)
class Net:
  """A net to draw.

  Attributes:
    title: its title.
    name: a variant.
    predict: theory of its family.
    overrides: overrides of the variant's arguments.
  """

  title: str
  name: str
  predict: Predict
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def arguments(self) -> dict[str, Any]:
    """Returns the arguments of the net, with stochastic layers off."""
    off = {'stochdepth_rate': 0.0, 'drop_rate': 0.0}
    return {**models.arguments(self.name), **self.overrides, **off}


NETS = (
  Net('NFNet-F0', 'nfnet_f0', signal_theory.normaliser_free),
  Net('NF-ResNet-50', 'nf_resnet50', signal_theory.normaliser_free),
  Net('BN-ResNet-50', 'resnet50', signal_theory.batch_normalised),
  Net('ResNet-50, neither', 'resnet50', signal_theory.plain, {'norm': None}),
)


def measure(
  net: Net, batches: Sequence[np.ndarray], seed: int = 0
) -> list[Signal]:
  """Measures a net at initialisation, with SkipInit gains of one.

  Args:
    net: the net.
    batches: normalised images, each `[B, H, W, 3]`.
    seed: seed of the parameters.

  Returns:
    The signal of each batch.
  """

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    module = models.create(net.name, **net.arguments())
    return module(images, is_training=True, return_metrics=True)

  function = hk.transform_with_state(forward)
  # Parameter shapes do not depend on the image size.
  small = jnp.zeros((1, 32, 32, 3), jnp.float32)
  params, state = jax.jit(function.init)(jax.random.key(seed), small)
  params = hk.data_structures.map(
    lambda _, name, x: jnp.ones_like(x) if name == 'skip_gain' else x, params
  )
  apply = jax.jit(function.apply)
  signals = []
  for batch in batches:
    metrics, _ = apply(params, state, None, jnp.asarray(batch, jnp.float32))
    series = []
    for name in ('avg_sq_mean_', 'avg_var_', 'res_avg_var_'):
      count = sum(key.startswith(name) for key in metrics)
      series.append(
        np.array([float(metrics[f'{name}{i}']) for i in range(count)])
      )
    signals.append(Signal(*series))
  return signals


def make_noise(count: int, image_size: int, seed: int) -> np.ndarray:
  """Returns white noise N(0, 1), `[count, image_size, image_size, 3]`."""
  rng = np.random.default_rng(seed)
  shape = (count, image_size, image_size, 3)
  return rng.standard_normal(shape, np.float32)


def make_crops(
  photos: Sequence[bytes | np.ndarray], count: int, image_size: int, seed: int
) -> np.ndarray:
  """Returns random crops of photographs in turn, as in training.

  Photographs are encoded, or uint8 `[H, W, 3]`; crops are normalised,
  `[count, image_size, image_size, 3]`.

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
  """Reads the first `count` photographs of a folder; None is scikit-learn's.

  Returns:
    Encoded photographs, or uint8 `[H, W, 3]`.

  Raises:
    FileNotFoundError: if the folder has none.
  """
  if path is None:
    return list(datasets.load_sample_images().images)
  files = find_images([paths.local(path, '--photos')])
  return [file.read_bytes() for file in files[:count]]


def table(measured: Signal, predicted: Signal) -> str:
  """Formats a line for the stem and each block."""
  lines = [
    f'{"after":>8}{"squared mean":>24}{"variance":>24}{"branch variance":>24}',
    ' ' * 8 + f'{"measured":>12}{"predicted":>12}' * 3,
  ]
  for i in range(len(measured.variance)):
    cells = [measured.sq_mean[i], predicted.sq_mean[i]]
    cells += [measured.variance[i], predicted.variance[i]]
    if i:
      cells += [measured.branch[i - 1], predicted.branch[i - 1]]
    name = f'block {i}' if i else 'stem'
    lines.append(f'{name:>8}' + ''.join(f'{cell:12.4g}' for cell in cells))
  return '\n'.join(lines)


def draw(
  nets: Sequence[Net],
  measured: Sequence[Signal],
  predicted: Sequence[Signal],
  title: str,
) -> matplotlib.figure.Figure:
  """Draws a column for each net and a row for each statistic."""
  figure = matplotlib.figure.Figure(
    figsize=(3.1 * len(nets), 7), layout='constrained'
  )
  figure.suptitle(title)
  grid = figure.subplots(3, len(nets), sharex='col', squeeze=False)
  labels = {
    'sq_mean': 'squared mean',
    'variance': 'variance',
    'branch': 'variance of the branch',
  }
  for row, (field, label) in zip(grid, labels.items(), strict=True):
    row[0].set_ylabel(label)
    for axes, net, *both in zip(row, nets, measured, predicted, strict=True):
      _draw_panel(axes, net, *(getattr(signal, field) for signal in both))
  for top, bottom, net in zip(grid[0], grid[-1], nets, strict=True):
    top.set_title(net.title)
    bottom.set_xlabel('block (0: stem)')
  figure.legend(
    *grid[1, 0].get_legend_handles_labels(), loc='outside lower center', ncols=2
  )
  return figure


def _draw_panel(
  axes: Any, net: Net, measured: np.ndarray, predicted: np.ndarray
) -> None:
  ends = np.cumsum((0, *net.arguments()['depth']))
  for start, end in zip(ends[::2], ends[1::2], strict=False):
    axes.axvspan(start + 0.5, end + 0.5, color='black', alpha=0.06, linewidth=0)
  block = np.arange(ends[-1] + 1)[-len(measured) :]  # branches have no stem
  axes.plot(block, measured, 'o-', markersize=3.5, label='measured')
  axes.set_yscale('log')
  if np.any(predicted > 0):
    axes.plot(block, predicted, '--', color='C1', label='predicted')
  else:
    text = {'color': 'C1', 'ha': 'center', 'transform': axes.transAxes}
    axes.text(0.5, 0.9, 'predicted: 0', **text)
  low, high = axes.get_ylim()
  # A scatter of a few percent should not fill a panel.
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
  parser = argparse.ArgumentParser(
    prog='python -m experiments.figures.signal_plots',
    description='Signal at initialisation.',
  )
  parser.add_argument('--output_dir', default='runs/signal-plots')
  parser.add_argument('--photos', help="folder (default: scikit-learn's two)")
  parser.add_argument('--images', type=int, default=16, help='batch size')
  parser.add_argument('--image_size', type=int, default=224, help='pixels')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  devices.start_or_exit()
  count, size, seed = args.images, args.image_size, args.seed
  if count < 2 or size < 32:
    parser.error(
      f'{count} images of {size} px: give at least 2 of at least 32 px'
    )
  try:
    crops = make_crops(read_photos(args.photos, count), count, size, seed)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  inputs = {
    'noise': ('white noise N(0, 1)', make_noise(count, size, seed)),
    'photos': ('photographs', crops),
  }
  batches = [images for _, images in inputs.values()]
  signals = [measure(net, batches, seed) for net in NETS]
  output_dir = paths.local(args.output_dir, '--output_dir')
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
    print(f'{title}, mean {images.mean():.2f}, variance {images.var():.2f}')
    for net, *both in zip(NETS, measured, predicted, strict=True):
      print(f'\n{net.title}\n{table(*both)}')
    path = output_dir / f'signal-{name}.png'
    draw(NETS, measured, predicted, title).savefig(path, dpi=80)
    print(f'\nDrawn in {path}\n')


if __name__ == '__main__':
  main()
