"""Programs of a network with its weights: StableHLO and ONNX.

Each takes uint8 photographs `[B, px, px, 3]` and returns float32 logits
`[B, K]`. A JSON file beside it, such as `net.stablehlo.json`, has the model,
image size, crop, class names, input and output.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.export
import numpy as np

from nfnets_jax import extras, inference, paths, weights
from nfnets_jax.weights import metadata, writing

STABLEHLO, ONNX = '.stablehlo', '.onnx'
SUFFIXES = (STABLEHLO, ONNX)
# Platforms of a StableHLO program, by jax's names.
PLATFORMS = ('cpu', 'cuda', 'tpu')


@dataclasses.dataclass(frozen=True)
class Program:
  """A StableHLO program with its metadata.

  Attributes:
    name: the variant.
    num_classes: K.
    image_size: side of the images in pixels.
    crop: evaluation crop, as in `data.transforms.eval_transform`.
    class_names: K names; None if unknown.
    batch_size: of the images; None if any.
    forward: maps uint8 images `[B, px, px, 3]` to float32 logits `[B, K]`.
  """

  name: str
  num_classes: int
  image_size: int
  crop: str
  class_names: tuple[str, ...] | None
  batch_size: int | None
  forward: inference.Forward


def write(
  path: pathlib.Path,
  net_weights: weights.Weights,
  *,
  image_size: int | None = None,
  batch_size: int | None = None,
  precision: str = 'float32',
) -> None:
  """Writes a network with its folded weights, and the JSON beside it.

  A StableHLO program supports all `PLATFORMS`, with the convolution form that
  suits each. `jax2onnx` writes ONNX, for a fixed number of images.

  Args:
    path: the new file, ending in `.stablehlo` or `.onnx`.
    net_weights: as returned by `weights.read`.
    image_size: side of the photographs in pixels, by default that of
      `metadata.evaluation_of`.
    batch_size: photographs per call; None allows any number, and is 1 for ONNX.
    precision: 'float32' or 'bfloat16'.

  Raises:
    FileExistsError: if the file exists.
    ModuleNotFoundError: if ONNX needs a package that is not installed.
  """
  writing.check_new(path)
  px, crop = metadata.evaluation_of(net_weights)
  px = image_size or px
  forward = inference.create_forward(net_weights, precision)
  if path.suffix == ONNX:
    batch_size = batch_size or 1
    data = _to_onnx(forward, (batch_size, px, px, 3))
  else:
    shape = jax.export.symbolic_shape(f'{batch_size or "b"}, {px}, {px}, 3')
    images = jax.ShapeDtypeStruct(shape, np.uint8)
    export = jax.export.export(jax.jit(forward), platforms=PLATFORMS)
    data = bytes(export(images).serialize())
  dims = batch_size or 'b'
  facts = {
    **metadata.describe(net_weights),
    'image_size': px,
    'crop': crop,
    'precision': precision,
    'input': {
      'dtype': 'uint8',
      'shape': [dims, px, px, 3],
      'layout': 'NHWC, RGB from 0 to 255',
    },
    'output': {'dtype': 'float32', 'shape': [dims, net_weights.num_classes]},
  }
  with writing.new_file(path) as partial:
    partial.write_bytes(data)
    writing.write_sidecar(path, facts)


def check_onnx() -> None:
  """Raises a ModuleNotFoundError unless ONNX can be written."""
  extras.need('onnx', 'jax2onnx')


def _to_onnx(forward: inference.Forward, shape: tuple[int, ...]) -> bytes:
  check_onnx()
  import jax2onnx
  from jax2onnx.plugins import plugin_system

  plugin_system.import_all_plugins()

  @plugin_system.register_primitive(jaxpr_primitive='platform_index')
  class PlatformIndex(plugin_system.PrimitiveLeafPlugin):
    """Chooses the default form of `jax.lax.platform_dependent`."""

    def lower(self, ctx: Any, eqn: Any) -> None:
      default = eqn.params['platforms'].index(None)
      ctx.bind_const_for_var(eqn.outvars[0], np.asarray(default, np.int32))

  images = jax.ShapeDtypeStruct(shape, np.uint8)
  try:
    # Traces cached earlier lack the primitives of jax2onnx, and later ones must
    # not find them.
    jax.clear_caches()
    model = jax2onnx.to_onnx(
      forward, [images], input_names=['images'], output_names=['logits']
    )
  finally:
    jax.clear_caches()
  return model.SerializeToString()


def read(path: paths.PathLike, option: str = 'path') -> Program:
  """Reads a StableHLO program and the JSON beside it.

  Args:
    path: the file.
    option: the flag or argument that holds `path`, for messages.

  Raises:
    FileNotFoundError: if it or the JSON file does not exist.
    ValueError: if one of them is corrupt.
    OSError: if one of them cannot be read.
  """
  path = paths.existing(path, option, 'file')
  file = metadata.sidecar(path)
  if not file.exists():
    raise FileNotFoundError(
      f'{option}: there is no {file}, with the image size, crop and class '
      'names of the program; copy it too, or export the program again'
    )
  facts = metadata.read_sidecar(path)
  try:
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    ((images,), (logits,)) = program.in_avals, program.out_avals
    batch_size, px, _, _ = images.shape
    num_classes = int(logits.shape[1])
  except Exception as error:  # flatbuffers raises anything
    raise ValueError(
      f'{path}: it is not a program of nfnets_jax.convert, or is corrupt: '
      f'{error}'
    ) from error
  names = facts.get('class_names')
  names = tuple(names) if isinstance(names, list) else names
  crop = facts.get('crop', metadata.CROP)
  metadata.check_values(int(px), crop, names, num_classes)
  return Program(
    facts['model'],
    num_classes,
    int(px),
    crop,
    names,
    batch_size if isinstance(batch_size, int) else None,
    program.call,
  )
