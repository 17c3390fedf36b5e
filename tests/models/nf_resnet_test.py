import json

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import models
from nfnets_jax.models import layout, nf_resnet, variants
from nfnets_jax.models.settings import NFResNetSettings
from tests import golden as reference

DEPTHS = (
  50,
  101,
  *(pytest.param(n, marks=pytest.mark.slow) for n in (152, 200, 288)),
)


def _jit(net):
  return hk.Transformed(jax.jit(net.init), jax.jit(net.apply))


def _shapes(name, **overrides):
  net = hk.transform(lambda x: models.create(name, **overrides)(x, False))
  return jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))


@pytest.mark.parametrize('depth', DEPTHS)
def test_parameters_are_the_released(depth, golden):
  families = json.loads((golden / 'families.json').read_text())
  expected = families[f'NF_ResNet/ResNet{depth}']
  variant = variants.get(f'nf_resnet{depth}')
  assert (variant.train_size, variant.test_size) == (224, 224)
  assert variant.rand_augment is None
  shapes = _shapes(f'nf_resnet{depth}')
  assert sum(x.size for x in jax.tree.leaves(shapes)) == expected['params']
  assert reference.digest(shapes) == expected['digest']


def _released_params(depths, *, norm):
  """Counts the parameters of the released net by its rules."""

  def conv(kernel, fan_in, fan_out):  # and its gain and bias
    return kernel**2 * fan_in * fan_out + (0 if norm else 2 * fan_out)

  total, inputs = conv(7, 3, 64), 64
  for stage, depth in enumerate(depths):
    width = 256 * 2**stage
    inside = width // 4
    for block in range(depth):
      total += conv(1, inputs, inside) + conv(3, inside, inside)
      total += conv(1, inside, width) + (
        conv(1, inputs, width) if block == 0 else 0
      )
      total += 2 * (inputs + 2 * inside) if norm else 1  # or SkipInit
      inputs = width
  return total + (2 * inputs if norm else 0) + inputs * 1000 + 1000


@pytest.mark.parametrize('layers', [50, 101, 152, 200, 288])
@pytest.mark.parametrize(
  ('family', 'norm'), [('NF_ResNet', False), ('ResNet', True)]
)
def test_count_by_the_rules_is_that_of_the_released_code(
  family, norm, layers, golden
):
  families = json.loads((golden / 'families.json').read_text())
  depth = variants.get(f'{family.lower()}{layers}').settings.depth
  counted = _released_params(depth, norm=norm)
  assert counted == families[f'{family}/ResNet{layers}']['params']


# No golden counts: counted by the rules.
@pytest.mark.thorough
@pytest.mark.parametrize(
  ('name', 'norm'), [('nf_resnet600', False), ('resnet600', True)]
)
def test_resnet600_is_the_released(name, norm):
  net = hk.transform_with_state(lambda x: models.create(name)(x, False))
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes, _ = jax.eval_shape(net.init, jax.random.key(0), images)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == _released_params((50, 50, 50, 50), norm=norm)


def test_resnet600_has_200_blocks():
  for family in 'nf_resnet', 'resnet':
    variant = variants.get(f'{family}600')
    assert variant.settings == type(variant.settings)(depth=(50, 50, 50, 50))
    assert (variant.train_size, variant.test_size) == (224, 224)


def test_nf_resnet50_shapes(golden):
  expected = json.loads((golden / 'nf_resnet50_shapes.json').read_text())
  assert {
    module: {name: list(x.shape) for name, x in leaves.items()}
    for module, leaves in _shapes('nf_resnet50').items()
  } == expected


@pytest.mark.thorough
def test_nf_resnet50_logits(golden):
  net = _jit(hk.transform(lambda x: models.create('nf_resnet50')(x, False)))
  params = reference.fill_tree(_shapes('nf_resnet50'))
  logits = net.apply(params, None, reference.image(2, 64))['logits']
  expected = np.load(golden / 'logits.npz')['NF_ResNet/ResNet50@64']
  assert reference.relative_error(logits, expected) <= 2e-5


def test_macs_are_those_of_a_resnet():
  net = hk.transform(lambda x: models.create('nf_resnet50')(x, False))
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  macs = models.count_macs(net.init, jax.random.key(0), images)
  # Table 3 of the paper has 4.10 billion for the ResNet-50.
  assert macs / 1e9 == pytest.approx(4.1, abs=0.05)


@pytest.mark.parametrize('beta', [1.0, 1.3])
def test_branch_has_unit_variance_for_the_variance_that_beta_predicts(beta):
  def forward(x):
    settings = NFResNetSettings(depth=(2, 1, 1, 1))
    spec = layout.block_specs(settings)[1]
    return nf_resnet.NFResBlock(settings, spec, beta)(x, False)

  net = _jit(hk.transform(forward))
  x = beta * jax.random.normal(jax.random.key(0), (4, 16, 16, 256))
  out, branch = net.apply(net.init(jax.random.key(1), x), None, x)
  # 'SAME' padding thins one border pixel of 16 out.
  inner = branch[:, 1:-1, 1:-1]
  assert float(jnp.mean(jnp.var(inner, (0, 1, 2)))) == pytest.approx(1, abs=0.2)
  np.testing.assert_array_equal(out, x)  # SkipInit starts at zero


