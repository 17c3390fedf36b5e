"""The pictures of signal propagation, and the theory that they draw."""

import math

import numpy as np
import pytest
from PIL import Image

from experiments.figures import signal_plots, signal_theory
from tests import commands

_STAGE = {
  'width': (256,),
  'depth': (4,),
  'strides': (1,),
  'stem_width': 64,
  'stem_stride': 1,
  'stem_pool': False,
}


def _signals(net, images):
  (measured,) = signal_plots.measure(net, [images])
  return measured, net.predict(net.arguments(), measured)


@pytest.fixture(scope='module')
def noise():
  return signal_plots.make_noise(4, 32, seed=0)


def _plain(**overrides):
  overrides = {**_STAGE, 'norm': None, **overrides}
  return signal_plots.Net('', 'resnet50', signal_theory.plain, overrides)


@pytest.mark.thorough
def test_normaliser_free_net_grows_as_predicted(noise):
  net = signal_plots.Net(
    '', 'nf_resnet50', signal_theory.normaliser_free, _STAGE
  )
  measured, predicted = _signals(net, noise)
  assert len(measured.variance) == 5 and len(measured.branch) == 4
  np.testing.assert_allclose(measured.variance, predicted.variance, rtol=0.15)
  np.testing.assert_allclose(measured.branch, predicted.branch, rtol=0.25)
  assert measured.sq_mean.max() < 0.1
  # With SkipInit's own gain, zero, there would be no growth at all.
  assert (np.diff(measured.variance)[1:] > 0.02).all()


@pytest.mark.thorough
def test_pooled_shortcut_quarters_noise_but_not_pixels_that_agree(noise):
  net = signal_plots.Net(
    '',
    'nfnet_tiny',
    signal_theory.normaliser_free,
    {
      'width': (256, 256),
      'depth': (1, 1),
      'strides': (1, 2),
      'group_width': (64, 64),
      'stem_width': (64, 128),
      'stem_strides': (1, 1),
      'activation': 'identity',  # has no share in it
    },
  )
  coarse = signal_plots.make_noise(4, 4, seed=0)
  correlated = coarse.repeat(8, axis=1).repeat(8, axis=2)
  kept = []
  for measured in signal_plots.measure(net, [noise, correlated]):
    # The branch, which adds α², is not pooled; the shortcut is of h / β.
    shortcut = measured.variance[2] - 0.04 * measured.branch[1]
    kept.append(1.04 * shortcut / measured.variance[1])
  assert kept[0] == pytest.approx(1 / 4, rel=0.2)
  assert 0.5 < kept[1] < 1.1


@pytest.mark.thorough
def test_second_moment_doubles_without_normalisation(noise):
  measured, predicted = _signals(_plain(), noise)
  moment = measured.sq_mean + measured.variance
  growth = moment[1:] / moment[:-1]
  assert np.exp(np.log(growth).mean()) == pytest.approx(2, rel=0.2)
  np.testing.assert_allclose(
    predicted.sq_mean + predicted.variance, moment[0] * 2.0 ** np.arange(5)
  )
  # The mean takes over.
  assert (np.diff(measured.sq_mean / moment) > 0).all()


@pytest.mark.thorough
def test_first_relu_after_max_pooling_cuts_little_off(noise):
  measured, predicted = _signals(_plain(stem_pool=True), noise)
  moment = measured.sq_mean + measured.variance
  expected = predicted.sq_mean + predicted.variance
  assert expected[1] / expected[0] == pytest.approx(4, rel=0.02)
  assert moment[1] / moment[0] == pytest.approx(4, rel=0.35)


@pytest.mark.thorough
def test_batch_normalised_net_grows_linearly_and_is_reset(noise):
  net = signal_plots.Net(
    '',
    'resnet50',
    signal_theory.batch_normalised,
    {**_STAGE, 'width': (256, 256), 'depth': (3, 2), 'strides': (1, 2)},
  )
  measured, predicted = _signals(net, noise)
  share = 1 - 1 / math.pi
  np.testing.assert_allclose(
    predicted.variance[1:], share * np.array([2, 3, 4, 2, 3])
  )
  np.testing.assert_allclose(measured.branch, predicted.branch, rtol=0.1)
  np.testing.assert_allclose(measured.variance, predicted.variance, rtol=0.15)
  np.testing.assert_allclose(measured.sq_mean, predicted.sq_mean, rtol=0.4)


