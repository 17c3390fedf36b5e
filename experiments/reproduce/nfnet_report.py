"""The page that compares a run of an NFNet on ImageNet with the paper."""

import datetime
import platform
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import config_dict

from experiments.reproduce import paper


def format_markdown(
  report: Mapping[str, Any],
  config: config_dict.ConfigDict,
  macs: int,
  peak_tflops: float,
  rehearsal: str | None = None,
) -> str:
  """Formats a run beside the paper's.

  Args:
    report: of the run, as in `report.json`.
    config: of the run.
    macs: multiply-accumulates of one training image's forward pass.
    peak_tflops: what a large matrix product reaches on one device.
    rehearsal: what was rehearsed; None for the real run.

  Returns:
    A page of Markdown.
  """
  with_sam = config.optimizer.sam_rho is not None
  rows = paper.WITH_SAM if with_sam else paper.RESULTS
  result = rows.get(config.model.name)
  cells = _accuracy(report, result)
  if report['images_per_second'] is not None:
    cells += _speed(report, config, macs, peak_tflops, result)
  lines = [
    f'# {config.model.name} on {config.data.name}',
    '',
    f'**A rehearsal, not a result.** {rehearsal}' if rehearsal else None,
    '' if rehearsal else None,
    '| | this run | the paper |',
    '|---|---|---|',
    *(f'| {" | ".join(line)} |' for line in cells),
    '',
    f'The paper: {result.note}.' if result and result.note else None,
    '' if result and result.note else None,
    f'This run: {report["steps"]:,} steps of {config.batch_size:,} images, '
    f'{report["num_params"]:,} parameters, seed {config.seed}, '
    f'{report["eval_count"]:,} test images at {config.data.eval_image_size} '
    f'px, {report["devices"]} × {report["device_kind"]}, '
    f'{config.compute_dtype}, '
    + (f'SAM with ρ {config.optimizer.sam_rho:g}, ' if with_sam else '')
    + f'jax {jax.__version__}, Python '
    f'{platform.python_version()}, {datetime.date.today()}.',
    '',
    "The paper's speed is that of 32 TPUv3 cores with 32 images each and data "
    'already on the devices. A step counts as six operations per '
    f'multiply-accumulate of the forward pass, {macs / 1e9:.2f} G per image of '
    f'{config.data.image_size} px.'
    + (" SAM's ascent adds its fraction of the images." if with_sam else ''),
    '',
  ]
  return '\n'.join(line for line in lines if line is not None)


def _percent(value: float) -> str:
  return f'{100 * value:.2f} %'


def _accuracy(
  report: Mapping[str, Any], result: paper.Result | None
) -> list[tuple[str, str, str]]:
  """Returns the names, this run's values and the paper's."""
  top_1 = f'{result.top_1:.1f} %' if result else '-'
  top_5 = f'{result.top_5:.1f} %' if result else '-'
  return [
    ('top-1, EMA', _percent(report['ema_eval_top_1']), top_1),
    ('top-5, EMA', _percent(report['ema_eval_top_5']), top_5),
    ('top-1, weights', _percent(report['eval_top_1']), '-'),
    ('top-5, weights', _percent(report['eval_top_5']), '-'),
  ]


def _speed(
  report: Mapping[str, Any],
  config: config_dict.ConfigDict,
  macs: int,
  peak_tflops: float,
  result: paper.Result | None,
) -> list[tuple[str, str, str]]:
  with_sam = config.optimizer.sam_rho is not None

  def column(
    batch: int,
    devices: int,
    speed: float,
    peak: float,
    peak_text: str,
    sam_fraction: float,
  ) -> tuple[str, ...]:
    # Two operations each, and the backward pass takes twice the forward pass.
    tflops = 6 * macs * (1 + sam_fraction * with_sam) / 1e12
    reached = speed * tflops / devices
    return (
      f'{1e3 * batch / speed:,.1f} ms',
      f'{batch:,} on {devices}',
      f'{speed:,.1f}',
      f'{reached:,.3f}',
      f'{_percent(reached / peak)} of {peak_text}',
    )

  ours = column(
    config.batch_size,
    report['devices'],
    report['images_per_second'],
    peak_tflops,
    f'{peak_tflops:,.3f} TFLOP/s, measured',
    config.optimizer.sam_fraction,
  )
  theirs: tuple[str, ...] = ('-',) * len(ours)
  if result is not None and result.step_ms is not None:
    images = paper.DEVICES * paper.IMAGES_PER_DEVICE
    theirs = column(
      images,
      paper.DEVICES,
      1e3 * images / result.step_ms,
      paper.PEAK_TFLOPS,
      f'{paper.PEAK_TFLOPS} TFLOP/s, nominal',
      paper.SAM_FRACTION,
    )
  names = (
    'training step',
    'images a step',
    'images/s',
    'TFLOP/s a device',
    'share of its peak',
  )
  return list(zip(names, ours, theirs, strict=True))
