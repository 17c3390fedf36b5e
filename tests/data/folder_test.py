"""Plain folders of images are read, and their gaps are named."""

import contextlib
import os
import pathlib
import sys
import tempfile

import numpy as np
import pytest
from PIL import ExifTags, Image

from nfnets_jax.data import (
  datasets,
  folder,
  image_files,
  loader,
  reader,
  transforms,
)


@pytest.fixture
def images(tmp_path):
  """A folder with two classes, 20 images each, and a split `val`."""
  for name in 'dog', 'cat':
    for i in range(20):
      write(tmp_path, f'train/{name}/{i}.jpg')
    write(tmp_path, f'val/{name}/a.png')
  return tmp_path


def write(root, path):
  path = root / path
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(str(path.relative_to(root)).encode())


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
  suffixes += ['jfif', 'tif', 'TIFF', 'Gif']
  others = ['.hidden.jpg', 'notes.txt', 'x.heic', 'deeper/1.jpg', '.git/1.jpg']
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
    f'{images}/test: skipped hidden files or folders, 3: test/.cache, '
    'test/cat/.git, test/cat/.hidden.jpg; files without an image suffix '
    '(.jpg, .jpeg, .jfif, .png, .webp, .bmp, .gif, .tif, .tiff), 3: '
    'test/README.md, test/cat/notes.txt, test/cat/x.heic; folders inside the '
    'folder of a class, 1: test/cat/deeper'
  )
  assert sorted(found) == sorted(f'test/cat/1.{suffix}' for suffix in suffixes)


def test_other_files_are_counted_split_by_split(images, caplog):
  for i in range(1200):
    write(images, f'train/{("cat", "dog")[i % 2]}/{i}.xml')
  assert len(datasets.load('folder', 'train[:5]+val+train[5:]', images)) == 42
  (record,) = caplog.records
  assert f'{images}/train: skipped files without' in record.getMessage()
  assert ', 1,200: train/cat/0.xml, ' in record.getMessage()
  assert ' and 1,195 more' in record.getMessage()


def test_links_are_followed(images):
  (images / 'elsewhere').symlink_to(images / 'val')
  assert len(datasets.load('folder', 'elsewhere', images)) == 2


def test_a_million_images_are_small(images):
  source = datasets.load('folder', 'train', images).source
  state = [*vars(source).values(), *source._paths]
  assert sum(map(sys.getsizeof, state)) / 40 < 200
  assert not any(isinstance(x, pathlib.Path) for x in source._paths)


def refused(root, error, split='train'):
  with pytest.raises(error) as info:
    datasets.load('folder', split, root)
  return str(info.value)


def test_missing_folders_are_named(images, tmp_path):
  with pytest.raises(ValueError, match="'folder' needs data_dir"):
    datasets.load('folder', 'train')
  message = refused(images / 'nowhere', FileNotFoundError)
  assert f'no folder {images}/nowhere' in message
  message = refused(images, FileNotFoundError, 'train[:5]+test')
  assert f"no folder 'test' in {images}, which holds train/, val/" in message
  assert message.endswith('images lie in <split>/<class>/')
  message = refused(images / 'train', FileNotFoundError, 'val')
  assert 'holds cat/, dog/; these are classes, and their images the' in message
  empty = tmp_path / 'empty'
  empty.mkdir()
  assert 'which holds nothing' in refused(empty, FileNotFoundError)


def test_what_macos_adds_to_an_archive_is_hidden(images, tmp_path):
  write(images, '__MACOSX/train/._1.jpg')
  assert folder.find_test_split(images) == 'val'
  write(tmp_path / 'flat', 'cat/1.jpg')
  write(tmp_path / 'flat', '__MACOSX/cat/._1.jpg')
  assert datasets.load('folder', 'train', tmp_path / 'flat').class_names == (
    'cat',
  )


