"""The figures of steps compiled for the CPUs that are here."""

import json
import math

import pytest

from nfnets_jax import topologies
from nfnets_jax.training import estimates, estimates_table, fit

# Each compiles a training step.
pytestmark = pytest.mark.thorough


@pytest.fixture(scope='module')
def local():
  return topologies.get('local')


@pytest.fixture(scope='module')
def config(make_config):
  return make_config(40, {'batch_size': 128, 'eval_batch_size': 64})


@pytest.fixture(scope='module')
def whole(config, local):
  """The figures where all fits, and the text."""
  return estimates.measure(config, local)


def test_figures(config, local, whole):
  result, text = whole
  assert text.startswith('HloModule')
  assert json.loads(json.dumps(result)) == result | {'refused': {}}
  assert result['fits']
  assert (result['devices'], result['per_device_batch']) == (8, 16)
  assert result['micro_batches'] == 1
  step, evaluation = result['training'], result['evaluation']
  parts = ('arguments', 'outputs', 'temporaries', 'code')
  for each, images in ((step, 16), (evaluation, 8)):
    waiting = each['total'] - sum(each[x] for x in parts)
    assert 2 * images * 8 * 8 * 3 <= waiting <= 3 * images * 8 * 8 * 3
    assert each['flops'] > 0
    assert each['seconds'] is None  # of a CPU nothing is known
  # Parameters, momentum and two averages; the gradient is summed once.
  gradient = step['collective_bytes']
  assert 3 * gradient < step['arguments'] < 4 * gradient
  assert evaluation['collective_bytes'] < gradient / 10
  printed = estimates_table.table(result)
  assert 'It fits into' in printed
  assert max(map(len, printed.splitlines()[2:])) <= 80
  assert f'{step["temporaries"] / 2**30:.3f}' in printed


def test_what_does_not_fit_names_the_fewest_micro_batches(config, local, whole):
  config = config.copy_and_resolve_references()
  config.micro_batches = 1
  memory = math.ceil(whole[0]['training']['total'] / fit.USABLE) - 1000
  result, text = estimates.measure(config, local, memory, evaluation=False)
  assert (result['fits'], text) == (False, None)
  assert 'a step in 1 part(s) needs' in result['reason']
  assert result['remedy']['micro_batches'] == 2
  assert result['remedy']['remat'] is None
  assert result['remedy']['bytes'] < fit.USABLE * memory
  printed = estimates_table.table(result)
  assert 'It does not fit into' in printed
  assert 'micro_batches=2 fits' in printed
  # Left to itself, the run takes them.
  config.micro_batches = None
  result, _ = estimates.measure(config, local, memory, evaluation=False)
  assert (result['fits'], result['micro_batches']) == (True, 2)
  assert list(result['refused']) == [1]


def test_nothing_fits(config, local):
  config = config.copy_and_resolve_references()
  config.batch_size = 8  # one image a device, so one number of micro-batches
  result, _ = estimates.measure(config, local, 2**16, evaluation=False)
  assert (result['fits'], result['remedy']) == (False, None)
  assert 'No number of micro-batches fits' in estimates_table.table(result)


def test_an_evaluation_that_does_not_fit(config, local, whole):
  config = config.copy_and_resolve_references()
  config.eval_batch_size = 8  # one image a device
  config.data.eval_image_size = 512
  memory = math.ceil(whole[0]['training']['total'] / fit.USABLE) + 1000
  result, text = estimates.measure(config, local, memory)
  assert not result['fits'] and text.startswith('HloModule')
  assert 'eval_batch_size or data.eval_image_size' in result['reason']
  assert result['training']['total'] == whole[0]['training']['total']
  assert 'The training step fits' in estimates_table.table(result)


def test_a_device_that_tells_no_memory(config, local):
  with pytest.raises(
    ValueError, match='memory of local devices is unknown; give --memory'
  ):
    estimates.measure(config, local._replace(memory=None))


def test_operations_of_parts_and_of_what_is_done_again(config, local, whole):
  """A loop counts as often as it runs, and an H100 at the peak of its dtype."""
  config = config.copy_and_resolve_references()
  once = estimates._flops(config, 16, 1, evaluation=False)
  config.remat = 'block'
  assert estimates._flops(config, 16, 1, False) == pytest.approx(once * 4 / 3)
  config.optimizer.sam_rho = 0.05
  config.optimizer.sam_fraction = 0.5
  assert estimates._flops(config, 16, 1, False) == pytest.approx(once * 2)
  kind = topologies.KINDS['h100']
  config.compute_dtype = config.eval_dtype = 'float32'
  assert estimates._peak(kind, config, False) == kind.float32_flops
  assert estimates._peak(kind, config, True) == kind.exact_flops
  config.compute_dtype = config.eval_dtype = 'bfloat16'
  assert estimates._peak(kind, config, True) == kind.flops