def test_relu_kernel_is_that_of_samples():
  x, y = np.random.default_rng(0).standard_normal((2, 200_000))
  c = 0.6
  y = c * x + math.sqrt(1 - c**2) * y
  sampled = 2 * np.mean(np.maximum(x, 0) * np.maximum(y, 0))
  assert signal_theory.relu_kernel(c) == pytest.approx(sampled, abs=0.01)
  assert signal_theory.relu_kernel(1.0) == pytest.approx(1)
  z = np.maximum(1.5 + 2 * x, 0)
  moment, part = signal_theory.rectify(1.5**2, 2.0**2)
  assert moment == pytest.approx(2 * np.mean(z**2), rel=0.01)
  assert part == pytest.approx(np.mean(z) ** 2 / np.mean(z**2), rel=0.01)


def test_crops_are_normalised_and_depend_on_the_seed():
  photos = signal_plots.read_photos(None, 4)
  crops = signal_plots.make_crops(photos, 3, 32, seed=0)
  assert crops.shape == (3, 32, 32, 3) and crops.dtype == np.float32
  assert 0.5 < crops.std() < 2.5
  again = signal_plots.make_crops(photos, 3, 32, seed=0)
  np.testing.assert_array_equal(again, crops)
  assert not np.array_equal(crops[0], crops[2])  # of the same photograph
  other = signal_plots.make_crops(photos, 3, 32, seed=1)
  assert not np.array_equal(other, crops)


def test_photos_of_a_folder(tmp_path):
  for name in 'a.png', 'deeper/b.JPEG', 'deeper/c.jpg':
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    Image.new('RGB', (40, 50), 'red').save(path)
  (tmp_path / 'notes.txt').write_text('no image')
  assert len(signal_plots.read_photos(str(tmp_path), 16)) == 3
  photos = signal_plots.read_photos(str(tmp_path), 2)
  assert len(photos) == 2
  assert signal_plots.make_crops(photos, 4, 32, 0).shape == (4, 32, 32, 3)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='empty'):
    signal_plots.read_photos(str(tmp_path / 'empty'), 2)


def _check_picture(path):
  with Image.open(path) as picture:
    picture.load()
    assert picture.format == 'PNG'
    assert len(picture.convert('RGB').getcolors(1_000_000)) > 10


def test_picture_and_table(tmp_path):
  twos = np.full(17, 2.0)
  measured = signal_theory.Signal(twos, twos, twos[1:])
  net = signal_plots.NETS[1]
  predicted = net.predict(net.arguments(), measured)
  figure = signal_plots.draw([net], [measured], [predicted], 'a title')
  figure.savefig(tmp_path / 'picture.png')
  _check_picture(tmp_path / 'picture.png')
  lines = signal_plots.table(measured, predicted).splitlines()
  assert len(lines) == 2 + 17
  assert lines[3].split() == ['block', '1', '2', '0', '2', '1.04', '2', '1']


def _run(*args):
  return commands.run('experiments.figures.signal_plots', *args)


@pytest.mark.thorough
def test_a_folder_without_photographs_is_an_error(tmp_path):
  done = _run(f'--photos={tmp_path}', f'--output_dir={tmp_path / "out"}')
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith('error: there is no photo')
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_command_draws_both_pictures(tmp_path):
  done = _run('--images=4', '--image_size=64', f'--output_dir={tmp_path}')
  assert done.returncode == 0, done.stderr
  for net in signal_plots.NETS:
    assert done.stdout.count(net.title) == 2
  for name in 'noise', 'photos':
    path = tmp_path / f'signal-{name}.png'
    assert path.stat().st_size < 150_000
    _check_picture(path)
