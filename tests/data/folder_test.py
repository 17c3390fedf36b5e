"""Plain folders of images are read, and their gaps are named."""

import pathlib
import sys

import pytest

from nfnets_jax.data import datasets


@pytest.fixture
def images(tmp_path):
  """A folder with two classes, 20 images each, and a split `val`."""
  for name in 'dog', 'cat':
    for i in range(20):
      write(tmp_path, f'train/{name}/{i}.jpg')
    write(tmp_path, f'val/{name}/a.png')
  return tmp_path


def write(folder, path):
  path = folder / path
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(str(path.relative_to(folder)).encode())


def names(dataset):
  return [dataset.source[i]['file_name'] for i in range(len(dataset))]


def test_examples_are_the_files(images):
  dataset = datasets.load('folder', 'train', images)
  assert (dataset.name, dataset.split) == ('folder', 'train')
  assert dataset.class_names == ('cat', 'dog')
  expected = {f'train/{c}/{i}.jpg' for c in ('cat', 'dog') for i in range(20)}
  assert len(dataset) == 40 and set(names(dataset)) == expected
  for i in range(40):
    example = dataset.source[i]
    assert example['image'].decode() == example['file_name']
    assert example['label'] == ('/dog/' in example['file_name'])


def test_labels_are_those_of_train(images):
  (images / 'val' / 'cat' / 'a.png').unlink()
  (images / 'val' / 'cat').rmdir()
  dataset = datasets.load('folder', 'val', images)
  assert dataset.class_names == ('cat', 'dog')
  assert [dataset.source[0][x] for x in ('label', 'file_name')] == [
    1,
    'val/dog/a.png',
  ]


def test_slices_cover_a_split_and_mix_the_classes(images):
  whole, head, tail, both = (
    names(datasets.load('folder', split, images))
    for split in ('train', 'train[:40%]', 'train[16:]', 'val+train')
  )
  assert head + tail == whole
  assert both[2:] == whole
  assert 4 <= sum('cat' in name for name in head) <= 12


def test_order_stays_when_an_image_is_added(images):
  before = names(datasets.load('folder', 'train', images))
  write(images, 'train/cat/another.jpg')
  after = names(datasets.load('folder', 'train', images))
  assert [name for name in after if 'another' not in name] == before
  # As it is everywhere and always, or slices would differ between machines.
  assert before[:2] == ['train/dog/12.jpg', 'train/dog/0.jpg']


def test_suffixes_of_any_case_and_other_files(images, caplog):
  suffixes = ['jpg', 'JPG', 'jpeg', 'JPEG', 'png', 'Webp', 'bmp']
  others = ['.hidden.jpg', 'notes.txt', 'x.gif', 'deeper/1.jpg', '.git/1.jpg']
  for suffix in suffixes:
    write(images, f'test/cat/1.{suffix}')
  for other in others:
    write(images, f'test/cat/{other}')
  write(images, 'test/.cache/1.jpg')
  write(images, 'test/README.md')
  found = names(datasets.load('folder', 'test', images))
  (record,) = caplog.records
  assert record.levelname == 'WARNING'
  assert record.getMessage() == (
    f'{images}/test: passed over 2 files that are not named as images '
    '(.jpg, .jpeg, .png, .webp, .bmp): test/cat/notes.txt, test/cat/x.gif'
  )
  assert sorted(found) == sorted(f'test/cat/1.{suffix}' for suffix in suffixes)


def test_other_files_are_counted_split_by_split(images, caplog):
  for i in range(1200):
    write(images, f'train/{("cat", "dog")[i % 2]}/{i}.tif')
  assert len(datasets.load('folder', 'train[:5]+val+train[5:]', images)) == 42
  (record,) = caplog.records
  assert f'{images}/train: passed over 1,200 files' in record.getMessage()
  assert 'train/cat/0.tif, ' in record.getMessage()
  assert ' and 1,195 more' in record.getMessage()


def test_links_are_followed(images):
  (images / 'elsewhere').symlink_to(images / 'val')
  assert len(datasets.load('folder', 'elsewhere', images)) == 2


def test_a_million_images_are_small(images):
  source = datasets.load('folder', 'train', images).source
  state = [*vars(source).values(), *source._paths]
  assert sum(map(sys.getsizeof, state)) / 40 < 200
  assert not any(isinstance(x, pathlib.Path) for x in source._paths)


def refused(folder, error, split='train'):
  with pytest.raises(error) as info:
    datasets.load('folder', split, folder)
  return str(info.value)


def test_missing_folders_are_named(images, tmp_path):
  with pytest.raises(ValueError, match="'folder' needs data_dir"):
    datasets.load('folder', 'train')
  message = refused(images / 'nowhere', FileNotFoundError)
  assert f'no folder {images}/nowhere' in message
  message = refused(images, FileNotFoundError, 'train[:5]+test')
  assert f"no folder 'test' in {images}, which holds train/, val/" in message
  # A folder of classes instead of one of splits.
  message = refused(images / 'train', FileNotFoundError)
  assert 'which holds cat/, dog/; images lie in <split>/<class>/' in message
  empty = tmp_path / 'empty'
  empty.mkdir()
  assert 'which holds nothing' in refused(empty, FileNotFoundError)


def test_empty_folders_are_named(images):
  (images / 'test').mkdir()
  message = refused(images, ValueError, 'test')
  assert f'no folder in {images}/test, which holds nothing' in message
  (images / 'train' / 'emu').mkdir()
  assert f'in {images}/train/emu, which holds nothing' in refused(
    images, ValueError
  )
  for name in 'abcdefg':
    write(images, f'train/emu/{name}.gif')
  message = refused(images, ValueError)
  assert 'no images (.jpg, .jpeg, .png, .webp, .bmp) in' in message
  assert 'which holds a.gif, b.gif, c.gif, d.gif, e.gif and 2 more' in message


def test_classes_that_train_lacks_are_named(images):
  write(images, 'val/Cat/1.jpg')
  message = refused(images, ValueError, 'val')
  assert f'{images}/val/Cat is no class of {images}/train' in message
  assert 'which has cat, dog' in message


@pytest.mark.parametrize('split', ['train[', 'train[:0]', 'train[50:]'])
def test_bad_split_is_named(split, images):
  assert f'cannot read split {split!r} of folder' in refused(
    images, ValueError, split
  )


@pytest.mark.parametrize('split', ['', 'train+', '+train', 'train++val'])
def test_split_without_a_name_is_refused(split, images):
  expected = (
    f'cannot read split {split!r} of folder {images}: the name of a split is '
    'missing'
  )
  assert refused(images, ValueError, split) == expected


def test_removed_image_is_named(images):
  dataset = datasets.load('folder', 'val[:1]', images)
  name = names(dataset)[0]
  (images / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    dataset.source[0]
