"""The command line of what compiles a run's steps."""

import json

import pytest

from tests import commands

_SMALL = (
  '--config=experiments/nfnet_imagenet.py:F0',
  '--config.data.name=fake',
  '--config.data.train_split=train[:64]',
  '--config.data.test_split=validation[:8]',
  '--config.model.width=(64,)',
  '--config.model.depth=(1,)',
  '--config.model.strides=(1,)',
  '--config.model.group_width=(16,)',
  '--config.model.stem_width=(32,)',
  '--config.model.stem_strides=(2,)',
  '--config.model.drop_rate=0.0',
  '--config.model.stochdepth_rate=0.0',
  '--config.data.image_size=16',
  '--config.data.eval_image_size=8',
  '--config.optimizer.warmup_epochs=0.0',
  '--config.batch_size=256',
  '--config.eval_batch_size=32',
)


def _run(*arguments, timeout=120):
  return commands.run('nfnets_jax.compile', *arguments, timeout=timeout)


@pytest.mark.thorough
def test_exit_codes(tmp_path):
  text = tmp_path / 'step.txt'
  done = _run(*_SMALL, '--json', '--noevaluation', f'--text={text}')
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert (result['topology'], result['devices']) == ('local', 8)
  assert 'evaluation' not in result
  assert text.read_text().startswith('HloModule')
  need = result['training']['total'] / 2**30 / 0.9
  limit = f'--memory={need - 2e-6:.9f}'
  done = _run(*_SMALL, '--config.micro_batches=1', '--noevaluation', limit)
  assert done.returncode == 1
  assert 'It does not fit into' in done.stdout
  assert 'micro_batches=2 fits' in done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--topology=mars'], "there is no topology 'mars'; give local, h100"),
    (['--memory=0'], '--memory is 0; give the GiB of a device, more than 0'),
    (['--memory=nan'], '--memory is nan; '),
    (['--config.batch_size=12'], 'batch_size 12 is not divisible by 8 devices'),
    (['surplus'], 'unexpected argument surplus'),
  ],
)
def test_errors_are_one_line(arguments, message):
  done = _run(*_SMALL, *arguments)
  assert done.returncode == 1
  assert done.stderr.count('error: ') == 1, done.stderr
  assert message in done.stderr
