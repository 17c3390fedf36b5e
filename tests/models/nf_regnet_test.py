import json

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import models
from nfnets_jax.models import layout, nf_regnet, variants
from nfnets_jax.models.settings import NFRegNetSettings
from tests import golden as reference


def _shapes(name, **overrides):
  net = hk.transform(lambda x: models.create(name, **overrides)(x, False))
  return jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))


# Sizes in pixels, dropout rate, and billions of multiply-accumulates. Where a
# stage halves an odd side, 'SAME' rounds it up; B2 and B5 are published as 1.10
# and 10.56, which rounds it down.
@pytest.mark.parametrize(
  ('variant', 'train_size', 'test_size', 'drop_rate', 'macs'),
  [
    ('B0', 192, 224, 0.2, 0.44),
    ('B1', 224, 256, 0.2, 0.73),
    pytest.param('B2', 240, 272, 0.3, 1.145, marks=pytest.mark.slow),
    pytest.param('B3', 288, 320, 0.3, 2.00, marks=pytest.mark.slow),
    pytest.param('B4', 320, 384, 0.4, 4.47, marks=pytest.mark.slow),
    pytest.param('B5', 384, 456, 0.4, 11.10, marks=pytest.mark.slow),
  ],
)
def test_variants_are_the_released(
  variant, train_size, test_size, drop_rate, macs, golden
):
  families = json.loads((golden / 'families.json').read_text())
  expected = families[f'NF_RegNet/{variant}']
  name = f'nf_regnet_{variant.lower()}'
  row = variants.get(name)
  assert (row.train_size, row.test_size) == (train_size, test_size)
  assert row.settings.drop_rate == drop_rate
  assert row.rand_augment is None
  shapes = _shapes(name)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == expected['params']
  assert reference.digest(shapes) == expected['digest']
  net = hk.transform(lambda x: models.create(name)(x, False))
  images = jax.ShapeDtypeStruct((1, test_size, test_size, 3), jnp.float32)
  counted = models.count_macs(net.init, jax.random.key(0), images)
  assert counted / 1e9 == pytest.approx(macs, abs=0.005)


