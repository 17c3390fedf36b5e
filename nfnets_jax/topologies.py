"""Devices to compile for that need not be present, and their specifications.

`jax.pmap` compiles for the devices of a topology as for local ones. The
compilers come with libtpu and the CUDA plugin and run on CPU.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

from nfnets_jax import devices

GIB = 2**30


class Kind(NamedTuple):
  """A kind of device.

  For TPU v2 and v3 a device is one of the two cores of a chip; for v4 and v5p,
  as in jax, it is the whole chip.

  Attributes:
    platform: jax's name.
    memory: bytes per device.
    allocated: fraction of the memory that jax allocates to programs.
    flops: peak bfloat16 operations per second.
    float32_flops: the same for float32 products at jax's default precision:
      bfloat16 on TPU, TF32 on GPU.
    exact_flops: the same for float32 products at precision 'float32': six
      bfloat16 passes on TPU.
    bandwidth: memory bandwidth in bytes per second.
    clock: cycles per second; None if unpublished.
    example: name of a topology.
  """

  platform: str
  memory: int
  allocated: float
  flops: float
  float32_flops: float
  exact_flops: float
  bandwidth: float
  clock: float | None
  example: str


def _tpu(
  memory: int, flops: float, bandwidth: float, clock: float | None, example: str
) -> Kind:
  return Kind(
    'tpu', memory, 1.0, flops, flops, flops / 6, bandwidth, clock, example
  )


# TPUs: cloud.google.com/tpu/docs, "TPU versions", halved for v2 and v3; clocks:
# Jouppi et al. 2021 and 2023. H100: NVIDIA's data sheet of the SXM5, dense;
# memory as reported by the driver, of which jax allocates three quarters.
KINDS = {
  'v2': _tpu(8 * GIB, 22.5e12, 350e9, 700e6, 'v2:2x2'),
  'v3': _tpu(16 * GIB, 61.5e12, 450e9, 940e6, 'v3:4x4'),
  'v4': _tpu(32 * GIB, 275e12, 1228e9, 1050e6, 'v4:2x2x1'),
  'v5e': _tpu(16 * GIB, 197e12, 819e9, None, 'v5e:8x8'),
  'v5p': _tpu(95 * GIB, 459e12, 2765e9, None, 'v5p:4x4x4'),
  'v6e': _tpu(32 * GIB, 918e12, 1640e9, None, 'v6e:8x8'),
  'h100': Kind(
    'cuda', 84978958336, 0.75, 989e12, 494e12, 67e12, 3352e9, None, 'h100x8'
  ),
}

# By jax's names.
_KIND_NAMES = {
  'TPU v2': 'v2',
  'TPU v3': 'v3',
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5': 'v5p',
  'TPU v6 lite': 'v6e',
  'NVIDIA H100 80GB HBM3': 'h100',
}

# The specification that XLA needs to compile for an absent H100.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978958336
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Topology(NamedTuple):
  """Devices to compile for.

  Attributes:
    name: of the topology.
    platform: of its devices.
    devices: all devices.
    kind: specification; None for unknown local devices.
    memory: bytes per device for programs; None if unknown.
    options: compiler options.
  """

  name: str
  platform: str
  devices: list[jax.Device]
  kind: Kind | None
  memory: int | None
  options: dict[str, bool]


def get(name: str) -> Topology:
  """Returns a topology by name. Call it before jax has started.

  Args:
    name: 'local' for the devices of this machine, 'v3:4x4' and the like for a
      TPU slice of 4 x 4 chips, 'h100' or 'h100x8' for one or eight GPUs.

  Raises:
    ValueError: if the topology does not exist; the message lists examples.
    ModuleNotFoundError: if its compiler is not installed; the message has the
      command.

  Example:
    >>> get('v3:four')
    Traceback (most recent call last):
    ValueError: there is no topology 'v3:four'; give local, h100, h100x8 or ...
  """
  if name == 'local':
    devices.start()
    local = jax.devices()
    kind_name = _KIND_NAMES.get(local[0].device_kind)
    kind = KINDS[kind_name] if kind_name else None
    memory = devices.known_memory()
    return Topology(name, local[0].platform, local, kind, memory, {})
  tpu = re.fullmatch(r'(v\d+[ep]?):(\d+(?:x\d+){1,2})', name)
  gpu = re.fullmatch(r'(h100)(?:x([1-9]\d*))?', name)
  match = tpu or gpu
  if match is None or match[1] not in KINDS:
    raise ValueError(_unknown(name))
  kind = KINDS[match[1]]
  if tpu and tpu[2].count('x') != kind.example.count('x'):
    raise ValueError(_unknown(name))
  memory = int(kind.allocated * kind.memory)
  _need_compiler(kind.platform, name)
  # Do not look for a TPU: this process only compiles.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  # libtpu warns without a valid type; the name determines the slice.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v3-8')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'none')
  # Otherwise only one process at a time may load libtpu.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  jax.config.update('jax_platforms', 'cpu')
  from jax.experimental import topologies

  if gpu:
    # Slices, hosts and devices per host.
    described = topologies.get_topology_desc(
      platform='cuda',
      topology_name=name,
      target_config=_H100,
      topology=f'1x1x{match[2] or 1}',
    )
    # Without a GPU to autotune on, Triton has no tiling for some products.
    options = {'xla_gpu_enable_triton_gemm': False}
  else:
    options = {}
    try:
      described = topologies.get_topology_desc(
        platform='tpu', topology_name=name, **_layout(match[1], match[2])
      )
    except (RuntimeError, ValueError) as error:
      reason = ' '.join(str(error).split())
      raise ValueError(f'{_unknown(name)}; libtpu says: {reason}') from error
  return Topology(name, kind.platform, described.devices, kind, memory, options)


def _layout(kind: str, chips: str) -> dict[str, Any]:
  """Returns libtpu's arguments for a slice besides its name."""
  layout: dict[str, Any] = {}
  if kind == 'v4':
    layout['chip_config_name'] = 'megacore'  # a chip is one device
  if math.prod(map(int, chips.split('x'))) == 1:
    layout['chips_per_host_bounds'] = (1, 1, 1)  # part of a host
  return layout


def _unknown(name: str) -> str:
  examples = [x.example for x in KINDS.values() if x.platform == 'tpu']
  return (
    f'there is no topology {name!r}; give local, h100, h100x8 or another '
    f'number, or the chips of a TPU slice, as in {", ".join(examples)}'
  )


def _need_compiler(platform: str, name: str) -> None:
  """Raises an error if the compiler of a platform is not installed."""
  modules = {
    'tpu': ('libtpu',),
    'cuda': ('jax_cuda13_plugin', 'jax_cuda12_plugin'),
  }[platform]
  if not any(map(importlib.util.find_spec, modules)):
    raise ModuleNotFoundError(
      f'{name} needs the compiler of {platform}, {modules[0]}, which is not '
      f'installed here; make compile TOPOLOGY={name} installs it in an '
      'environment apart',
      name=modules[0],
    )
