"""The run folder: its config, data and report."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from nfnets_jax import paths
from nfnets_jax.runtime import files, progress

# Fields that may change in a resumed run, since results do not depend on them.
_CIRCUMSTANCES = (
  'compilation_cache',
  'data.data_dir',
  'data.in_memory',
  'data.num_workers',
  'data.prepare',
  'data.worker_type',
  'keep_checkpoints',
)
# Nor do results depend on these, but the claims' fingerprints of results do.
_SIZES = ('eval_batch_size', 'log_every_steps')


def check(
  workdir: paths.Path, config: config_dict.ConfigDict, allow_change: bool
) -> bool:
  """Returns whether a run folder is new or of the same config; writes nothing.

  Another config raises a ValueError that lists the fields that differ, unless
  `allow_change`. Fields that do not affect results may always change.
  """
  stored = read_config(workdir)
  if stored is None:
    return True
  difference = changes(stored, config.to_dict())
  for name in _SIZES:
    difference.pop(name, None)
  if difference and not allow_change:
    raise ValueError(
      f'{workdir} holds a run of another config:\n'
      + '\n'.join(
        f'  config.{name}: {old!r} -> {new!r}'
        for name, (old, new) in difference.items()
      )
      + '\nUse another --workdir, or --allow_config_change to go on with the '
      'new one.'
    )
  return not difference


def read_config(workdir: paths.Path) -> dict[str, Any] | None:
  """Returns `config.json`, or None; raises a ValueError if it is corrupt."""
  path = workdir / 'config.json'
  if not path.exists():
    return None
  try:
    config = json.loads(files.read(path))
  except ValueError as error:
    raise ValueError(f'{path} is corrupt: {error}; use another folder') from (
      error
    )
  if not isinstance(config, dict):
    raise ValueError(f'{path} is corrupt: it holds no config')
  return config


def record(workdir: paths.Path, config: config_dict.ConfigDict) -> None:
  """Writes `config.json` and removes any older report; creates the folder."""
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'report.json').unlink(missing_ok=True)
  write_json(workdir / 'config.json', config.to_dict())


def check_data(
  workdir: paths.Path, data: Mapping[str, Any], allow_change: bool
) -> bool:
  """Returns whether classes and number of training images are unchanged.

  A change raises a ValueError that lists it; with `allow_change` it is printed.
  `data` has `splits` and `class_names`, or only the latter.
  """
  old = read_data(workdir)
  return old is None or compare_data(workdir, old, data, allow_change)


def read_data(workdir: paths.Path) -> dict[str, Any] | None:
  """Returns `data.json`, or None; raises a ValueError if it is corrupt."""
  path = workdir / 'data.json'
  if not path.exists():
    return None
  try:
    data = json.loads(files.read(path))
    names = data['class_names']
    counts = [data['splits'][part]['count'] for part in ('train', 'test')]
    valid = (
      isinstance(names, list)
      and all(isinstance(x, str) for x in names)
      and all(isinstance(x, int) for x in counts)
    )
  except (KeyError, TypeError, ValueError):
    valid = False
  if not valid:
    raise ValueError(f'{path} is corrupt; move it away to continue without it')
  return data


def compare_data(
  source: str | paths.Path,
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  allow_change: bool,
) -> bool:
  """Like `check_data`, for the `old` data of the run or weights `source`."""
  sizes = {
    part: (old['splits'][part]['count'], split['count'])
    for part, split in new.get('splits', {}).items()
  }
  changed = {
    part: f'{part} split: {before:,} -> {after:,} images'
    for part, (before, after) in sizes.items()
    if before != after
  }
  if 'test' in changed:  # affects only the reported accuracy
    progress.say(f'the data of {source} have changed: {changed.pop("test")}')
  if difference := class_changes(old['class_names'], new['class_names']):
    changed['classes'] = difference
  if not changed:
    return True
  message = f'the data of {source} have changed:' + ''.join(
    f'\n  {line}' for line in changed.values()
  )
  if not allow_change:
    raise ValueError(
      f'{message}\nRestore them or use another --workdir; '
      '--allow_config_change goes on with them as they are.'
    )
  progress.say(message)
  return False


def class_changes(old: list[str], new: list[str]) -> str:
  """Describes how two lists of class names differ; '' if they do not."""
  if old == new:
    return ''
  if len(old) != len(new):
    return f'{len(old)} classes -> {len(new)} classes'
  moved = [
    f'{i}: {a!r} -> {b!r}'
    for i, (a, b) in enumerate(zip(old, new, strict=True))
    if a != b
  ]
  more = f' and {len(moved) - 5} more' if len(moved) > 5 else ''
  return f'classes {", ".join(moved[:5])}{more}'


def changes(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns the fields of two configs that differ and affect results.

  Maps dotted names to (old, new), with '(absent)' for a missing field.

  Example:
    >>> changes({'seed': 0, 'data': {'size': 8}}, {'seed': 1, 'data': {}})
    {'data.size': (8, '(absent)'), 'seed': (0, 1)}
  """
  # Through JSON, so that tuples equal the lists in a file.
  first, second = (json.loads(json.dumps(x)) for x in (old, new))
  changed = _changes(first, second, '')
  return {k: v for k, v in changed.items() if k not in _CIRCUMSTANCES}


def _changes(old: Any, new: Any, name: str) -> dict[str, tuple[Any, Any]]:
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return {} if old == new else {name: (old, new)}
  changed: dict[str, tuple[Any, Any]] = {}
  for key in sorted(old.keys() | new.keys()):
    missing = '(absent)'
    inner = f'{name}.{key}' if name else key
    changed |= _changes(old.get(key, missing), new.get(key, missing), inner)
  return changed


def write_json(path: paths.Path, value: Any) -> None:
  """Writes indented JSON atomically."""
  files.write(path, (json.dumps(value, indent=2) + '\n').encode())


def read_report(workdir: paths.Path) -> dict[str, Any] | None:
  """Returns `report.json`, or None if the run has not finished."""
  path = workdir / 'report.json'
  return json.loads(files.read(path)) if path.exists() else None


def format_report(report: Mapping[str, Any], workdir: paths.Path) -> str:
  """Formats a report of `training.train.train_and_evaluate` as a table."""

  def percent(name: str) -> str:
    return f'{100 * report[name]:9.2f} %'

  rows = [
    f'{"":14}{"weights":>11}{"EMA":>11}',
    f'{"top-1":14}{percent("eval_top_1")}{percent("ema_eval_top_1")}',
  ]
  if report.get('num_classes', 1000) > 5:  # else top-5 is trivial
    rows.append(
      f'{"top-5":14}{percent("eval_top_5")}{percent("ema_eval_top_5")}'
    )
  rows += [
    f'{"loss":14}{report["eval_loss"]:9.4f}  {report["ema_eval_loss"]:9.4f}',
  ]
  if 'num_params' in report:
    speed = report['images_per_second']
    rows += [
      f'{"parameters":14}{report["num_params"]:>20,}',
      f'{"steps":14}{report["steps"]:>20,}',
      f'{"images/s":14}{"-" if speed is None else f"{speed:,.0f}":>20}',
    ]
  width = max(map(len, rows))
  rule = '-' * width
  return '\n'.join([rule, *rows, rule, f'run: {workdir}'])
