r"""Trains or evaluates a network.

python -m nfnets_jax.main --config=experiments/digits.py --workdir=runs/digits
python -m nfnets_jax.main --mode=evaluate --workdir=runs/digits

Without --config, evaluation takes the settings of the run in the workdir, or of
the weights in --config.init_from. --config.field=value overrides them.

With several hosts, run the same command on each; see experiments/launch/.
"""

import os
import sys

from nfnets_jax import extras

# ruff: noqa: E402
extras.need('train', 'absl')

from absl import app, flags, logging

from nfnets_jax import command_line, paths

_CONFIG = command_line.define_config()
flags.DEFINE_string(
  'workdir', None, 'Folder of the run; a run found there is resumed.'
)
_MODE = flags.DEFINE_enum(
  'mode', 'train', ['train', 'evaluate'], 'What to do with the run.'
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  'allow_config_change',
  False,
  'Resume a run of another config or other data.',
)
_PROFILE = flags.DEFINE_integer(
  'profile',
  0,
  'Number of training steps to trace, for the profiler of TensorBoard.',
  lower_bound=0,
)
_DEBUG_NANS = flags.DEFINE_bool(
  'debug_nans',
  False,
  'Stop at the first NaN and name the operation that made it; takes more '
  'memory.',
)
_PER_CLASS = flags.DEFINE_bool(
  'per_class',
  False,
  'In an evaluation, write the accuracy of each class and a confusion matrix.',
)
_LABEL_SETS = flags.DEFINE_string(
  'label_sets', None, "In an evaluation, the file real.json of ImageNet's ReaL."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address',
  None,
  'host:port of process 0. Without this and the next two flags, processes are '
  'detected from the environment of a TPU pod, SLURM, Open MPI or Kubernetes.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes; 1 ignores the environment.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Index of this process, from 0.'
)
_START_TIMEOUT = flags.DEFINE_integer(
  'start_timeout', 300, 'Seconds to wait for the other processes to start.'
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  'heartbeat_timeout',
  60,
  'Seconds without a heartbeat after which a process counts as dead.',
)
flags.mark_flags_as_required(['config', 'workdir'])


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags, and finds the config of an evaluation without --config."""
  evaluates = command_line.find_flag(argv, 'mode') == 'evaluate'
  if command_line.HELP.intersection(argv):
    return command_line.parse_flags(argv)
  if evaluates and command_line.find_flag(argv, 'config') is None:
    source = command_line.find_flag(argv, 'config.init_from')
    workdir = command_line.find_flag(argv, 'workdir')
    if source in (None, 'None') and workdir:
      with command_line.telling():
        folder = paths.expand_literal(workdir, '--workdir')
        source = str(folder)
        if not (folder / 'config.json').exists():
          raise FileNotFoundError(
            f'there is no run to evaluate in {source}; train first, or give '
            '--config.init_from=FILE'
          )
    if source is not None:
      argv = [argv[0], f'--config={source}', *argv[1:]]
  return command_line.parse_flags(argv)


def start() -> paths.Path:
  """Sets up logging and the distributed runtime; returns the run's folder."""
  for flag in (_PER_CLASS, _LABEL_SETS):
    if flag.value and _MODE.value != 'evaluate':
      sys.exit(f'error: --{flag.name} needs --mode=evaluate')
  if _PROFILE.value and _MODE.value != 'train':
    sys.exit('error: --profile needs --mode=train')
  if _PER_CLASS.value and _LABEL_SETS.value:
    sys.exit('error: --per_class needs one label an image; omit --label_sets')
  if not flags.FLAGS['verbosity'].present:
    # Orbax logs every checkpoint at level INFO.
    logging.set_verbosity(logging.WARNING)
  # Imported late, so that --help and mistyped flags respond at once.
  from nfnets_jax.runtime import processes

  with command_line.telling():
    workdir = paths.expand_literal(flags.FLAGS.workdir, '--workdir')
    _check_workdir(workdir)
    processes.initialize(
      _COORDINATOR_ADDRESS.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      _START_TIMEOUT.value,
      _HEARTBEAT_TIMEOUT.value,
    )
  import jax

  from nfnets_jax.training import host_memory

  jax.config.update('jax_debug_nans', _DEBUG_NANS.value)
  if jax.default_backend() == 'cpu':
    host_memory.keep_freed_memory()
  return workdir


def _check_workdir(workdir: paths.Path) -> None:
  """Checks that the folder exists or can be created."""
  if paths.in_bucket(workdir):
    bucket = [workdir, *workdir.parents][-3]  # below '/' and its scheme
    if not bucket.exists():
      raise FileNotFoundError(f'--workdir={workdir}: there is no {bucket}')
    return
  folders = (workdir, *paths.absolute(workdir).parents)
  folder = next(x for x in folders if x.exists())
  if not folder.is_dir():
    raise NotADirectoryError(f'--workdir={workdir}: {folder} is not a folder')
  if not os.access(folder, os.W_OK):
    message = f'--workdir={workdir}: {folder} is not writable'
    if _MODE.value == 'evaluate':
      message += f'; give another, and --config.init_from={workdir}'
    raise PermissionError(message)


def main(argv: list[str]) -> None:
  """Trains or evaluates."""
  del argv
  workdir = start()
  import jax

  from nfnets_jax.runtime import interrupt, processes, progress
  from nfnets_jax.runtime import workdir as workdirs
  from nfnets_jax.training import evaluate, evaluation_files, train

  with processes.ending_together(), command_line.telling(), interrupt.exiting():
    if _MODE.value == 'train':
      report = train.train_and_evaluate(
        _CONFIG.value, workdir, _ALLOW_CONFIG_CHANGE.value, _PROFILE.value
      )
      progress.say(workdirs.format_report(report, workdir))
    else:
      evaluation_files.check(workdir)
      evaluation = evaluate.evaluate_in_detail(
        _CONFIG.value,
        workdir,
        _ALLOW_CONFIG_CHANGE.value,
        _LABEL_SETS.value,
      )
      # Before it is written, which can fail.
      progress.say(evaluation_files.describe(evaluation))
      if jax.process_index() == 0:
        for path in evaluation_files.write(
          workdir, evaluation, _PER_CLASS.value
        ):
          progress.say(f'wrote {path}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
