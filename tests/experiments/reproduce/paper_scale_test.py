"""The claims at the paper's scale: their configs, their steps, their cost."""

import functools
import itertools
import json

import jax
import numpy as np
import optax
import pytest

from experiments.benchmarks import compile_nets
from experiments.reproduce import (
  claim,
  cost,
  run_config,
  runner,
  scales,
  step_latency,
)
from experiments.reproduce.claims import CLAIMS
from nfnets_jax.models import variants
from nfnets_jax.training import build, check, train_step
from nfnets_jax.training import config as defaults
from tests import steps

# What only nets with normalization, or only those without, have.
_NORM = {
  'name',
  'norm',
  'cross_replica_axis',
  'skipinit',
  'alpha',
  'activation',
  'padding',
  'pool_shortcut',
}


@functools.cache
def _runs(name):
  """The runs that are known without results; not to be changed."""
  return CLAIMS[name].runs('paper', {})


@pytest.mark.parametrize('name', ['batch-size', 'transfer', 'microbatch'])
def test_nets_differ_in_normalization_alone(name):
  pairs = 0
  runs = {run.name: run for run in _runs(name)}
  for run in runs.values():
    if run.labels['net'] != 'NF' or run.config.seed:
      continue
    other = runs[run.name.replace('net=NF', 'net=BN')]
    ours, theirs = run.config.to_dict(), other.config.to_dict()
    for config in (ours, theirs):
      for field in _NORM & {*config['model']}:
        del config['model'][field]
    assert ours == theirs
    pairs += 1
  assert pairs >= 4


def test_sweeps_cover_the_papers_points():
  def seeds(name, *labels):
    found = {}
    for run in _runs(name):
      key = tuple(run.labels.get(x) for x in labels)
      found.setdefault(key, set()).add(run.labels['seed'])
    return found

  points = seeds('clipping', 'depth', 'batch', 'clipping')
  assert len(points) == 2 * 5 * 5
  assert {len(x) for x in points.values()} == {5}
  points = seeds('batch-size', 'depth', 'batch', 'net')
  assert len(points) == 2 * 5 * 3
  # The others with AGC take the best λ of the first.
  assert {len(points[x]) for x in points if 'AGC' not in x[2]} == {5}


def test_the_best_four_of_five_count():
  point = claim.Point(top_1=[76.0, 78.0, 77.0, 70.0, 79.0])
  assert point.keep_best(4).top_1 == [79.0, 78.0, 77.0, 76.0]
  point = claim.Point(top_1=[76.0, 78.0, 77.0], diverged=[5, 9])
  kept = point.keep_best(4)  # a run that diverges is below all others
  assert (len(kept.top_1), kept.diverged) == (3, [5])
  assert not claim.Point(top_1=[1.0] * 4, diverged=[5]).keep_best(4).fails
  found = {}
  for run in _runs('clipping'):
    result = {'name': run.name, 'status': 'finished', 'top_1': run.config.seed}
    found[run.name] = result | {'fingerprint': claim.fingerprint(run, {})}
    if len(found) == 5:
      break
  (point,) = claim.Measured(CLAIMS['clipping'], 'paper', found).points
  assert point.top_1 == [400, 300, 200, 100]


def test_transfer_is_the_papers():
  runs = _runs('transfer')
  before = {run.name: run for run in runs if run.after is None}
  after = [run for run in runs if run.after is not None]
  assert len(before) == 2 * 4 and len(after) == 3 * 2 * 4
  for run in before.values():
    config = cost.derived(run.config)
    images = cost.num_images(config)
    assert config.data.name == scales.STAND_IN
    assert (config.epochs, config.batch_size) == (10, 1024)
    assert config.optimizer.learning_rate_per_256 * 4 == pytest.approx(0.4)
    warmup = config.optimizer.warmup_epochs * images / 1024
    assert warmup == pytest.approx(5_000)
    assert config.optimizer.weight_decay == 1e-5
  for run in after:
    assert run.labels['depth'] == before[run.after].labels['depth']
    config = cost.derived(run.config)
    assert config.data.image_size == config.data.eval_image_size
    assert f'{config.data.image_size} px' in run.labels['start']
    assert config.epochs * 1_281_167 / 2048 == pytest.approx(15_000)
    assert config.optimizer.learning_rate_per_256 * 8 == pytest.approx(0.1)
    assert config.ema_decay == 0.9999
    assert config.optimizer.weight_decay == config.model.stochdepth_rate == 0
    assert config.optimizer.clip is None
  curve = CLAIMS['transfer'].paper('paper').top_1
  assert curve[200, 'NF', 'pre-trained, 384 px'] == 84.3
  assert len(curve) == 24


