"""Formats estimates as text."""

from typing import Any

from nfnets_jax import hlo
from nfnets_jax.topologies import GIB

# Title, name in the figures of a step, unit and digits.
_ROWS = (
  ('arguments: state and batch, GiB', 'arguments', GIB, 3),
  ('results beside them, GiB', 'outputs', GIB, 3),
  ('temporaries, GiB', 'temporaries', GIB, 3),
  ('program, GiB', 'code', GIB, 3),
  ('total with two waiting batches, GiB', 'total', GIB, 3),
  ('TFLOP', 'flops', 1e12, 3),
  ('bytes accessed, GB', 'bytes_accessed', 1e9, 2),
  ('collectives, MB', 'collective_bytes', 1e6, 1),
  ('of these overlapped with work, MB', 'overlapped_bytes', 1e6, 1),
  (f'gathers of more than {hlo.LARGE:,} elements', 'large_gathers', 1, 0),
  ('scatters of as many', 'large_scatters', 1, 0),
  ('all operations at peak, ms', 'compute_seconds', 1e-3, 1),
  ('all bytes at peak, ms', 'memory_seconds', 1e-3, 1),
  ('estimated time, ms', 'seconds', 1e-3, 1),
  ("by the compiler's cycles, ms", 'cycle_seconds', 1e-3, 1),
  ('compiled in, s', 'compile_seconds', 1, 1),
)


def table(result: dict[str, Any]) -> str:
  """Formats the result of `estimates.measure`."""
  x = result
  lines = [
    f'{x["model"]}, {x["image_size"]} px, {x["compute_dtype"]}, batch '
    f'{x["batch_size"]:,} on {x["topology"]}: {x["devices"]:,} device(s) of '
    f'{x["per_device_batch"]:,} images ({x["compiler"]})'
  ]
  room = (
    f'{x["usable_memory"] / GIB:.2f} of {x["device_memory"] / GIB:.2f} GiB '
    'per device'
  )
  if not x['fits']:
    lines += ['', f'It does not fit into {room}: {x["reason"]}', _advice(x)]
    return '\n'.join(lines)
  remat = f', remat {x["remat"]}' if x['remat'] else ''
  lines += [
    f'It fits into {room}: {x["micro_batches"]} micro-batch(es){remat}',
    '',
    *_rows({k: x[k] for k in ('training', 'evaluation') if k in x}),
  ]
  if 'images_per_second' in x:
    lines += [
      '',
      f'{x["images_per_second"]:,.0f} images/s and {x["days"]:.2f} days for '
      f'{x["epochs"]:g} epochs, if collectives, input and evaluation take no '
      f'time; bound by {x["training"]["bound"]}',
    ]
  return '\n'.join(lines)


def _rows(columns: dict[str, dict[str, Any]]) -> list[str]:
  """Returns a line for each figure that any column has."""

  def row(title: str, cells: list[str]) -> str:
    return f'{title:46}' + ''.join(f'{cell:>12}' for cell in cells)

  lines = [row('estimates for each device and step', list(columns))]
  for title, name, unit, digits in _ROWS:
    values = [column.get(name) for column in columns.values()]
    if any(value is not None for value in values):
      cells = ['' if x is None else f'{x / unit:,.{digits}f}' for x in values]
      lines.append(row(title, cells))
  return lines


def _advice(result: dict[str, Any]) -> str:
  if 'training' in result:
    return 'The training step fits; its figures are in the JSON.'
  if remedy := result['remedy']:
    remat = f' and remat={remedy["remat"]!r}' if remedy['remat'] else ''
    return (
      f'micro_batches={remedy["micro_batches"]}{remat} fits, with '
      f'{remedy["bytes"] / GIB:.2f} GiB'
    )
  return (
    'No number of micro-batches fits, with remat or without. Make '
    'data.image_size or batch_size smaller, or take more devices'
  )
