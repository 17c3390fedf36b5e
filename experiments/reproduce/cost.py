r"""Device-days of the claims at the paper's scale, from compiled steps.

  make compile-table ARGS=--claims WORKDIR=experiments/reproduce/cells
  python -m experiments.reproduce.cost

The first command compiles each distinct training step for v3:4x4, or for one
chip of two cores where its images are fewer than the 32, cell by cell, and can
be stopped and repeated. The second counts with the cells that exist. The days
do not include the time of collectives, input and evaluation. A device of v3 is
a core.
"""

import argparse
import functools
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from experiments.benchmarks import core_days
from experiments.figures import markdown
from experiments.reproduce import claim as claims_lib
from experiments.reproduce import scales
from experiments.reproduce.claims import CLAIMS
from nfnets_jax import command_line, paths
from nfnets_jax.data import splits
from nfnets_jax.training import config as defaults

TOPOLOGY = 'v3:4x4'
CELLS = pathlib.Path(__file__).parent / 'cells'

# Fields of the optimizer that are inputs or constants of a step: its speed does
# not depend on their values.
_VALUES = (
  'learning_rate_per_256',
  'warmup_epochs',
  'end_learning_rate',
  'decay_rate',
  'decay_epochs',
  'momentum',
  'clipping',
  'clip_eps',
  'max_norm',
)
# Whether these are on changes the estimate by 0.00 and 0.08 % (F0 and F1).
_RATES = ('drop_rate', 'stochdepth_rate')
# Of these it only matters whether they are on.
_SWITCHES = ('weight_decay', 'learning_rate_groups')


class Cost(NamedTuple):
  """The cost of a claim.

  Attributes:
    days: device-days of the runs whose step is compiled and fits.
    runs: number of runs.
    counted: number of those in `days`.
    programs: number of distinct training steps.
    compiled: number of those that have a cell, also if they do not fit.
  """

  days: float
  runs: int
  counted: int
  programs: int
  compiled: int

  def __str__(self) -> str:
    """Returns the device-days, and of how many runs if not of all.

    Example:
      >>> print(Cost(1234.5, runs=75, counted=75, programs=15, compiled=15))
      1,234
      >>> print(Cost(12.5, runs=75, counted=5, programs=15, compiled=1))
      12 for 5 of 75 runs; 1 of 15 steps compiled
      >>> print(Cost(0.0, runs=75, counted=0, programs=15, compiled=0))
      not compiled
    """
    if not self.compiled:
      return 'not compiled'
    text = f'{self.days:,.0f}' if self.days > 10 else f'{self.days:.2g}'
    if self.counted < self.runs:
      text += f' for {self.counted} of {self.runs} runs'
    if self.compiled < self.programs:
      text += f'; {self.compiled} of {self.programs} steps compiled'
    return text


@functools.cache
def planned(name: str) -> Sequence[claims_lib.Run]:
  """Returns all runs of a claim at `paper`, also those that need results.

  Those are chosen as if all results were equally good, which does not change
  their number.
  """
  found: dict[str, dict[str, Any]] = {}
  while True:
    runs = CLAIMS[name].runs('paper', found)
    missing = [run for run in runs if run.name not in found]
    if not missing:
      return runs
    for run in missing:
      found[run.name] = {
        'name': run.name,
        'fingerprint': claims_lib.fingerprint(run, found),
        'status': 'finished',
        'held_out_top_1': 0.5,
      }


def num_images(config: config_dict.ConfigDict) -> int:
  """Returns the training images of a config at `paper`.

  Example:
    >>> from experiments import nfnet_imagenet
    >>> num_images(nfnet_imagenet.get_config('F0'))
    1281167
  """
  sizes = {'train': scales.IMAGES[config.data.name]}
  return sum(len(x) for _, x in splits.ranges(config.data.train_split, sizes))


