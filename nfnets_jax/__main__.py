"""The command `nfnets-jax`; each subcommand is a module with its own flags.

`nfnets-jax predict` is the same as `python -m nfnets_jax.predict`.
"""

import difflib
import pathlib
import runpy
import sys
from collections.abc import Sequence

import nfnets_jax

# The module of each subcommand, its first flags, and what it does.
_COMMANDS: dict[str, tuple[str, list[str], str]] = {
  'train': ('main', ['--mode=train'], 'train a network; resumes a run'),
  'evaluate': ('main', ['--mode=evaluate'], 'evaluate a run or weights'),
  'predict': ('predict', [], 'classify photographs'),
  'convert': (
    'convert',
    [],
    "convert weights: the authors', timm's, StableHLO",
  ),
  'summary': ('summary', [], 'print parameters, MACs and memory of networks'),
  'compile': ('compile', [], 'compile a run for TPUs and GPUs: does it fit?'),
  'prepare': ('data.prepare', [], 'download and prepare a data set'),
  'fetch': ('data.fetch', [], 'copy a prepared data set from a bucket'),
}


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the subcommand that `argv` begins with, by default `sys.argv[1:]`."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  name = arguments[0] if arguments else '--help'
  if name in ('-h', '--help', 'help'):
    print(_usage())
  elif name == '--version':
    print(nfnets_jax.__version__)
  elif name in _COMMANDS:
    module, flags, _ = _COMMANDS[name]
    sys.argv = [f'nfnets-jax {name}', *flags, *arguments[1:]]
    # As with `python -m`, so that config files can import `experiments`.
    sys.path.insert(0, str(pathlib.Path.cwd()))
    runpy.run_module(
      f'nfnets_jax.{module}', run_name='__main__', alter_sys=True
    )
  else:
    near = difflib.get_close_matches(name, _COMMANDS)
    hint = f'did you mean {" or ".join(near)}?'
    if not near:
      hint = f'choose one of {", ".join(_COMMANDS)}'
    sys.exit(f'error: there is no command {name!r}; {hint}')


def _usage() -> str:
  lines = [f'  {name:10}{text}' for name, (_, _, text) in _COMMANDS.items()]
  return '\n'.join(
    [
      'usage: nfnets-jax COMMAND [FLAGS]',
      '',
      *lines,
      '',
      'nfnets-jax COMMAND --help shows the flags.',
    ]
  )


if __name__ == '__main__':
  main()
