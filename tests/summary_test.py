"""The summary prints what the library estimates and the released nets have."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import nfnet_imagenet
from nfnets_jax import models, summary, topologies
from nfnets_jax.models import cost
from nfnets_jax.training import config as defaults
from nfnets_jax.training import estimates, fit


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
def traced(tiny, monkeypatch):
  """Arguments of `summarize`, which returns that of `tiny`."""
  calls = []

  def summarize(*args):
    calls.append(args)
    return tiny

  monkeypatch.setattr(summary, 'summarize', summarize)
  return calls


@pytest.mark.thorough
def test_counts_of_f0_are_the_released(golden):
  families = json.loads((golden / 'families.json').read_text())
  released = families['NFNet/F0']
  params, macs = summary.count('nfnet_f0', released['test_px'])
  assert params == released['params']
  assert macs == released['macs_at_test_px']
  _, macs = summary.count('nfnet_f0', released['train_px'])
  assert macs / 1e9 == pytest.approx(6.98, abs=0.005)


def test_config_is_that_of_the_paper():
  ours = summary._config('nfnet_f0', 192, 4096).to_dict()
  paper = nfnet_imagenet.get_config('F0').to_dict()
  assert ours.pop('micro_batches') == 1  # not chosen by the memory
  for field, value in ours.items():
    if isinstance(value, dict):
      assert value.items() <= paper[field].items()
    else:
      assert value == paper[field]


@pytest.mark.slow
@pytest.mark.thorough
def test_memory_is_what_the_compiler_says():
  """Of the step of a run."""
  need = summary.compiled_need('nfnet_tiny', 4, 32, 'float32', 'block')
  config = defaults.get_config()
  config.model = defaults.model('nfnet_tiny')
  config.data.image_size = 32
  config.compute_dtype = 'float32'
  config.remat = 'block'
  config.batch_size = 32
  config.micro_batches = 1
  found = estimates.fit_training(
    config, topologies.get('local'), None, 1000, epoch_steps=1_281_167 / 4096
  )
  assert need == fit.need(found.compiled)


def test_table(tiny, traced, capsys):
  summary.main(['nfnet_tiny', '--batch=64'])
  assert traced == [('nfnet_tiny', None)]
  printed = capsys.readouterr().out
  assert 'compiled' not in printed
  assert _cells(printed)['nfnet_tiny'] == [
    '32',
    '32',
    f'{tiny.params / 1e6:.2f}',
    f'{tiny.train_macs / 1e9:.2f}',
    f'{tiny.test_macs / 1e9:.2f}',
  ]


@pytest.mark.usefixtures('traced')
def test_memory_is_shown_if_asked_to_compile(monkeypatch, capsys):
  calls = []

  def compiled_need(*args):
    calls.append(args)
    return fit.Need(3 * fit.GIB, 0, 2 * fit.GIB, 0, 5 * fit.GIB)

  monkeypatch.setattr(summary, 'compiled_need', compiled_need)
  summary.main(['nfnet_tiny', '--batch=64', '--remat=block', '--compile'])
  assert calls == [('nfnet_tiny', 64, None, 'bfloat16', 'block')]
  printed = capsys.readouterr().out
  assert 'per-device batch 64, bfloat16, remat block, compiled for' in printed
  assert _cells(printed)['nfnet_tiny'][-3:] == ['3.00', '2.00', '5.00']
  assert max(map(len, printed.splitlines()[-6:])) <= 80


def test_default_is_all_that_the_paper_trained(traced, capsys):
  summary.main(['--image_size=64'])
  printed = capsys.readouterr().out
  assert traced == [(f'nfnet_f{n}', 64) for n in range(7)]
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


def test_modules_of_one_net_are_shown(traced, capsys):
  del traced
  summary.main(['nfnet_tiny', '--image_size=32', '--batch=4'])
  printed = capsys.readouterr().out
  rows = {x[0]: x[1:] for x in map(str.split, printed.splitlines()) if x}
  # A 3×3 convolution of 3 channels to 16, with gains and biases, on 32² pixels.
  assert rows['stem_conv0'] == ['32×32×16', '464', '0.4', '0.1']
  assert rows['linear'][:2] == ['1000', '513,000']
  assert 'published: none' in printed
