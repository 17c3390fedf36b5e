r"""Trains or evaluates a network: flags in, one call out.

python -m nfnets_jax.main --config=experiments/digits.py --workdir=runs/digits

On several hosts the same command runs on each; experiments/launch/ has scripts.
"""

import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Experiment file, such as experiments/nfnet_imagenet.py:F0; fields are '
  'overridden by --config.field=value.',
  lock_config=True,
)
flags.DEFINE_string(
  'workdir', None, 'Folder of the run; a run found there is resumed.'
)
_MODE = flags.DEFINE_enum(
  'mode', 'train', ['train', 'evaluate'], 'What to do with the run.'
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  'allow_config_change', False, 'Resume a run that began with another config.'
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address',
  None,
  'host:port of process 0, of several. Without this and the next two, the '
  'environment of a TPU pod, SLURM, Open MPI or Kubernetes tells them.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes there are; 1 runs one by itself.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of the processes this is, from 0.'
)
_START_TIMEOUT = flags.DEFINE_integer(
  'start_timeout', 300, 'Seconds to wait at the start for other processes.'
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  'heartbeat_timeout',
  60,
  'Seconds without a sign of life from a process until the others end.',
)
flags.mark_flags_as_required(['config', 'workdir'])


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; understands `--config.field=None`.

  ml_collections would take None for a string, or refuse it.

  Args:
    argv: the program and its arguments.

  Returns:
    The program and what are no flags.
  """
  off = re.compile(r'--config\.([\w.]+)=None')
  fields = [match.group(1) for match in map(off.fullmatch, argv) if match]
  # ml_collections looks for overrides in sys.argv, whatever is parsed.
  sys.argv = [word for word in argv if not off.fullmatch(word)]
  rest = app.parse_flags_with_usage(sys.argv)
  for field in fields:
    try:
      _CONFIG.value.update_from_flattened_dict({field: None})
    except (AttributeError, KeyError):
      sys.exit(f'FATAL: --config.{field}=None: the config has no such field')
  return rest


def start(argv: list[str]) -> pathlib.Path:
  """Does what every mode begins with: quiet logs, and the other processes.

  Args:
    argv: what `parse_flags` left.

  Returns:
    The folder of the run.
  """
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    # Orbax says at level INFO what it does at each checkpoint.
    logging.set_verbosity(logging.WARNING)
  # Imported late, so that --help and a mistyped flag answer at once.
  from nfnets_jax.training import distributed

  workdir = flags.FLAGS.workdir
  if '://' in workdir:
    raise app.UsageError(
      f'--workdir={workdir} is no folder of this machine; mount the bucket or '
      'give a local path'
    )
  try:
    distributed.initialize(
      _COORDINATOR_ADDRESS.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      _START_TIMEOUT.value,
      _HEARTBEAT_TIMEOUT.value,
    )
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  import jax

  from nfnets_jax.training import host_memory

  if jax.default_backend() == 'cpu':
    host_memory.keep_freed_memory()
  return pathlib.Path(workdir).expanduser()


def main(argv: list[str]) -> None:
  """Runs one mode."""
  workdir = start(argv)
  from nfnets_jax.training import distributed, interrupt, progress, train
  from nfnets_jax.training import workdir as workdirs

  with distributed.ending_together(), interrupt.exiting():
    if _MODE.value == 'train':
      report = train.train_and_evaluate(
        _CONFIG.value, workdir, _ALLOW_CONFIG_CHANGE.value
      )
    else:
      report = train.evaluate_checkpoint(_CONFIG.value, workdir)
    progress.say(workdirs.format_report(report, workdir))


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
