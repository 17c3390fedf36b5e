"""Devices that are not here, and what is known of them.

`jax.pmap` compiles for the devices of a topology as for those of the machine:
libtpu and CUDA's plugin bring their compilers, and those run on a CPU.
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
  """A kind of device; of a TPU v2 or v3 a device is one of a chip's two cores.

  Of a v4 or v5p, whose chips have two as well, it is the whole chip, as jax has
  it on one.

  Attributes:
    platform: as jax calls it.
    memory: bytes that a device has.
    allocated: the part of them that jax lets programs have.
    flops: operations a second in bfloat16, at most.
    float32_flops: the same of float32 products as jax makes them by default: in
      bfloat16 on a TPU, in TF32 on a GPU.
    exact_flops: the same of float32 products at the precision 'float32': six
      passes in bfloat16 on a TPU.
    bandwidth: bytes a second between a device and its memory.
    clock: cycles a second; None if it is not published.
    example: the name of a topology.
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
# Jouppi et al. 2021 and 2023. H100: NVIDIA's data sheet of the SXM5, dense; the
# memory is what its driver tells, and jax takes three quarters.
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

# As jax calls them.
_KIND_NAMES = {
  'TPU v2': 'v2',
  'TPU v3': 'v3',
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5': 'v5p',
  'TPU v6 lite': 'v6e',
  'NVIDIA H100 80GB HBM3': 'h100',
}

# What XLA asks of an H100 that it cannot see.
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
    devices: all of them.
    kind: what is known of them; None for those of this machine.
    memory: bytes of a device that programs can have; None if it does not say.
    options: of the compiler.
  """

  name: str
  platform: str
  devices: list[jax.Device]
  kind: Kind | None
  memory: int | None
  options: dict[str, bool]


def get(name: str) -> Topology:
  """Returns the devices that a name means; call it before jax has started.

  Args:
    name: 'local' for those of this machine, 'v3:4x4' and the like for a TPU
      slice of 4 x 4 chips, 'h100' or 'h100x8' for one or eight GPUs.

  Returns:
    The topology.

  Raises:
    ValueError: if there is no such topology; the message says what there is.
    ModuleNotFoundError: if its compiler is not installed; the message has the
      command that installs it.

  Example:
    >>> get('v3:four')
    Traceback (most recent call last):
    ValueError: there is no topology 'v3:four'; give local, h100, h100x8 or ...
  """
  if name == 'local':
    devices.start()
    found = jax.devices()
    here = _KIND_NAMES.get(found[0].device_kind)
    kind = KINDS[here] if here else None
    memory = devices.known_memory()
    return Topology(name, found[0].platform, found, kind, memory, {})
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
  # This process computes nothing, and a host without a TPU need not look for
  # one.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  # Any type that there is, or libtpu warns; the slice is that of the name.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v3-8')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'none')
  # Else one process at a time.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  jax.config.update('jax_platforms', 'cpu')
  from jax.experimental import topologies

  if gpu:
    # Slices, hosts and devices.
    described = topologies.get_topology_desc(
      platform='cuda',
      topology_name=name,
      target_config=_H100,
      topology=f'1x1x{match[2] or 1}',
    )
    # Without a device to try tiles on, it finds none for some products.
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
  """What libtpu is told of a slice beside its name."""
  layout: dict[str, Any] = {}
  if kind == 'v4':
    layout['chip_config_name'] = 'megacore'  # a chip is one device
  if math.prod(map(int, chips.split('x'))) == 1:
    layout['chips_per_host_bounds'] = (1, 1, 1)  # less than a host
  return layout


def _unknown(name: str) -> str:
  examples = [x.example for x in KINDS.values() if x.platform == 'tpu']
  return (
    f'there is no topology {name!r}; give local, h100, h100x8 or another '
    f'number, or the chips of a TPU slice, as in {", ".join(examples)}'
  )


def _need_compiler(platform: str, name: str) -> None:
  """Raises if the compiler of a platform is not installed."""
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
