"""Writes the table of all networks, with their sizes and the published ones.

  make tables

Networks are only traced, at their test size.
"""

import argparse
import pathlib

from nfnets_jax import devices, summary
from nfnets_jax.models import published, variants

_FILE = pathlib.Path(__file__).parents[2] / 'docs' / 'models.md'

_HEAD = """# The networks and their sizes

Made by `make tables`. GMACs: multiply-accumulates of a forward pass of one
image of the test size, 10⁹, which the papers call FLOPs. Published sizes are
those of `nfnets_jax/models/published.py`, which names their sources.

| network | train px | test px | parameters | published M | difference | GMACs | published | difference |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""  # noqa: E501


def row(name: str) -> str:
  """Returns the line of a variant."""
  variant = variants.get(name)
  params, macs = summary.count(name, variant.test_size)
  reported = published.SIZES.get(name, published.Size(None, None))
  cells = [
    f'`{name}`',
    str(variant.train_size),
    str(variant.test_size),
    f'{params:,}',
    *_beside(params / 1e6, reported.params),
    f'{macs / 1e9:.2f}',
    *_beside(macs / 1e9, reported.macs),
  ]
  return f'| {" | ".join(cells)} |'


def _beside(ours: float, theirs: float | None) -> tuple[str, str]:
  """Formats the published figure, if any, and our difference from it."""
  if theirs is None:
    return '', ''
  return f'{theirs:g}', f'{100 * (ours / theirs - 1):+.1f} %'


def main(argv: list[str] | None = None) -> None:
  argparse.ArgumentParser(
    prog='python -m experiments.figures.tables',
    description='Writes docs/models.md.',
  ).parse_args(argv)
  devices.start_or_exit()
  lines = [row(name) for name in variants.VARIANTS]
  _FILE.write_text(_HEAD + '\n'.join(lines) + '\n')
  print(f'{len(lines)} networks in {_FILE}')


if __name__ == '__main__':
  main()