def test_stand_in_for_jft_has_any_name(tmp_path):
  first = next(x for x in _runs('transfer') if not x.after)
  for name, expected in (
    ('i_naturalist2021:2.0.1', ('i_naturalist2021:2.0.1', '/data')),
    ('folder:/photos', ('folder', '/photos')),
  ):
    sweep = runner.Runner(tmp_path, {'name': name, 'data_dir': '/data'})
    data = sweep.localize(first).data
    assert (data.name, data.data_dir) == expected
  then = next(x for x in _runs('transfer') if x.after)
  assert sweep.localize(then).data.name == 'imagenet2012'


@pytest.mark.thorough
def test_each_step_has_a_command():
  nets = compile_nets.claim_nets()
  assert len(nets) == len(cost.distinct()) > 100
  for net in nets[::20]:
    name = net.config.partition(':')[2]
    config = cost.derived(run_config.get_config(name))
    assert cost.program(config) == net.name
    assert config.batch_size == net.batch
  in_parts = {
    net.title.split(',')[0]
    for net in nets
    if '--config.micro_batches=16' in net.overrides
  }
  assert in_parts == {
    'paper/regularisation/net=F5',
    'paper/regularisation/net=F6',
  }
  with pytest.raises(ValueError, match="no run 'paper/resnet/net=NB"):
    run_config.get_config('paper/resnet/net=NB,batch=256,seed=0')


def test_fields_of_a_run_can_be_overridden():
  name = 'paper/transfer/depth=50,net=NF,seed=0/224'
  config = run_config.get_config(name)
  for field in ('batch_size', 'micro_batches'):
    assert config[field] is None
    assert config.get_type(field) is int
  config.batch_size, config.model.drop_rate = 64, 0.5
  again = run_config.get_config(name)
  assert again.batch_size is None
  assert again.model.drop_rate != 0.5


@pytest.mark.parametrize(
  ('batch', 'topology', 'devices'), [(256, 'v3:4x4', 32), (4, 'v3:1x1', 2)]
)
def test_cost_counts_with_the_cells_that_exist(
  batch, topology, devices, tmp_path
):
  assert str(cost.cost('microbatch', tmp_path)) == 'not compiled'
  key, runs = next(
    (key, runs)
    for key, runs in cost.programs('microbatch').items()
    if runs[0].labels['batch'] == batch
  )
  path = cost.cell_file(tmp_path / 'claims', key, topology)
  path.parent.mkdir()
  result = {'fits': True, 'devices': devices, 'training': {'seconds': 0.1}}
  path.write_text(json.dumps({'result': result}))
  found = cost.cost('microbatch', tmp_path)
  days = len(runs) * 90 * 1_281_167 / batch * 0.1 * devices / 86_400
  assert found.days == pytest.approx(days)
  assert (found.counted, found.runs) == (2, 16)
  assert str(found).endswith('for 2 of 16 runs; 1 of 8 steps compiled')
  result['fits'] = False
  path.write_text(json.dumps({'result': result}))
  assert cost.cost('microbatch', tmp_path).counted == 0


