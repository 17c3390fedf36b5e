"""Feature maps of small networks of timm, and the sizes of its real ones.

`python -m tests.golden.timm_features`, with torch and timm, writes
`timm_features.npz` and `timm_feature_info.json`.
"""

import dataclasses
import json
import pathlib
import zlib

import numpy as np

from nfnets_jax.models import variants
from tests import golden

# timm's prefixes of the names, by family.
_PREFIXES = {
  'efficientnet': 'tf_',
  'nf_regnet': '',
  'nf_resnet': '',
  'nfnet': 'dm_',
}
# The variant here, the overrides here, timm's name and settings there.
NETS = {
  'nfnet_f0': (
    {
      'width': (32, 64, 96, 96),
      'depth': (1, 2, 1, 1),
      'group_width': (16,) * 4,
      'stem_width': (8, 16, 32, 64),
      'activation': 'silu',  # timm computes another GELU
    },
    'dm_nfnet_f0',
    {
      'channels': (32, 64, 96, 96),
      'depths': (1, 2, 1, 1),
      'group_size': 16,
      'stem_chs': 64,
      'num_features': 192,
      'act_layer': 'silu',
    },
  ),
  'nf_resnet50': (
    {
      'width': (32, 64, 96, 128),
      'depth': (1, 2, 1, 1),
      'stem_width': 16,
    },
    'nf_resnet50',
    {'channels': (32, 64, 96, 128), 'depths': (1, 2, 1, 1), 'stem_chs': 16},
  ),
  'nf_regnet_b0': (
    {
      'width': (24, 48, 72, 96),
      'depth': (1, 2, 1, 1),
      'final_width': 192,
    },
    'nf_regnet_b0',
    {
      'channels': (32, 64, 96, 128),
      'depths': (1, 2, 1, 1),
      'num_features': 256,
    },
  ),
}
FOLDER = pathlib.Path(__file__).parent


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the value of a tensor of timm, float32."""
  rng = np.random.default_rng([0, zlib.crc32(key.encode())])
  x = np.asarray(rng.standard_normal(shape), np.float32)
  if key.endswith('weight'):
    return x / np.float32(np.sqrt(max(1, np.prod(shape[1:]))))
  if key.endswith('gain'):
    return np.float32(1) + np.float32(0.1) * x
  return np.float32(0.1) * x


def maps(name: str) -> list[np.ndarray]:
  """Returns timm's maps `[B, H, W, C]` of a small network."""
  import torch
  from timm.models import _features, nfnet

  _, theirs, changes = NETS[name]
  settings = dataclasses.replace(nfnet.model_cfgs[theirs], **changes)
  net = nfnet.NormFreeNet(settings).eval()
  tensors = {
    key: torch.from_numpy(np.array(fill(key, tuple(x.shape))))
    for key, x in net.state_dict().items()
  }
  net.load_state_dict(tensors)
  # As `timm.create_model(..., features_only=True)` does.
  net = _features.FeatureListNet(net, flatten_sequential=True)
  images = golden.image(1, 32).transpose(0, 3, 1, 2)
  with torch.no_grad():
    found = net(torch.from_numpy(images.copy()))
  return [x.numpy().transpose(0, 2, 3, 1) for x in found]


def info() -> dict[str, list[list[int]]]:
  """Returns channels and strides of timm's networks by the name here."""
  import timm
  import torch

  sizes = {}
  with torch.device('meta'):
    for name, variant in variants.VARIANTS.items():
      theirs = f'{_PREFIXES.get(variant.family)}{name}'
      if theirs in timm.list_models():
        net = timm.create_model(theirs, features_only=True).feature_info
        sizes[name] = [
          list(x) for x in zip(net.channels(), net.reduction(), strict=True)
        ]
  return sizes


if __name__ == '__main__':
  np.savez_compressed(
    FOLDER / 'timm_features.npz',
    **{f'{name}/{i}': x for name in NETS for i, x in enumerate(maps(name))},
  )
  lines = [f'{json.dumps(k)}: {json.dumps(v)}' for k, v in info().items()]
  (FOLDER / 'timm_feature_info.json').write_text(
    '{\n' + ',\n'.join(lines) + '\n}\n'
  )
