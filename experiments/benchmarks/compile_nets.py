"""What `compile_table` compiles: nets on ImageNet and steps of the claims."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from experiments.reproduce import cost, paper
from nfnets_jax.models import variants

# Nets whose batch of 4096 is in given micro-batches. A search for the fewest
# starts with one, for which the compiler took 22 GB for F6 and had not refused.
_LARGEST = ('F5', 'F6', 'nfnet_f5', 'nfnet_f6')
_IN_PARTS = '--config.micro_batches=16'


class Net(NamedTuple):
  """What a row compiles.

  Attributes:
    name: of the file and the row.
    config: of `--config`.
    batch: over all devices, or as `per_device` says.
    per_device: whether `batch` is that of one device.
    overrides: further arguments.
    title: of the row, if not the name.
  """

  name: str
  config: str
  batch: int
  per_device: bool = False
  overrides: Sequence[str] = ()
  title: str = ''

  def batch_on(self, topology: str) -> int:
    """Returns the batch over all devices."""
    return self.batch * (count_devices(topology) if self.per_device else 1)


def count_devices(topology: str) -> int:
  """Returns the devices of a topology, of v2 and v3 two a chip.

  Example:
    >>> count_devices('v3:4x4'), count_devices('v5e:8x8')
    (32, 64)
    >>> count_devices('h100'), count_devices('h100x8')
    (1, 8)
  """
  kind, _, chips = topology.partition(':')
  if not chips:
    return int(re.fullmatch(r'h100(?:x(\d+))?', kind)[1] or 1)  # type: ignore[index]
  return math.prod(map(int, chips.split('x'))) * (2 if kind < 'v4' else 1)


def config_of(model: str) -> str:
  """Returns the config of a variant on ImageNet, as `--config` takes it.

  Example:
    >>> config_of('efficientnet_b7')
    'experiments/efficientnet_imagenet.py:B7'
    >>> config_of('F1') == config_of('nfnet_f1')
    True
    >>> config_of('senet50')
    'experiments/resnet_imagenet.py:senet50'
  """
  if re.fullmatch(r'F\d\+?', model):
    return f'experiments/nfnet_imagenet.py:{model}'
  family = variants.get(model).family
  argument = model
  for prefix in ('nfnet_', 'nf_regnet_', 'efficientnet_', 'nf_resnet'):
    if model.startswith(prefix):
      argument = model.removeprefix(prefix).upper()
  return f'experiments/{family}_imagenet.py:{argument}'


def batch_nets(models: Sequence[str], batch: int) -> list[Net]:
  """Returns steps of a global batch, without SAM."""
  nets = []
  for model in models:
    overrides = []
    if model in _LARGEST:
      overrides.append('--config.optimizer.sam_rho=None')
      if batch == 4096:
        overrides.append(_IN_PARTS)
    nets.append(Net(model, config_of(model), batch, overrides=overrides))
  return nets


def latency_nets(models: Sequence[str]) -> list[Net]:
  """Returns the steps of table 3: bfloat16, 32 images a device, no SAM."""
  nets = []
  for model in models:
    overrides = ['--config.compute_dtype=bfloat16']
    if variants.get(model).family == 'nfnet':
      overrides.append('--config.optimizer.sam_rho=None')
    if variants.get(model).family == 'efficientnet':
      # As in the paper's other nets with batch normalisation.
      overrides.append('--config.model.cross_replica_axis=None')
    batch = paper.IMAGES_PER_DEVICE
    nets.append(Net(model, config_of(model), batch, True, overrides))
  return nets


def claim_nets() -> list[Net]:
  """Returns the distinct training steps of the claims at the paper's scale."""
  return [
    Net(
      key,
      f'experiments/reproduce/run_config.py:{run.name}',
      cost.derived(run.config).batch_size,
      overrides=[
        # No data set to open. The number of images does not change the step.
        '--config.data.name=fake',
        '--config.data.train_split=train',
        *([_IN_PARTS] if run.config.model.name in _LARGEST else []),
      ],
      title=run.name,
    )
    for key, run in cost.distinct().items()
  ]
