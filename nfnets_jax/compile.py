r"""Compiles a run's steps for devices that need not be present: do they fit?

python -m nfnets_jax.compile --config=experiments/nfnet_imagenet.py:F1 \
  --topology=v3:4x4

Compiles the exact steps of the training loop, and exits with code 1 if one does
not fit. All figures come from the compiler of the devices: they are estimates,
not measurements. `make compile` installs the compilers of TPUs and GPUs in
separate environments.
"""

import json
import sys

from nfnets_jax import extras

# ruff: noqa: E402
extras.need('train', 'absl')

from absl import app, flags, logging

from nfnets_jax import command_line

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  'local',
  'Devices to compile for: local, v3:4x4, v5e:8x8, h100, h100x8 and the like.',
)
_MEMORY = flags.DEFINE_float(
  'memory', None, 'GiB of a device that programs can have, if not all of it.'
)
_EVALUATION = flags.DEFINE_bool(
  'evaluation', True, 'Compile the evaluation step too.'
)
_JSON = flags.DEFINE_bool('json', False, 'Print JSON instead of a table.')
_TEXT = flags.DEFINE_string(
  'text', None, "A file for the text of the compiled training step, in XLA's."
)
flags.mark_flags_as_required(['config'])


def main(argv: list[str]) -> None:
  """Prints the figures."""
  del argv
  if _MEMORY.value is not None and not 0 < _MEMORY.value < float('inf'):
    sys.exit(
      f'error: --memory is {_MEMORY.value:g}; give the GiB of a device, more '
      'than 0'
    )
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # TFDS is verbose
  # Imported late, so that --help and mistyped flags respond at once.
  from nfnets_jax import paths, topologies
  from nfnets_jax.training import estimates, estimates_table

  with command_line.telling():
    text_file = _TEXT.value and paths.local(_TEXT.value, '--text')
    if text_file:
      paths.existing(text_file.parent, '--text', 'folder')
    topology = topologies.get(_TOPOLOGY.value)
    memory = (
      None if _MEMORY.value is None else round(_MEMORY.value * topologies.GIB)
    )
    result, text = estimates.measure(
      _CONFIG.value, topology, memory, _EVALUATION.value
    )
  print(
    json.dumps(result, indent=2)
    if _JSON.value
    else estimates_table.table(result)
  )
  if text_file and text:
    text_file.write_text(text)
  sys.exit(not result['fits'])


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse_flags)
