"""Shared by the commands: the flag --config, and one-line error messages.

Errors that this package raises on purpose are shown as a message. Any other
error is a bug, in a config file or in the code, and keeps its traceback.
"""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from typing import Any

from nfnets_jax import extras

# ruff: noqa: E402
extras.need('train', 'absl', 'ml_collections')

from absl import app, flags
from ml_collections import config_dict, config_flags

from nfnets_jax import paths
from nfnets_jax.training import config as defaults

# Shows --config in the --help of a command.
flags.disclaim_key_flags()

HELP = {'-h', '-help', '--help'}
_PACKAGE = pathlib.Path(__file__).parent
_OURS = (_PACKAGE, _PACKAGE.parent / 'experiments')

# Values of --config that are weights, whose settings are taken.
_WEIGHTS = re.compile(r'released|hf[-_]hub:.*|.*\.(npz|safetensors)')

# Rewording of absl's and Python's messages.
_REASONS = {
  r"Unknown command line flag '(\w+)'\. Did you mean: (.+?) \?": (
    r'there is no flag --\1; did you mean --\2?'
  ),
  r"Unknown command line flag '(\w+)'": (
    r'there is no flag --\1; --help shows the flags'
  ),
  r'value should be one of <(.+)>': r'choose one of \1',
  r'(--\w+)=None: Flag \1 must have a value other than None\.': (
    r'\1 is missing; --help shows the flags'
  ),
  r'invalid literal for int\(\) with base 10: .*': 'not a whole number',
  r'could not convert string to float: .*': 'not a number',
  r"\('Non-boolean argument to boolean flag', .*": 'neither true nor false',
}


@contextlib.contextmanager
def telling() -> Iterator[None]:
  """Exits with `error: ...` and code 1 if the body raises one of our errors.

  So do errors of the operating system that name a file, as of permissions.

  Example:
    >>> with telling():
    ...   paths.expand('')
    Traceback (most recent call last):
    SystemExit: error: path is empty; give a path
  """
  try:
    yield
  except Exception as error:
    if isinstance(error, OSError) and error.filename is not None:
      sys.exit(f'error: {error.filename}: {error.strerror}')
    if not _is_refusal(error):
      raise
    sys.exit(f'error: {error}')


def _is_refusal(error: Exception) -> bool:
  """Returns whether this package raised the error on purpose."""
  frames = traceback.extract_tb(error.__traceback__)
  if not frames:
    return False
  path = pathlib.Path(frames[-1].filename).absolute()
  ours = any(path.is_relative_to(folder) for folder in _OURS)
  return ours and (frames[-1].line or '').startswith('raise ')


def define_config(
  default: str | None = None,
) -> flags.FlagHolder[config_dict.ConfigDict]:
  """Defines the flag --config, whose value is a locked config.

  `default` is an experiment file, with its argument. Commands imported into the
  same process share the flag.
  """
  if 'config' in flags.FLAGS:
    return flags.FlagHolder(flags.FLAGS, flags.FLAGS['config'])
  holder = config_flags.DEFINE_config_file(
    'config',
    None,
    'Experiment file, such as experiments/nfnet_imagenet.py:F0; fields are '
    'overridden by --config.field=value.',
  )
  flags.FLAGS['config'].parser = _ConfigParser()
  if default is not None:
    flags.set_default(holder, default)
  return holder


class _ConfigParser(flags.ArgumentParser):
  """Loads an experiment file, and checks the names of overridden fields."""

  def parse(self, argument: str) -> config_dict.ConfigDict:
    is_run = argument and _is_run(argument)
    is_weights = _WEIGHTS.fullmatch(argument) or argument == find_flag(
      sys.argv, 'config.init_from'
    )
    if argument and (is_run or is_weights):
      config = _recorded(argument)
    else:
      path, colon, rest = argument.partition(':')
      with telling():
        file = paths.existing(path, '--config', 'file')
      try:
        config = _load(file, [rest] if colon else [])
      except Exception as error:
        sys.exit(f'error: --config={argument}:{_describe(error, file)}')
    for word in sys.argv:
      if match := re.match(r'--?(?:no)?config\.([^=]+)', word):
        _check_field(config, match[1])
    return config

  def flag_type(self) -> str:
    return 'config object'


def _is_run(argument: str) -> bool:
  if not re.match(r'(gs|s3)://', argument):
    return pathlib.Path(argument, 'config.json').is_file()
  with telling():
    return (paths.expand(argument, '--config') / 'config.json').exists()


def _recorded(source: str) -> config_dict.ConfigDict:
  """Returns the config of a run or of weights."""
  from nfnets_jax.training import recorded

  with telling():
    if paths.expand(source, 'config.init_from').is_dir():
      return recorded.config_of_run(source)
    model = find_flag(sys.argv, 'config.model.name')
    return recorded.config_of_weights(source, model)


def find_flag(argv: list[str], name: str) -> str | None:
  """Returns the last value of a flag among arguments that are not parsed yet.

  Example:
    >>> find_flag(['main', '--mode=train', '--mode', 'evaluate'], 'mode')
    'evaluate'
  """
  value = None
  for word, following in zip(argv, [*argv[1:], None], strict=True):
    flag, equals, rest = word.partition('=')
    if flag in (f'--{name}', f'-{name}'):
      value = rest if equals else following
  return value