def test_layouts_that_are_almost_right_are_explained(tmp_path):
  write(tmp_path / 'deep', 'cat/2020/1.jpg')
  message = refused(tmp_path / 'deep', FileNotFoundError)
  assert message.endswith('<split>/<class>/ or <class>/, no deeper')
  write(tmp_path / 'upper', 'Train/cat/1.jpg')
  assert refused(tmp_path / 'upper', FileNotFoundError).endswith(
    "rename 'Train' to 'train'"
  )
  # As ext4 and as macOS name it.
  write(tmp_path / 'accents', 'train/\u00e9mu/1.jpg')
  write(tmp_path / 'accents', 'val/e\u0301mu/1.jpg')
  message = refused(tmp_path / 'accents', ValueError, 'val')
  assert '; its \u00e9mu differs in the Unicode form of the accents' in message


def test_empty_folders_are_named(images):
  (images / 'test').mkdir()
  message = refused(images, ValueError, 'test')
  assert f'no folder in {images}/test, which holds nothing' in message
  (images / 'train' / 'emu').mkdir()
  assert f'in {images}/train/emu, which holds nothing' in refused(
    images, ValueError
  )
  for name in 'abcdefg':
    write(images, f'train/emu/{name}.xml')
  message = refused(images, ValueError)
  assert 'no images (.jpg, .jpeg, .jfif, .png, .webp, .bmp, ' in message
  assert 'which holds a.xml, b.xml, c.xml, d.xml, e.xml and 2 more' in message


def test_classes_that_train_lacks_are_named(images):
  write(images, 'val/Cat/1.jpg')
  message = refused(images, ValueError, 'val')
  assert f'{images}/val/Cat is not a class of {images}/train' in message
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


def load(root, split, test_split=None):
  return datasets.load('folder', split, root, test_split)


@pytest.mark.parametrize('prefix', ['', 'train/'])
def test_a_test_split_is_held_out(prefix, tmp_path):
  for name in 'cat', 'dog', 'emu':
    for i in range(40):
      write(tmp_path, f'{prefix}{name}/{i}.jpg')
  parts = [load(tmp_path, x, 'test') for x in ('train', 'test', 'all')]
  train, test, everything = (set(names(part)) for part in parts)
  assert train.isdisjoint(test) and train | test == everything
  assert len(everything) == 120 and len(test) == 17
  assert {part.class_names for part in parts} == {('cat', 'dog', 'emu')}
  for part in parts:
    assert part.note == (
      f"{tmp_path} holds training images only: 'test' is 17 of the 120, held "
      'out by a hash of their names'
    )
  # Any name will do; nothing is held out unless the test split is missing.
  assert set(names(load(tmp_path, 'val[:50%]+val[50%:]', 'val'))) == test
  for test_split in None, 'train', 'all', 'train[:10%]':
    whole = load(tmp_path, 'train', test_split)
    assert set(names(whole)) == everything and not whole.note
  with pytest.raises(FileNotFoundError, match="no folder 'test' in"):
    load(tmp_path, 'test')
  assert len(train) == 103 and folder.find_test_split(tmp_path) is None

  # Images stay in their split when others are added.
  for i in range(40, 80):
    write(tmp_path, f'{prefix}cat/{i}.jpg')
  assert train < set(names(load(tmp_path, 'train', 'test')))
  assert test < set(names(load(tmp_path, 'test', 'test')))


def test_a_small_folder_has_both_splits(tmp_path):
  write(tmp_path, 'cat/1.jpg')
  write(tmp_path, 'dog/1.jpg')
  with pytest.raises(ValueError, match='single image.*set data.test_split='):
    load(tmp_path, 'train', 'test')
  for i in range(2, 9):
    write(tmp_path, f'dog/{i}.jpg')
    test = load(tmp_path, 'test', 'test')
    train = load(tmp_path, 'train', 'test')
    assert len(test) >= 1 and len(train) + len(test) == i + 1
    assert {train.source[j]['label'] for j in range(len(train))} == {0, 1}