@pytest.mark.thorough
def test_stream_has_the_variance_that_beta_predicts():
  """On noise, with SkipInit gains of one, through a strided transition."""
  betas = []

  def forward(x):
    settings = NFResNetSettings(
      width=(128, 128),
      depth=(4, 4),
      strides=(1, 2),
      stem_width=64,
      stem_stride=1,
      stem_pool=False,
    )
    net = nf_resnet.NFResNet(10, settings)
    betas[:] = [block.beta for block in net.blocks]
    return net(x, False, return_metrics=True)

  net = _jit(hk.transform(forward))
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  params = hk.data_structures.map(
    lambda _, name, x: jnp.ones_like(x) if name == 'skip_gain' else x,
    net.init(jax.random.key(1), images),
  )
  outputs = net.apply(params, None, images)
  variance = [float(outputs[f'avg_var_{i}']) for i in range(8)]
  branch = [float(outputs[f'res_avg_var_{i}']) for i in range(8)]
  predicted = [1, 1.04, 1.08, 1.12, 1.16, 1.04, 1.08, 1.12]
  np.testing.assert_allclose(np.square(betas), predicted)
  # The 7×7 stem sees zeros beyond the border, a ninth of what it sees.
  np.testing.assert_allclose(variance, predicted, rtol=0.2)
  np.testing.assert_allclose(branch, 1.0, atol=0.25)


def test_betas_and_stochastic_depth_follow_the_blocks():
  built = []

  def forward(x):
    net = models.create('nf_resnet101', stochdepth_rate=0.2)
    built.extend(net.blocks)
    return net(x, False)['logits']

  jax.eval_shape(
    hk.transform(forward).init, jax.random.key(0), jnp.ones((1, 64, 64, 3))
  )
  expected = [1.0]
  for stage in (3, 4, 23, 3):  # after a transition the variance is 1 + α²
    expected += [1 + 0.2**2 * (i + 1) for i in range(stage)]
  np.testing.assert_allclose([b.beta**2 for b in built], expected[:-1])
  np.testing.assert_allclose(
    [b.stochdepth_rate for b in built], 0.2 * np.arange(33) / 33
  )


def test_initialisation():
  net = hk.transform(
    lambda x: models.create(
      'nf_resnet50', 100, width=(256,), depth=(1,), strides=(1,)
    )(x, False)
  )
  params = jax.jit(net.init)(jax.random.key(0), reference.image(1, 16))
  classifier = params['NF_ResNet/~/linear']['w']
  assert float(jnp.std(classifier)) == pytest.approx(0.01, rel=0.02)
  conv = params['NF_ResNet/~/nf_res_block/~/conv1']['w']
  fan_in = np.prod(conv.shape[:3])
  assert float(jnp.std(conv)) == pytest.approx(fan_in**-0.5, rel=0.02)
  assert float(params['NF_ResNet/~/nf_res_block']['skip_gain']) == 0


def test_squeeze_excite_and_no_skipinit_are_overrides_away():
  plain = _shapes('nf_resnet50')
  gated = _shapes('nf_resnet50', use_se=True)
  added = set(gated) - set(plain)
  assert len(added) == 2 * 16
  gate = 'NF_ResNet/~/nf_res_block/~/squeeze_excite/~/linear'
  assert gated[gate]['w'].shape == (256, 64)
  free = _shapes('nf_resnet50', skipinit=False)
  assert set(plain) - set(free) == {m for m in plain if m.endswith('block')} | {
    f'NF_ResNet/~/nf_res_block_{i}' for i in range(1, 16)
  }


def test_without_skipinit_a_gain_of_one_is_meant():
  def apply(**overrides):
    net = hk.transform(
      lambda x: models.create(
        'nf_resnet50',
        10,
        width=(16,),
        depth=(2,),
        strides=(1,),
        use_se=True,
        **overrides,
      )(x, False)
    )
    images = reference.image(2, 16)
    params = reference.fill_tree(
      jax.eval_shape(net.init, jax.random.key(0), images)
    )
    for leaves in params.values():
      if 'skip_gain' in leaves:
        leaves['skip_gain'] = np.float32(1)
    return jax.jit(net.apply)(params, None, images)['logits']

  np.testing.assert_allclose(apply(), apply(skipinit=False), rtol=1e-5)


def test_unknown_activation_is_refused():
  with pytest.raises(ValueError, match="activation is 'mish'"):
    _shapes('nf_resnet50', activation='mish')