def _load(file: pathlib.Path, arguments: list[str]) -> config_dict.ConfigDict:
  name = 'config_config'  # the name in ml_collections
  loader = importlib.machinery.SourceFileLoader(name, str(file))
  spec = importlib.util.spec_from_loader(name, loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError('it defines no function get_config')
  try:
    inspect.signature(module.get_config).bind(*arguments)
  except TypeError as error:
    raise ValueError(
      f'it takes no argument; omit :{arguments[0]}'
      if arguments
      else f'it needs an argument: --config={file}:ARGUMENT'
    ) from error
  config = module.get_config(*arguments)
  if not isinstance(config, config_dict.ConfigDict):
    raise ValueError(
      f'get_config() returns {type(config).__name__}, not a ConfigDict'
    )
  config.lock()
  return config


def _describe(error: Exception, file: pathlib.Path) -> str:
  """Returns the message, or the traceback from the config file on."""
  if _is_refusal(error):
    return f' {error}'
  frame = error.__traceback__
  while frame and frame.tb_frame.f_code.co_filename != str(file):
    frame = frame.tb_next
  lines = traceback.format_exception(error.with_traceback(frame))
  return '\n' + ''.join(lines).rstrip()


def _check_field(config: config_dict.ConfigDict, field: str) -> None:
  node: Any = config
  for part in field.split('.'):
    if '[' in part:  # an index, which ml_collections checks
      return
    if not isinstance(node, config_dict.ConfigDict) or part not in node:
      sys.exit(
        f'error: --config.{field}: there is no such field{_hint(config, field)}'
      )
    node = node[part]


def _hint(config: config_dict.ConfigDict, field: str) -> str:
  known = _fields(config)
  similar = difflib.get_close_matches(field, known, n=1, cutoff=0.8)
  if not similar:
    last = {name.rpartition('.')[2]: name for name in known}
    matches = difflib.get_close_matches(
      field.rpartition('.')[2], last, cutoff=0.7
    )
    similar = [last[name] for name in matches]
  if similar:
    return f'; did you mean {" or ".join(similar)}?'
  return '; nfnets_jax/training/config.py lists the fields'


def _fields(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns the values by full name, as 'data.name'."""
  fields: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      fields |= {f'{name}.{key}': x for key, x in _fields(value).items()}
    else:
      fields[name] = value
  return fields


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags, and returns the name of the program.

  Supports `--config.field=None`; ml_collections would read None as a string, or
  reject it. `--help` also lists the fields of the config.
  """
  _check_words(argv)
  if HELP.intersection(argv):
    _print_help(argv)
    sys.exit()
  none = re.compile(r'--config\.([^=]+)=None')
  fields = [match[1] for match in map(none.fullmatch, argv) if match]
  # ml_collections looks for overrides in sys.argv.
  sys.argv = [word for word in argv if not none.fullmatch(word)]
  try:
    rest = flags.FLAGS(sys.argv)
  except flags.Error as error:
    text = re.sub('(?m)^flag ', '', str(error))
    for pattern, reason in _REASONS.items():
      text = re.sub(pattern, reason, text)
    sys.exit(f'error: {text}')
  for field in fields:
    _set_none(flags.FLAGS['config'].value, field)
  return rest


def _check_words(argv: list[str]) -> None:
  """Checks that flags have values, and that nothing else is there."""
  booleans = {x for x in flags.FLAGS if flags.FLAGS[x].boolean}
  previous = ''  # the flag before a word, without dashes
  for word in [*argv[1:], '--']:
    if re.match(r'--?[a-zA-Z]|--$', word):
      if previous in {*flags.FLAGS} - booleans:
        sys.exit(f'error: --{previous} has no value; give --{previous}=VALUE')
      previous = word.lstrip('-')
      continue
    if (
      not previous
      or '=' in previous
      or {previous, previous.removeprefix('no')} & booleans
    ):
      file = word.partition(':')[0].endswith('.py')
      hint = f'did you mean --config={word}?' if file else 'flags begin with --'
      sys.exit(f'error: unexpected argument {word}; {hint}')
    previous = ''


def _print_help(argv: list[str]) -> None:
  """Prints the flags, and the fields of the config with their values."""
  source = find_flag(argv, 'config')
  if source is not None:
    config = _ConfigParser().parse(source)
  else:
    config = flags.FLAGS['config'].value or defaults.get_config()
  app.usage(shorthelp=True, writeto_stdout=True)
  print(
    '\nFields of the config, set by --config.FIELD=VALUE; None is off.\n'
    'nfnets_jax/training/config.py documents them.'
  )
  sections: dict[str, list[str]] = {'': []}
  for field, value in _fields(config).items():
    text = f'{field}={value}'.replace(', ', ',')
    sections.setdefault(field.rpartition('.')[0], []).append(text)
  for entries in sections.values():
    text = textwrap.fill('  '.join(entries), 78, break_on_hyphens=False)
    print('\n' + textwrap.indent(text, '  '))


def _set_none(config: config_dict.ConfigDict, field: str) -> None:
  _check_field(config, field)
  parent, _, name = field.rpartition('.')
  node: Any = config
  for part in filter(None, parent.split('.')):
    node = node[part]
  value = dict(node.items(preserve_field_references=True))[name]
  # The model checks its own arguments; elsewhere only placeholders may be None.
  allowed = isinstance(value, config_dict.FieldReference) or parent == 'model'
  if not allowed and value is not None:
    sys.exit(
      f'error: --config.{field}=None: it cannot be off; it is {value!r} in '
      'this config'
    )
  config.update_from_flattened_dict({field: None})