def derived(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Returns a copy with the fields that follow from the number of images."""
  return defaults.derive(config, num_images(config), devices=1)


def program(config: config_dict.ConfigDict) -> str:
  """Returns a hash of what a training step's speed depends on.

  Args:
    config: with its derived fields.

  Example:
    >>> from experiments import nfnet_imagenet
    >>> config = nfnet_imagenet.get_config('F0')
    >>> first = program(config)
    >>> config.optimizer.clipping, config.epochs = 0.02, 90.0
    >>> program(config) == first
    True
    >>> config.optimizer.clip = None
    >>> program(config) == first
    False
  """
  model = config.model.to_dict()
  optimizer = config.optimizer.to_dict()
  for name in _VALUES:
    del optimizer[name]
  for name in _RATES:
    del model[name]
  optimizer.update({name: bool(optimizer[name]) for name in _SWITCHES})
  text = json.dumps(
    [
      model,
      optimizer,
      config.batch_size,
      config.micro_batches,
      config.remat,
      config.data.image_size,
      config.compute_dtype,
      bool(config.ema_decay),
      bool(config.label_smoothing),
    ],
    sort_keys=True,
  )
  return f'{zlib.crc32(text.encode()):08x}'


@functools.cache
def programs(name: str) -> Mapping[str, list[claims_lib.Run]]:
  """Returns the runs of a claim at `paper` by their `program`."""
  by_program: dict[str, list[claims_lib.Run]] = {}
  for run in planned(name):
    by_program.setdefault(program(derived(run.config)), []).append(run)
  return by_program


def distinct() -> dict[str, claims_lib.Run]:
  """Returns one run for each `program` of all claims, in their order."""
  runs: dict[str, claims_lib.Run] = {}
  for name in CLAIMS:
    for key, (run, *_) in programs(name).items():
      runs.setdefault(key, run)
  return runs


def topology_of(batch: int) -> str:
  """Returns the topology that a step of a batch is compiled for.

  Example:
    >>> topology_of(4096), topology_of(4)
    ('v3:4x4', 'v3:1x1')
  """
  return 'v3:1x1' if batch < 32 else TOPOLOGY


def cell_file(cells: pathlib.Path, name: str, topology: str) -> pathlib.Path:
  """Returns the file of a compiled step, in `compile_table`'s folder."""
  return cells / f'{name},{topology.replace(":", "_")}.json'


def device_days(run: claims_lib.Run, result: Mapping[str, Any]) -> float:
  """Returns the device-days of a run, with the compiled step `result`."""
  config = derived(run.config)
  return core_days.core_days(
    num_images(config),
    config.epochs,
    config.batch_size,
    result['training']['seconds'],
    result['devices'],
  )


def cost(name: str, cells: pathlib.Path = CELLS) -> Cost:
  """Adds up the device-days of a claim.

  Args:
    name: of the claim.
    cells: folder of `compile_table`; need not exist.

  Returns:
    The cost. Runs that several claims share count for each.
  """
  by_program = programs(name)
  days, counted, compiled = 0.0, 0, 0
  for key, runs in by_program.items():
    batch = derived(runs[0].config).batch_size
    path = cell_file(cells / 'claims', key, topology_of(batch))
    if not path.exists():
      continue
    compiled += 1
    result = json.loads(path.read_text())['result']
    if result['fits']:
      counted += len(runs)
      days += sum(device_days(run, result) for run in runs)
  total = sum(map(len, by_program.values()))
  return Cost(days, total, counted, len(by_program), compiled)


def table(cells: pathlib.Path = CELLS) -> str:
  """Returns the costs of all claims, in Markdown."""
  head = ('claim', 'runs', 'distinct steps', 'device-days of v3')
  costs = {name: cost(name, cells) for name in CLAIMS}
  return markdown.table(
    head, [(name, x.runs, x.programs, str(x)) for name, x in costs.items()]
  )


def main(argv: list[str] | None = None) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.reproduce.cost',
    description="Device-days of the claims at the paper's scale.",
  )
  parser.add_argument(
    '--cells', default=str(CELLS), help='folder of compile_table (%(default)s)'
  )
  args = parser.parse_args(argv)
  with command_line.telling():
    print(table(paths.local_literal(args.cells, '--cells')))


if __name__ == '__main__':
  main()