def test_a_folder_without_training_images_is_evaluated(tmp_path):
  write(tmp_path, 'val/cat/1.jpg')
  write(tmp_path, 'val/dog/1.jpg')
  write(tmp_path, 'sketch/emu/1.jpg')
  val = load(tmp_path, 'val', 'val')
  assert val.class_names == ('cat', 'dog', 'emu') and not val.note
  assert set(names(val)) == {'val/cat/1.jpg', 'val/dog/1.jpg'}
  assert len(load(tmp_path, 'all')) == 3
  assert folder.find_test_split(tmp_path) == 'val'


def test_nothing_is_held_out_beside_another_split(images):
  assert len(load(images, 'train', 'test')) == 40
  with pytest.raises(FileNotFoundError, match='which holds train/, val/'):
    load(images, 'test', 'test')
  assert len(load(images, 'all', 'test')) == 42
  assert folder.find_test_split(images) == 'val'


ODDITIES = {
  'hidden files or folders': ['.DS_Store', '.cat.jpg'],
  'broken links': ['circle.jpg', 'gone.jpg'],
  'pipes, sockets or devices': ['pipe.jpg'],
}


@pytest.fixture
def oddities(tmp_path):
  """A split with one image that can be read among what cannot."""
  cats = tmp_path / 'train' / 'cat'
  cats.mkdir(parents=True)
  (cats / 'a.jpg').write_bytes(b'a')
  (cats / 'b.JPG').symlink_to('a.jpg')
  for name in ODDITIES['hidden files or folders']:
    (cats / name).touch()
  (cats / 'gone.jpg').symlink_to('nowhere')
  (cats / 'circle.jpg').symlink_to('circle.jpg')
  os.mkfifo(cats / 'pipe.jpg')
  return tmp_path


def test_photographs_are_rotated_as_exif_says(tmp_path):
  pixels = np.zeros((16, 32, 3), np.uint8)
  pixels[:, :16] = 255  # left half, which the camera held at the top
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  (tmp_path / 'cat').mkdir()
  for i in range(2):
    Image.fromarray(pixels).save(tmp_path / f'cat/{i}.jpg', exif=exif)
  train = loader.train_batches(
    load(tmp_path, 'train', 'test'),
    batch_size=1,
    transform=transforms.train_transform(32, crop='none', flip=False),
    seed=0,
    num_workers=0,
  )
  test = loader.eval_batches(
    datasets.keep_in_memory(load(tmp_path, 'test', 'test')),
    batch_size=1,
    transform=transforms.eval_transform(32, 'resize'),
    num_workers=0,
  )
  for batches in train, test:
    (image,) = next(batches)['image']
    assert image[:14].min() > 200 and image[18:].max() < 50
    batches.close()


def test_oddities_are_named_and_end_nothing(oddities, caplog):
  dataset = datasets.load('folder', 'train', oddities)
  assert set(names(dataset)) == {'train/cat/a.jpg', 'train/cat/b.JPG'}
  assert all(dataset.source[i]['image'] == b'a' for i in range(2))
  (record,) = caplog.records
  for reason, found in ODDITIES.items():
    listed = ', '.join(f'train/cat/{name}' for name in found)
    assert f'{reason}, {len(found)}: {listed}' in record.getMessage()


def test_walk_finds_the_same_in_folders_of_folders(oddities):
  (oddities / 'train' / 'back').symlink_to('..')
  (oddities / 'train' / 'again').symlink_to('cat')
  skipped = {}
  assert image_files.walk(oddities, skipped) == [
    'train/again/a.jpg',
    'train/again/b.JPG',
    'train/cat/a.jpg',
    'train/cat/b.JPG',
  ]
  assert skipped.pop('links to a folder that contains them') == ['train/back/']
  assert {reason: len(x) for reason, x in skipped.items()} == {
    reason: 2 * len(x) for reason, x in ODDITIES.items()
  }


def test_images_beside_the_classes_are_named(images, caplog):
  write(images, 'val/1.jpg')
  assert len(datasets.load('folder', 'val', images)) == 2
  (record,) = caplog.records
  assert 'images outside the folders of the classes, 1: val/1.jpg' in (
    record.getMessage()
  )


