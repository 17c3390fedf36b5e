"""The summary prints what the library estimates and the released nets have."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import base, nfnet_imagenet, tables
from nfnets_jax import models, summary
from nfnets_jax.models import cost, variants
from nfnets_jax.training import memory, train
from nfnets_jax.training import optimizer as optimizers


def _estimate(config):
  net = train.create_net(config, num_classes=1000)
  optimizer = optimizers.create_optimizer(config.optimizer, lambda step: 0.0)
  return memory.estimate(net, optimizer, config, num_classes=1000)


@pytest.fixture(scope='module')
def tiny():
  return summary.summarize('nfnet_tiny')


def _cells(printed):
  """The rows of the table, by the name of the variant."""
  rows = [line.split() for line in printed.splitlines()]
  return {x[0]: x[1:] for x in rows if x and x[0].startswith('nfnet_')}


def _error(*args):
  with pytest.raises(SystemExit) as error:
    summary.main(args)
  return str(error.value)


@pytest.fixture
def asked(tiny, monkeypatch):
  """What the command asks to be traced; it is told of `tiny` instead."""
  calls = []

  def summarize(*args):
    calls.append(args)
    return tiny

  monkeypatch.setattr(summary, 'summarize', summarize)
  return calls


def test_counts_of_f0_are_the_released(golden):
  families = json.loads((golden / 'families.json').read_text())
  released = families['NFNet/F0']
  params, macs = summary.count('nfnet_f0', released['test_px'])
  assert params == released['params']
  assert macs == released['macs_at_test_px']
  _, macs = summary.count('nfnet_f0', released['train_px'])
  assert macs / 1e9 == pytest.approx(6.98, abs=0.005)


def test_config_is_that_of_the_paper():
  ours = summary._config(192, '4x5', 'bfloat16').to_dict()
  paper = nfnet_imagenet.get_config('F0').to_dict()
  for field, value in ours.items():
    if isinstance(value, dict):
      assert value.items() <= paper[field].items()
    else:
      assert value == paper[field]


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('image_size', 'compute_dtype', 'remat'),
  [(32, 'bfloat16', None), (48, 'float32', 'block')],
)
def test_options_are_those_of_a_run(image_size, compute_dtype, remat):
  config = base.get_config()
  config.model = base.model('nfnet_tiny')
  config.data.image_size = image_size
  config.compute_dtype = compute_dtype
  config.remat = remat
  found = summary.summarize('nfnet_tiny', image_size, compute_dtype, remat)
  assert found.need == _estimate(config)
  assert found.train_size == image_size


def test_state_is_all_but_what_images_take(tiny):
  need = tiny.need
  assert need.params == 4 * tiny.params
  assert summary.state_bytes(need) == (
    need.params + need.gradients + need.opt_state + need.ema + need.model_state
  )


def test_table(tiny, asked, capsys):
  summary.main(['nfnet_tiny', '--batch=64'])
  assert asked == [('nfnet_tiny', None, 'bfloat16', None)]
  printed = capsys.readouterr().out
  assert '\n64 images a device, bfloat16, 1000 classes' in printed
  assert 'micro' not in printed
  assert _cells(printed)['nfnet_tiny'] == [
    '32',
    '32',
    f'{tiny.params / 1e6:.2f}',
    f'{tiny.train_macs / 1e9:.2f}',
    f'{tiny.test_macs / 1e9:.2f}',
    f'{summary.state_bytes(tiny.need) / 2**30:.2f}',
    f'{tiny.need.activations / 2**20:.1f}',
    f'{tiny.need.total(64, 1) / 2**30:.2f}',
  ]


@pytest.mark.usefixtures('asked')
def test_micro_batches_that_a_device_takes(tiny, capsys):
  summary.main(['nfnet_tiny', '--batch=64', '--memory=0.0625'])
  chosen = memory.choose_micro_batches(64, True, tiny.need, 2**26)
  assert 1 < chosen < 32
  printed = capsys.readouterr().out
  assert _cells(printed)['nfnet_tiny'][-1] == str(chosen)


@pytest.mark.usefixtures('asked')
def test_device_that_is_too_small(capsys):
  summary.main(['nfnet_tiny', '--memory=0.001'])
  printed = capsys.readouterr().out
  assert _cells(printed)['nfnet_tiny'][-1] == 'none'
  assert 'nfnet_tiny: a step needs' in printed


def test_default_is_all_that_the_paper_trained(asked, capsys):
  summary.main(['--memory=16', '--remat=block', '--image_size=64'])
  printed = capsys.readouterr().out
  assert asked == [(f'nfnet_f{n}', 64, 'bfloat16', 'block') for n in range(7)]
  assert 'bfloat16, remat block' in printed
  assert max(map(len, printed.splitlines())) <= 80
  assert list(_cells(printed)) == [f'nfnet_f{n}' for n in range(7)]


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['nfnet_f9'], "unknown model 'nfnet_f9'; choose one of efficientnet_b0"),
    (['nfnet_f6', 'resnet'], "unknown model 'resnet'"),
    (['--batch=0'], '--batch is 0; '),
    (['--batch=-2'], '--batch is -2; '),
    (['--image_size=0'], '--image_size is 0; give 1 or more'),
    (['--memory=0'], '--memory is 0; give the GiB'),
    (['--memory=nan'], '--memory is nan; '),
    (['--memory=inf'], '--memory is inf; '),
  ],
)
def test_what_cannot_be_is_refused(args, message):
  assert _error(*args).startswith('error: ')
  assert message in _error(*args)


def test_unknown_precision_is_refused_with_the_known_ones(capsys):
  with pytest.raises(SystemExit):
    summary.main(['--compute_dtype=float8'])
  printed = capsys.readouterr().err
  assert "error: argument --compute_dtype: invalid choice: 'float8'" in printed
  assert 'bfloat16' in printed and 'float32' in printed


@pytest.mark.thorough
@pytest.mark.parametrize(
  'name', ['nfnet_tiny', 'nf_resnet50', 'nf_regnet_b0', 'efficientnet_b0']
)
def test_modules_add_up_to_the_net(name):
  images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  costs = cost.module_costs(lambda: models.create(name), images)
  params, macs = summary.count(name, 64)
  assert sum(row.params for row in costs) == params
  assert sum(row.macs for row in costs) == 2 * macs
  assert len({row.name for row in costs}) == len(costs)


def test_modules_of_one_net_are_shown(asked, capsys):
  del asked
  summary.main(['nfnet_tiny', '--image_size=32', '--batch=4'])
  printed = capsys.readouterr().out
  rows = {x[0]: x[1:] for x in map(str.split, printed.splitlines()) if x}
  # A 3×3 convolution of 3 channels to 16, with gains and biases, on 32² pixels.
  assert rows['stem_conv0'] == ['32×32×16', '464', '0.4', '0.1']
  assert rows['linear'][:2] == ['1000', '513,000']
  assert 'no size of it is published' in printed


@pytest.mark.parametrize(
  'name', ['nfnet_f0', 'nf_resnet50', 'efficientnet_b0', 'nfnet_tiny']
)
def test_docs_have_the_table_of_today(name):
  """If not: make tables."""
  root = pathlib.Path(__file__).parents[1]
  assert tables.row(name) in (root / 'docs/models.md').read_text().splitlines()


@pytest.mark.slow
def test_docs_have_the_whole_table_of_today():
  root = pathlib.Path(__file__).parents[1]
  lines = (root / 'docs/models.md').read_text().splitlines()
  rows = [line for line in lines if line.startswith('| `')]
  assert rows == [tables.row(name) for name in variants.VARIANTS]