def _released_params(widths, depths):
  """Counts the parameters of the released net by its rules."""

  def conv(kernel, fan_in, fan_out, groups=1):  # and its gain and bias
    return kernel**2 * fan_in // groups * fan_out + 2 * fan_out

  total = conv(3, 3, widths[0])
  inputs = widths[0]
  for width, depth in zip(widths, depths, strict=True):
    for block in range(depth):
      first_of_all = width == widths[0] and block == 0
      inside = int(inputs * (1.0 if first_of_all else 2.25)) // 8 * 8
      hidden = inside // 2
      total += conv(1, inputs, inside) + conv(3, inside, inside, inside // 8)
      total += 2 * inside * hidden + inside + hidden  # squeeze-excite
      total += conv(1, inside, width) + 1  # and SkipInit
      if block == 0:
        total += conv(1, inputs, width)
      inputs = width
  final = 1280 * inputs // 440
  return total + conv(1, inputs, final) + final * 1000 + 1000


@pytest.mark.parametrize('b', range(6))
def test_count_by_the_rules_is_that_of_the_released_code(b, golden):
  families = json.loads((golden / 'families.json').read_text())
  settings = variants.get(f'nf_regnet_b{b}').settings
  counted = _released_params(settings.width, settings.depth)
  assert counted == families[f'NF_RegNet/B{b}']['params']


# No golden counts: three quarters of the released widths, counted by the rules.
@pytest.mark.parametrize(
  ('variant', 'widths', 'depths', 'sizes', 'drop_rate'),
  [
    pytest.param(
      *('B6', (66, 138, 282, 594), (3, 8, 16, 16), (448, 528), 0.5),
      marks=pytest.mark.thorough,
    ),
    pytest.param(
      *('B7', (72, 156, 312, 660), (4, 10, 19, 19), (512, 600), 0.5),
      marks=pytest.mark.thorough,
    ),
    pytest.param(
      *('B8', (78, 174, 342, 726), (4, 11, 22, 22), (600, 672), 0.5),
      marks=pytest.mark.thorough,
    ),
  ],
)
def test_b6_to_b8_are_the_released(variant, widths, depths, sizes, drop_rate):
  name = f'nf_regnet_{variant.lower()}'
  row = variants.get(name)
  assert (row.train_size, row.test_size) == sizes
  assert row.settings == NFRegNetSettings(
    width=widths, depth=depths, drop_rate=drop_rate
  )
  count = sum(x.size for x in jax.tree.leaves(_shapes(name)))
  assert count == _released_params(widths, depths)


def test_b0_shapes(golden):
  expected = json.loads((golden / 'nf_regnet_b0_shapes.json').read_text())
  assert {
    module: {name: list(x.shape) for name, x in leaves.items()}
    for module, leaves in _shapes('nf_regnet_b0').items()
  } == expected


@pytest.mark.thorough
def test_b0_logits(golden):
  net = hk.transform(lambda x: models.create('nf_regnet_b0')(x, False))
  params = reference.fill_tree(_shapes('nf_regnet_b0'))
  outputs = jax.jit(net.apply)(params, None, reference.image(2, 64))
  expected = np.load(golden / 'logits.npz')['NF_RegNet/B0@64']
  assert reference.relative_error(outputs['logits'], expected) <= 2e-5


@pytest.mark.thorough
@pytest.mark.parametrize('beta', [1.0, 1.3])
def test_branch_has_unit_variance_for_the_variance_that_beta_predicts(beta):
  def forward(x):
    settings = NFRegNetSettings(
      width=(64,), depth=(2,), strides=(1,), group_width=36, drop_rate=0.0
    )
    spec = layout.block_specs(settings)[1]
    return nf_regnet.NFRegBlock(settings, spec, beta)(x, False)

  net = hk.transform(forward)
  x = beta * jax.random.normal(jax.random.key(0), (4, 16, 16, 64))
  params = jax.jit(net.init)(jax.random.key(1), x)
  out, branch = jax.jit(net.apply)(params, None, x)
  # 'SAME' padding thins one border pixel of 16 out; the gate is near one half.
  inner = branch[:, 1:-1, 1:-1]
  assert float(jnp.mean(jnp.var(inner, (0, 1, 2)))) == pytest.approx(1, abs=0.2)
  np.testing.assert_array_equal(out, x)  # SkipInit starts at zero


def test_blocks_follow_the_recipe():
  nets = []

  def forward(x):
    nets.append(models.create('nf_regnet_b1'))
    return nets[0](x, False)['logits']

  jax.eval_shape(
    hk.transform(forward).init, jax.random.key(0), jnp.ones((1, 64, 64, 3))
  )
  built = nets[0].blocks
  expected = [1.0]
  for stage in (2, 4, 7, 7):  # after a transition the variance is 1 + α²
    expected += [1 + 0.2**2 * (i + 1) for i in range(stage)]
  np.testing.assert_allclose([b.beta**2 for b in built], expected[:-1])
  np.testing.assert_allclose(
    [b.stochdepth_rate for b in built], 0.1 * np.arange(20) / 20
  )
  # The first block keeps its 36 channels but for whole groups of 8; the second
  # widens them 2.25 times.
  assert [b.conv1.output_channels for b in built[:2]] == [32, 80]
  assert [b.conv1.groups for b in built[:2]] == [4, 10]
  assert nets[0].final_conv.output_channels == 960


def test_classifier_starts_at_zero():
  net = hk.transform(
    lambda x: models.create(
      'nf_regnet_b0', 10, width=(36,), depth=(1,), strides=(2,)
    )(x, False)
  )
  images = reference.image(1, 32)
  params = jax.jit(net.init)(jax.random.key(0), images)
  assert not np.any(params['NF_RegNet/~/linear']['w'])
  assert np.any(params['NF_RegNet/~/final_conv']['w'])


def test_a_bottleneck_narrower_than_a_group_is_refused():
  with pytest.raises(
    ValueError,
    match='bottleneck of 6 channels .* one group of 8; use a group_width of at '
    'most 6 or a width of at least 8',
  ):
    _shapes('nf_regnet_b0', width=(6, 104, 208, 440))
