"""Packs wheels and data for a machine without a network, and unpacks them.

  python -m experiments.gpu.pack --data_dir=DIR          (or: make gpu-pack)

gpu-pack/ gets CIFAR-10 as prepared by TFDS and, for CPython 3.12 on Linux,
x86-64, wheels of the packages that do not come with jax, flax, torch and timm,
at the versions of constraints.txt. With the repository it must stay below 64
MiB.
"""

import argparse
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

from experiments.gpu import common
from nfnets_jax import paths

_ROOT = pathlib.Path(__file__).parents[2]
# absl, psutil, pyarrow, requests and the like come with jax, torch and timm.
# protobuf and etils do too, but at untested versions.
_PACKAGES = (
  'array_record',
  'dm-haiku',
  'dm-tree',
  'docstring_parser',
  'etils',
  'googleapis-common-protos',
  'grain',
  'immutabledict',
  'importlib_resources',
  'jmp',
  'ml_collections',
  'portpicker',
  'protobuf',
  'simple-parsing',
  'simplejpeg',
  'tensorboardX',
  'tensorflow-datasets',
  'tensorflow-metadata',
  'termcolor',
  'toml',
)
# Pure Python, but without a wheel on PyPI.
_SOURCES = ('promise',)
_TARGET = (
  '--only-binary=:all:',
  '--python-version=3.12',
  '--implementation=cp',
  *(f'--platform=manylinux_2_{minor}_x86_64' for minor in (28, 27, 24, 17)),
  '--platform=manylinux2014_x86_64',
  '--platform=manylinux1_x86_64',
)
_MOST = 64 * 2**20


def versions() -> dict[str, str]:
  """Returns the tested versions that are the same for all Pythons."""
  text = (_ROOT / 'constraints.txt').read_text()
  return dict(re.findall(r'^([\w.-]+)==([\w.]+)$', text, re.MULTILINE))


def gather_wheels(folder: pathlib.Path) -> None:
  """Downloads the wheels, and builds those that PyPI lacks."""
  tested = versions()
  # Two versions of a package could not be installed together.
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  for command, names in (
    (['download', *_TARGET, f'--dest={folder}'], _PACKAGES),
    (['wheel', f'--wheel-dir={folder}'], _SOURCES),
  ):
    pinned = [f'{name}=={tested[name]}' for name in names]
    _pip(*command, '--no-deps', *pinned)


def _pip(*words: str) -> None:
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
  subprocess.run([*pip, *words], check=True)


def archive_data(source: pathlib.Path, target: pathlib.Path) -> None:
  """Archives a prepared data set; small JPEGs compress well together."""
  target.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(target, 'w:gz') as archive:
    archive.add(source, source.name)


def size(folder: pathlib.Path) -> int:
  """Returns the bytes of all files in a folder."""
  return sum(x.stat().st_size for x in folder.rglob('*') if x.is_file())


def install() -> pathlib.Path | None:
  """Unpacks the wheels of the pack if this Python lacks any package.

  Returns:
    The folder to put on the path; None if nothing is missing.

  Raises:
    SystemExit: if packages are missing and there is no pack.
  """
  missing = [x for x in (*_PACKAGES, *_SOURCES) if not _installed(x)]
  if not missing:
    return None
  wheels = sorted(map(str, (common.pack() / 'wheels').glob('*.whl')))
  if not wheels:
    sys.exit(
      f'error: {sys.executable} lacks {", ".join(missing)}, and there are no '
      f'wheels in {common.pack()}/wheels; run make gpu-pack where there is a '
      'network, or make install and make gpu PYTHON=.venv/bin/python'
    )
  site = common.scratch().absolute() / 'site'
  if site.exists():  # from an earlier command
    return site
  partial = site.with_name('site-partial')
  flags = '--no-index --no-deps --no-compile --no-cache-dir --upgrade --target'
  _pip('install', *flags.split(), str(partial), *wheels)
  partial.rename(site)
  return site


def _installed(package: str) -> bool:
  return any(importlib.metadata.distributions(name=package))


def unpack_data() -> None:
  """Unpacks the data set of the pack, if there is one."""
  name, folder = common.data_set()
  archive = common.pack() / f'{name}.tar.gz'
  if archive.exists() and not (folder / name).exists():
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as opened:
      opened.extractall(folder, filter='data')


def main(argv: list[str] | None = None) -> None:
  """Makes the pack and prints its size."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.pack',
    description='Packs wheels and data for `make gpu`.',
  )
  parser.add_argument('--output', default='gpu-pack', help='output folder')
  parser.add_argument(
    '--data_dir',
    default='~/tensorflow_datasets',
    help="folder of TFDS's data sets",
  )
  parser.add_argument(
    '--data_name', default='cifar10', help='name of CIFAR-10 there'
  )
  args = parser.parse_args(argv)
  output = paths.local_literal(args.output, '--output')
  data = paths.local(args.data_dir, '--data_dir') / args.data_name
  if not data.is_dir():
    sys.exit(
      f'error: there is no data set {data}; give --data_dir and --data_name'
    )
  gather_wheels(output / 'wheels')
  archive = output / f'{args.data_name}.tar.gz'
  archive_data(data, archive)
  tracked = subprocess.run(
    ['git', 'ls-files', '-z'], cwd=_ROOT, capture_output=True, text=True
  ).stdout.split('\0')
  repository = sum(
    (_ROOT / name).stat().st_size
    for name in tracked
    if (_ROOT / name).is_file()
  )
  total = size(output) + repository
  print(
    f'{output}: wheels {size(output / "wheels") / 2**20:.1f} MiB, data '
    f'{archive.stat().st_size / 2**20:.1f} MiB; with the repository '
    f'{total / 2**20:.1f} MiB of 64'
  )
  if total > _MOST:
    sys.exit('error: more than 64 MiB')


if __name__ == '__main__':
  main()
