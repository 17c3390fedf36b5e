import json
import os
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import released, speed
from nfnets_jax.models import nfnet
from tests import forms


def _tiny():
  return speed.recipe('nfnet_tiny', 'float32')


@pytest.mark.thorough
def test_released_formulation_computes_the_same():
  ours = speed.programs(_tiny(), 2, 16, ['gradient'])['gradient'].run()
  with released.formulation():
    theirs = speed.programs(_tiny(), 2, 16, ['gradient'])['gradient'].run()
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_released_formulation_is_the_same_on_all_platforms():
  settings = forms.WHOLE_LANES
  net = hk.transform(lambda x: nfnet.NFNet(3, settings)(x, False)['logits'])
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  params = jax.eval_shape(net.init, jax.random.key(0), images)

  def convolutions(platform):
    gradient = jax.grad(lambda params, x: jnp.sum(net.apply(params, None, x)))
    text = forms.lowered(gradient, params, images)[platform]
    assert '@LayoutConstraint' not in text
    found = re.findall(r'stablehlo.convolution.* : (.*)', text)
    assert len(found) >= 3 * len(settings.stem_width)
    return sorted(found)

  with released.formulation():
    assert convolutions('tpu') == convolutions('cuda')
  with pytest.raises(AssertionError):
    convolutions('tpu')


@pytest.mark.slow
def test_bench_measures_and_writes_everything(tmp_path, capsys):
  file = tmp_path / 'new' / 'tiny.json'
  argv = ['--model=nfnet_tiny', '--batch=2', '--image_size=16', '--repeats=3']
  argv += ['--what', 'forward', 'step', '--peer', 'released']
  profile = tmp_path / 'profile'
  speed.main([*argv, f'--json={file}', f'--profile={profile}'])
  assert list(profile.rglob('*.xplane.pb'))
  found = json.loads(file.read_text())
  table = capsys.readouterr().out
  for name in ('ours', 'released'):
    for kind in ('forward', 'step'):
      times = found['seconds'][name][kind]
      assert len(times) == 3
      assert min(times) > 0
      made = found['programs'][name][kind]
      assert made['memory'] > made['temporaries'] > 0
      assert made['compile_seconds'] > 0
      assert f'{kind:10}{name}' in table
  for kind, ratios in found['ratios']['released'].items():
    pairs = zip(
      found['seconds']['ours'][kind],
      found['seconds']['released'][kind],
      strict=True,
    )
    assert ratios == [a / b for a, b in pairs]
  assert found['flops']['step'] == 3 * found['flops']['forward'] > 0
  # A step holds its update, and the update its clipping.
  assert set(found['parts']) == {'update', 'clip'}
  assert found['peak_tflops'] > 0
  # What is there is not overwritten, and said before anything is measured.
  with pytest.raises(SystemExit):
    speed.main([*argv, f'--json={file}'])
  assert 'exists; choose another name' in capsys.readouterr().err
  assert json.loads(file.read_text()) == found


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--model=nfnet_f9'], 'nfnet_f9'),
    (['--peer', 'nfnet_g1'], 'nfnet_g1'),
    (['--peer', 'timm'], '--peer timm needs --peer_python'),
    (
      ['--model=nfnet_tiny', '--peer', 'timm', '--peer_python=python'],
      'timm has no nfnet_tiny; choose one of efficientnet_b0',
    ),
    (['--batch=0'], '--batch must be at least 1, got 0'),
  ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
  with pytest.raises(SystemExit):
    speed.parse(argv)
  assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
  not os.environ.get('NFNETS_TIMM_PYTHON'),
  reason='NFNETS_TIMM_PYTHON names no interpreter with torch and timm',
)
def test_bench_runs_timm_in_turn(tmp_path):
  file = tmp_path / 'peer.json'
  python = os.environ['NFNETS_TIMM_PYTHON']
  argv = ['--model=nf_resnet50', '--batch=2', '--image_size=32', '--repeats=1']
  argv += ['--peer', 'timm', f'--peer_python={python}', f'--json={file}']
  speed.main(argv)
  found = json.loads(file.read_text())
  assert set(found['ratios']['timm']) == {'forward', 'gradient', 'step'}
  assert found['peers']['timm']['params'] > 25_000_000
