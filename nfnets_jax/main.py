r"""Trains or evaluates a network: flags in, one call out.

python -m nfnets_jax.main --config=experiments/digits.py --workdir=runs/digits
"""

import pathlib

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
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv: list[str]) -> None:
  """Runs one mode."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    # Orbax says at level INFO what it does at each checkpoint.
    logging.set_verbosity(logging.WARNING)
  # Imported late, so that --help and a mistyped flag answer at once.
  from nfnets_jax.training import train
  from nfnets_jax.training import workdir as workdirs

  workdir = pathlib.Path(flags.FLAGS.workdir)
  if _MODE.value == 'train':
    report = train.train_and_evaluate(
      _CONFIG.value, workdir, _ALLOW_CONFIG_CHANGE.value
    )
  else:
    report = train.evaluate_checkpoint(_CONFIG.value, workdir)
  print(workdirs.format_report(report, workdir), flush=True)


if __name__ == '__main__':
  app.run(main)
