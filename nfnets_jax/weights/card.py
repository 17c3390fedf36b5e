"""Writes a folder to upload to the Hugging Face hub: weights, config and card.

Networks that timm has are written in its form, so that
`timm.create_model('hf-hub:OWNER/NAME', pretrained=True)` loads them. Any is
loaded by `--weights=hf-hub:OWNER/NAME` of this package.

Reference:
  https://huggingface.co/docs/hub/model-cards and
  `timm/models/_hub.py` of https://github.com/huggingface/pytorch-image-models.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from nfnets_jax.models import variants
from nfnets_jax.weights import hub, metadata, timm, writing
from nfnets_jax.weights.metadata import Weights

# Pixels by which both sides or the square exceed the crop; see `data.crops`.
_MARGIN = 32
_FIRST = {
  'efficientnet': 'conv_stem',
  'nf_regnet': 'stem.conv',
  'nf_resnet': 'stem.conv',
  'nfnet': 'stem.conv1',
}


def write(
  folder: pathlib.Path,
  weights: Weights,
  license: str,
  *,
  dataset: str | None = None,
  report: Mapping[str, Any] | None = None,
) -> None:
  """Writes `model.safetensors`, `config.json` and `README.md`.

  Args:
    folder: new or empty.
    weights: with their image size and crop.
    license: its identifier on the hub, such as 'apache-2.0'.
    dataset: name of the data that they were trained on.
    report: the run's `report.json`, with its accuracy.

  Raises:
    FileExistsError: if the folder is not empty.
    ValueError: if the weights are invalid, or image size or crop is missing.
  """
  check_folder(folder)
  if weights.image_size is None or weights.crop is None:
    raise ValueError('a model card needs the image size and crop')
  in_timm = is_in_timm(weights)
  form = 'timm' if in_timm else 'haiku'
  writing.write(folder / 'model.safetensors', weights, form)
  config = _config(weights) if in_timm else metadata.describe(weights)
  texts = {
    hub.CONFIG: json.dumps(config, indent=2) + '\n',
    'README.md': _card(folder.name, weights, license, dataset, report),
  }
  for name, text in texts.items():
    with writing.new_file(folder / name) as partial:
      partial.write_text(text)


def check_folder(folder: pathlib.Path) -> None:
  """Raises an error unless a folder is new or empty."""
  if folder.exists() and not folder.is_dir():
    raise FileExistsError(f'{folder} is a file; --to=hub writes a folder')
  if folder.is_dir() and any(folder.iterdir()):
    raise FileExistsError(f'{folder} is not empty; choose another name')


def is_in_timm(weights: Weights) -> bool:
  """Returns whether timm computes the network."""
  return weights.name in timm.ARCHITECTURES and not timm.differences(
    weights.name, weights.overrides
  )


def _config(weights: Weights) -> dict[str, Any]:
  """Returns timm's config."""
  family = variants.get(weights.name).family
  assert weights.image_size is not None and weights.crop is not None
  fraction, mode = _crop(weights.crop, weights.image_size)
  config: dict[str, Any] = {
    'architecture': timm.ARCHITECTURES[weights.name],
    'num_classes': weights.num_classes,
    'global_pool': 'avg',
    'pretrained_cfg': {
      'custom_load': False,
      'input_size': [3, weights.image_size, weights.image_size],
      'fixed_input_size': False,
      'interpolation': 'bicubic',
      'crop_pct': fraction,
      'crop_mode': mode,
      'mean': list(hub.MEAN),
      'std': list(hub.STD),
      'num_classes': weights.num_classes,
      'first_conv': _FIRST[family],
      'classifier': 'classifier' if family == 'efficientnet' else 'head.fc',
    },
  }
  if weights.class_names is not None:
    config['label_names'] = list(weights.class_names)
  return config


def _crop(name: str, px: int) -> tuple[float, str]:
  """Returns timm's crop fraction and mode."""
  if name == 'resize':
    return 1.0, 'squash'
  match = re.fullmatch(r'(resize_crop|crop_resize)(?:_([\d.]+))?', name)
  if match is None:
    raise ValueError(f'the crop {name!r} has no counterpart in timm')
  number = match[2] or str(_MARGIN)
  fraction = float(number) if '.' in number else px / (px + int(number))
  return fraction, 'squash' if match[1] == 'resize_crop' else 'center'


def _card(
  title: str,
  weights: Weights,
  license: str,
  dataset: str | None,
  report: Mapping[str, Any] | None,
) -> str:
  in_timm = is_in_timm(weights)
  library = 'timm' if in_timm else 'nfnets_jax'
  count = sum(np.size(x) for v in weights.params.values() for x in v.values())
  header: dict[str, Any] = {
    'license': license,
    'library_name': library,
    'pipeline_tag': 'image-classification',
    'tags': ['image-classification', 'jax', *({library, 'nfnets_jax'})],
  }
  header['tags'] = sorted(header['tags'])
  if dataset is not None:
    header['datasets'] = [dataset]
  accuracy = _accuracy(report or {})
  if accuracy and dataset is not None:
    header['metrics'] = ['accuracy']
    header['model-index'] = [
      {
        'name': title,
        'results': [
          {
            'task': {'type': 'image-classification'},
            'dataset': {'name': dataset, 'type': dataset},
            'metrics': [
              {'type': 'accuracy', 'value': value, 'name': name}
              for name, value in accuracy.items()
            ],
          }
        ],
      }
    ]
  lines = [
    # JSON is YAML.
    '---',
    *(f'{key}: {json.dumps(value)}' for key, value in header.items()),
    '---',
    f'# {title}',
    '',
    f'{weights.name} of nfnets_jax: {count:,} parameters, '
    f'{weights.num_classes} classes.',
    '',
    f'- Images: {weights.image_size} px, crop `{weights.crop}`',
  ]
  if dataset is not None:
    lines.append(f'- Trained on: {dataset}')
  lines += [f'- {name}: {100 * x:.2f} %' for name, x in accuracy.items()]
  names = weights.class_names
  if names is not None:
    shown = ', '.join(names[:20]) + (', …' if len(names) > 20 else '')
    lines.append(f'- Classes: {shown}')
  lines += [
    '',
    '```sh',
    'python -m nfnets_jax.predict --weights=hf-hub:OWNER/NAME photograph.jpg',
    '```',
  ]
  if in_timm:
    lines += [
      '',
      '```python',
      'import timm',
      "net = timm.create_model('hf-hub:OWNER/NAME', pretrained=True).eval()",
      '```',
    ]
  lines += [
    '',
    '[High-Performance Large-Scale Image Recognition Without Normalization]'
    '(https://arxiv.org/abs/2102.06171), Brock et al. 2021',
  ]
  return '\n'.join(lines) + '\n'


def _accuracy(report: Mapping[str, Any]) -> dict[str, float]:
  """Returns the accuracy of the averaged weights, as fractions."""
  names = {
    'top-1 accuracy': 'ema_eval_top_1',
    'top-5 accuracy': 'ema_eval_top_5',
  }
  return {
    name: float(report[key]) for name, key in names.items() if key in report
  }
