"""Classes of a data set match those of a net; ReaL labels match images."""

import json

import numpy as np
import pytest

from nfnets_jax.data import datasets, imagenet, labels, loader, transforms

IDS, DESCRIPTIONS = map(list, imagenet.classes())
IN_FULL = [f'{x} {y}' for x, y in zip(IDS, DESCRIPTIONS, strict=True)]


def test_imagenet_has_its_classes():
  assert len(set(IDS)) == len(IDS) == 1000 and sorted(IDS) == IDS
  assert IN_FULL[999] == (
    'n15075141 toilet tissue, toilet paper, bathroom tissue'
  )


@pytest.mark.parametrize(
  'net_names',
  [None, IDS, DESCRIPTIONS, IN_FULL],
)
def test_imagenet_classes_match_by_any_name(net_names):
  subset = np.random.default_rng(0).permutation(1000)[:200]
  for names in IDS, list(map(str, range(1000))):
    found = labels.label_map([names[i] for i in subset], net_names)
    assert found.dtype == np.int32 and found.tolist() == subset.tolist()
  # As the folders of ImageNet-V2 are sorted.
  names = sorted(map(str, range(1000)))
  assert labels.label_map(names, net_names)[:4].tolist() == [0, 1, 10, 100]
  assert labels.label_map(['tench, Tinca tinca'], net_names).tolist() == [0]
  with pytest.raises(ValueError, match="2 of 3 classes .* 'emu', 'crane'; "):
    labels.label_map(['emu', 'crane', IDS[0]], net_names)  # two are cranes
  with pytest.raises(ValueError, match="classes '1' and 'n01443537' .* both"):
    labels.label_map(['0', '1', 'n01443537'], net_names)


def test_other_nets_match_by_name_only():
  assert labels.label_map(['7', '3'], list('0123456789')).tolist() == [7, 3]
  assert labels.label_map(['emu'], ['cat', 'emu']).tolist() == [1]
  with pytest.raises(ValueError, match="1 of 1 .* none of the 2 .*: '1'"):
    labels.label_map(['1'], ['cat', 'emu'])


def test_label_sets_of_real(tmp_path):
  """Image 1 has two labels, 2 none, and 3 a class that is not selected."""
  path = tmp_path / 'real.json'
  path.write_text(json.dumps([[3, 1], [], [2]]))
  sets = labels.read_label_sets(path)
  assert sets == [(3, 1), (), (2,)]
  rng = np.random.default_rng(0)
  examples = [
    {
      'image': rng.integers(256, size=(8, 8, 3), dtype=np.uint8),
      'label': 0,
      'file_name': f'val/n01440764/ILSVRC2012_val_{i:08d}.JPEG'.encode(),
    }
    for i in (3, 1, 2)
  ]
  dataset = datasets.Dataset('x', 'val', examples, (IDS[1], IDS[3]))
  net_classes = labels.label_map(dataset.class_names)
  batches = loader.eval_batches(
    labels.with_label_sets(dataset, sets, net_classes),
    batch_size=2,
    transform=transforms.eval_transform(8, 'resize'),
    num_workers=0,
  )
  batch, last = batches
  assert batch['label_set'].tolist() == [[-1, -1], [1, 0]]
  assert batch['label_set'].dtype == np.int32
  assert batch['mask'].tolist() == [0, 1]
  assert last['mask'].tolist() == [0, 0]  # no labels; padding

  longer = labels.with_label_sets(dataset, sets[:2])
  with pytest.raises(datasets.LabelError, match='example 0, .*_00000003.JPEG'):
    longer.source[0]


@pytest.mark.parametrize('content', ['', '{}', '[[1000]]', '[[0.5]]', '[3]'])
def test_other_files_are_no_label_sets(content, tmp_path):
  path = tmp_path / 'real.json'
  path.write_text(content)
  with pytest.raises(
    ValueError, match=r'real.json is not a JSON list of lists'
  ):
    labels.read_label_sets(path)


def test_classes_that_are_present_are_selected():
  dataset = datasets.load('fake', 'train[:50]')
  few = datasets.select_classes(dataset, 'present')
  before = [dataset.source[i]['label'] for i in range(50)]
  after = [few.source[i]['label'] for i in range(50)]
  assert [few.class_names[x] for x in after] == [str(x) for x in before]
  assert few.num_classes == len(set(before)) < 50