@contextlib.contextmanager
def without_privileges():
  """Becomes a user whom permissions hold for, if root runs the tests."""
  if os.geteuid():
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def test_folders_that_cannot_be_read_are_named():
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    root.chmod(0o755)
    for inside in 'a', 'b', 'c':
      write(root, f'{inside}/1.jpg')
    (root / 'b').chmod(0)
    skipped = {}
    try:
      with without_privileges():
        assert image_files.walk(root, skipped) == ['a/1.jpg', 'c/1.jpg']
        with pytest.raises(PermissionError):
          image_files.walk(root / 'b', {})
    finally:
      (root / 'b').chmod(0o755)
  assert skipped == {'folders that cannot be read': ['b/']}


def test_order_is_that_of_the_names(tmp_path):
  for path in 'b/1.jpg', 'a.jpg', 'a/2.jpg', 'a/10.jpg', 'B/1.jpg', 'a-b/1.jpg':
    write(tmp_path, path)
  assert image_files.walk(tmp_path, {}) == [
    'B/1.jpg',
    'a/10.jpg',
    'a/2.jpg',
    'a-b/1.jpg',
    'a.jpg',
    'b/1.jpg',
  ]


@pytest.mark.parametrize(
  ('raw', 'text'),
  [
    (b'caf\xe9', 'caf\\xe9'),
    (b'a\nb', 'a\\nb'),
    (b'\x1b[31m', '\\x1b[31m'),
    ('chat né à 中'.encode(), 'chat né à 中'),
  ],
)
def test_names_of_any_bytes(raw, text, tmp_path, caplog, capsys):
  for split in 'train', 'val':
    inside = tmp_path / split / os.fsdecode(raw)
    inside.mkdir(parents=True)
    (inside / os.fsdecode(raw + b'.jpg')).write_bytes(raw)
    (inside / os.fsdecode(raw + b'.txt')).touch()
  dataset = datasets.load('folder', 'val[:100%]', tmp_path)
  assert dataset.class_names == (text,)
  example = dataset.source[0]
  assert example['image'] == raw
  assert example['file_name'] == f'val/{text}/{text}.jpg'
  (record,) = caplog.records
  assert f'1: val/{text}/{text}.txt' in record.getMessage()
  for line in record.getMessage(), *dataset.class_names:
    line.encode()
  with pytest.raises(reader.CorruptExampleError) as caught:
    reader.read_example(dataset, 0, transforms.eval_transform(8))
  str(caught.value).encode()


@pytest.mark.parametrize(
  'name', ['a[0:10]', 'lr=[0.1]', 'a*b?', '{a,b}', 'a\\b', 'a@3', 'a:b', 'a\nb']
)
def test_folders_of_any_name(name, images, tmp_path_factory):
  root = tmp_path_factory.mktemp('any') / name
  images.rename(root)
  dataset = datasets.load('folder', 'train[:25%]+val', root)
  assert len(dataset) == 12
  assert dataset.source[11]['image']


@pytest.mark.parametrize(
  'name', ['my test', 'val.2', 'prüf', 'a,b', '(x)', '10%']
)
def test_splits_of_any_name(name, images):
  (images / 'val').rename(images / name)
  assert len(datasets.load('folder', name, images)) == 2
  whole = names(datasets.load('folder', f'train + {name}', images))
  parts = names(datasets.load('folder', f'{name}[1:]+{name}[:50%]', images))
  assert parts == whole[:-3:-1]
  message = refused(images, ValueError, f'{name}[7:]')
  assert 'cannot read split' in message and 'split1' not in message


@pytest.mark.parametrize('split', ['..', '.', 'train/cat', '../x', '.git'])
def test_splits_that_are_no_folders_inside(split, images):
  write(images, '.git/cat/1.jpg')
  assert 'no folder' in refused(images, FileNotFoundError, split)


def test_home_of_a_folder(images, monkeypatch):
  monkeypatch.setenv('HOME', str(images.parent))
  assert len(datasets.load('folder', 'val', f'~/{images.name}')) == 2