@pytest.mark.slow
def test_each_net_is_built():
  """All distinct ones, without computing."""
  built = {}
  for run in cost.distinct().values():
    config = cost.derived(run.config)
    check.check_config(config, devices=1)
    config.model.drop_rate = config.model.stochdepth_rate = 0.25
    key = json.dumps(config.model.to_dict())
    if key in built:
      continue
    net = build.create_net(config, num_classes=10)
    size = config.data.image_size
    params, _ = jax.eval_shape(
      functools.partial(net.init, is_training=True),
      jax.random.key(0),
      jax.ShapeDtypeStruct((2, size, size, 3), config.compute_dtype),
    )
    (built[key],) = (
      leaves['w'].shape[-1]
      for name, leaves in params.items()
      if name.endswith('/~/linear') and 'squeeze' not in name
    )
  assert {*built.values()} == {10}
  assert len(built) == 8 + 4 * 5 + 2  # ResNets, the ablation, F5 and F6


def _shrunk(config):
  """The same recipe with one narrow block a stage, and few, small images."""
  config = config.copy_and_resolve_references()
  model = config.model
  stages = len(model.depth)
  # What is excluded from AGC is given by the indices of blocks.
  if config.optimizer.unclipped == defaults.get_config().optimizer.unclipped:
    model.depth = (1,) * stages
  model.width = (32,) * stages
  if 'group_width' in model:
    model.group_width = (16,) * stages
    model.stem_width = (8,) * len(model.stem_width)
  else:
    model.stem_width = 8
  config.batch_size = 8
  config.data.image_size = config.data.eval_image_size = 32
  return config


def _take_step(config):
  net = build.create_net(config, 10)
  optimizer = build.create_optimizer(config, lambda step: 0.01)
  state = train_step.init_state(net, optimizer, 0, config.data.image_size)
  step = steps.constant_step(config, net, optimizer)
  count, size = config.batch_size, config.data.image_size
  images = np.random.default_rng(0).integers(
    256, size=(1, count, size, size, 3)
  )
  batch = {
    'image': images.astype(np.uint8),
    'label': np.arange(count, dtype=np.int32)[None] % 10,
    'mix_label': np.zeros((1, count), np.int32),
    'ratio': np.full((1, count), 0.7, np.float32),
  }
  mapped = jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name='devices')
  new, metrics = jax.jit(mapped)(state, batch)
  assert np.isfinite(metrics['loss'])
  moved = optax.tree.norm(optax.tree.sub(new.params, state.params))
  assert float(moved) > 0


def _shrunk_steps():
  """The shrunk configs that differ."""
  found = {}
  for run in itertools.chain(*map(cost.planned, CLAIMS)):
    config = _shrunk(cost.derived(run.config))
    # With one block a stage the depths of a family are one net.
    family = variants.get(config.model.name).family
    unnamed = config.copy_and_resolve_references()
    unnamed.model.name = family
    rates = config.model.drop_rate > 0, config.model.stochdepth_rate > 0
    found.setdefault((cost.program(unnamed), *rates), config)
  return list(found.values())


@pytest.mark.thorough
@pytest.mark.parametrize(
  'name',
  [
    'paper/resnet/net=NF___AGC,batch=4096,clipping=0.01,seed=0',
    'paper/ablation/row=batch_norm,net=F0,seed=0',
    'paper/ablation/row=RandAugment__AGC,net=NF-ResNet-50,seed=0',
    'paper/transfer/depth=50,net=BN,seed=0/320',
    'paper/regularisation/net=F5,kind=with_SAM,seed=0',
  ],
)
def test_shrunk_step(name):
  _take_step(_shrunk(cost.derived(run_config.get_config(name))))


@pytest.mark.slow
def test_all_shrunk_steps():
  for config in _shrunk_steps():
    _take_step(config)


@pytest.mark.slow
def test_latency_of_a_whole_step():
  result = step_latency.measure('nfnet_tiny', 2, steps=3, image_size=16)
  assert (result['devices'], result['micro_batches']) == (8, 1)
  seconds = result['step_seconds']
  assert seconds == sorted(seconds) and seconds[0] > 0
  assert len(result['gradient_seconds']) == 20
