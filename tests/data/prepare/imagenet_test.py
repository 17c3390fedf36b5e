"""Archives of ImageNet that TFDS would misread are refused by name."""

import dataclasses
import io
import os
import tarfile

import pytest

from nfnets_jax.data.prepare import __main__ as command
from nfnets_jax.data.prepare import imagenet

SYNSETS = ['n01440764', 'n01443537', 'n02084071']
TRAIN, VALIDATION = (archive.name for archive in imagenet.ARCHIVES.values())


def tar(members):
  """Returns an archive of `{name: contents}`, without its padding."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as archive:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
    end = archive.offset
  return buffer.getvalue()[: end + 1024]


def images(synset, count=3):
  return [(f'{synset}_{i}.JPEG', bytes([i + 1]) * 700) for i in range(count)]


def train(*members):
  return tar([(f'{x}.tar', tar(images(x))) for x in SYNSETS[:2]] + [*members])


def validation(*numbers):
  return tar(
    (f'ILSVRC2012_val_{number:08d}.JPEG', b'image' * number)
    for number in numbers
  )


@pytest.fixture
def archives(tmp_path):
  """A folder with a small sample of ImageNet."""
  (tmp_path / TRAIN).write_bytes(train())
  (tmp_path / VALIDATION).write_bytes(validation(2, 1, 3))
  return tmp_path


@pytest.fixture
def official(archives, monkeypatch):
  """The same folder, its files taken for the whole ImageNet."""
  (archives / TRAIN).write_bytes(
    train((f'{SYNSETS[2]}.tar', tar(images(SYNSETS[2]))))
  )
  for split, archive in imagenet.ARCHIVES.items():
    size = (archives / archive.name).stat().st_size
    count = {'train': archive.num_images, 'validation': 3}[split]
    whole = dataclasses.replace(archive, num_bytes=size, num_images=count)
    monkeypatch.setitem(imagenet.ARCHIVES, split, whole)
  return archives


def refused(folder, error=ValueError):
  with pytest.raises(error) as info:
    imagenet.check(folder, SYNSETS)
  message = str(info.value)
  assert 'https://image-net.org/download-images' in message
  return message


def test_a_sample_is_counted(archives):
  counts = imagenet.check(archives, SYNSETS)
  assert counts == {'train': 6, 'validation': 3}
  assert imagenet.num_bytes(archives) == sum(
    path.stat().st_size for path in archives.iterdir()
  )


def test_official_sizes_fill_whole_records_of_tar():
  for archive in imagenet.ARCHIVES.values():
    assert archive.num_bytes % 10240 == 0
    assert len(bytes.fromhex(archive.md5)) == 16


def test_archive_of_official_size_is_not_counted(official):
  counts = imagenet.check(official, SYNSETS)
  assert counts == {'train': 1_281_167, 'validation': 3}
  data = bytearray((official / TRAIN).read_bytes())
  data[512:600] = b'x' * 88  # where the first archive begins
  (official / TRAIN).write_bytes(data)
  assert 'n01440764.tar in it: it is not a tar archive' in refused(official)


def test_archive_of_official_size_holds_everything(official):
  data = train()
  size = (official / TRAIN).stat().st_size
  (official / TRAIN).write_bytes(data + bytes(size - len(data)))
  message = refused(official)
  assert 'the size of the whole ImageNet, and holds 2 of the 3' in message


def test_last_class_of_official_size_is_counted(archives, monkeypatch):
  content = [('1.JPEG', b'x' * 700), ('2.JPEG', b'x' * (2 << 20))]
  data = train((f'{SYNSETS[2]}.tar', tar(content)))
  official = dataclasses.replace(
    imagenet.ARCHIVES['train'], num_bytes=len(data)
  )
  monkeypatch.setitem(imagenet.ARCHIVES, 'train', official)
  (archives / TRAIN).write_bytes(data)
  assert imagenet.check(archives, SYNSETS)['train'] == 1_281_167
  stop = data.rindex(b'2.JPEG')
  (archives / TRAIN).write_bytes(data[:stop] + bytes(len(data) - stop))
  assert 'tar in it: 2,098,176 bytes follow its end' in refused(archives)


def test_validation_of_official_size_holds_everything(official):
  data = validation(1, 2)
  size = (official / VALIDATION).stat().st_size
  (official / VALIDATION).write_bytes(data + bytes(size - len(data)))
  assert 'the size of all 3 images, and holds 2' in refused(official)


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_room_made_for_a_download_is_no_archive(archives, split):
  archive = imagenet.ARCHIVES[split]
  path = archives / archive.name
  whole = path.read_bytes()
  for stop in 0, 512, len(whole) // 2, len(whole):
    path.write_bytes(whole[:stop])
    os.truncate(path, archive.num_bytes)  # sparse: it takes no space
    message = refused(archives)
    assert f'{path} ({archive.num_bytes:,} bytes): ' in message
    is_cut_amid_a_header = 'it is corrupt after' in message
    assert is_cut_amid_a_header or 'truncated' in message
  after = archive.num_bytes - len(whole) + 512
  assert f'{after:,} bytes follow its end, as in a truncated' in message


def test_hole_in_the_archive_of_a_class_is_found(archives):
  first, second = (f'{SYNSETS[2]}_{i}.JPEG' for i in range(2))
  inner = bytearray(tar([(first, b'x' * 700), (second, b'x' * (2 << 20))]))
  start = inner.index(second.encode())
  inner[start : start + 512] = bytes(512)
  (archives / TRAIN).write_bytes(train((f'{SYNSETS[2]}.tar', bytes(inner))))
  assert f'{SYNSETS[2]}.tar in it: 2,09' in refused(archives)


@pytest.mark.parametrize('name', [TRAIN, VALIDATION])
def test_padding_of_tar_is_no_damage(archives, name):
  size = (archives / name).stat().st_size
  for record in 10_240, 1 << 20:
    os.truncate(archives / name, -(-size // record) * record)
    assert imagenet.check(archives, SYNSETS)['train'] == 6


def test_missing_files_are_named(archives):
  with pytest.raises(FileNotFoundError, match=r'no folder .*/nowhere'):
    imagenet.check(archives / 'nowhere', SYNSETS)
  (archives / TRAIN).unlink()
  message = refused(archives, FileNotFoundError)
  assert f'no {TRAIN} in {archives}' in message
  assert '147,897,477,120 bytes' in message
  assert '1d675b47d978889d74fa0da5fadfb00e' in message
  assert VALIDATION not in message
  (archives / VALIDATION).unlink()
  message = refused(archives, FileNotFoundError)
  assert f'no {TRAIN} and no {VALIDATION} in' in message
  assert '6,744,924,160 bytes' in message
  assert '29b22e2961454d5413ddabcf34fc5622' in message


@pytest.mark.parametrize('name', [TRAIN, VALIDATION])
def test_every_truncation_is_found(archives, name):
  path = archives / name
  whole = path.read_bytes()
  # One block of zeros is end enough, and so all members are there.
  for size in {*range(0, len(whole) - 512, 128), len(whole) - 513}:
    path.write_bytes(whole[:size])
    message = refused(archives)
    assert f'{path} ({size:,} bytes): it is ' in message
    assert 'truncated' in message or size < 512, message
  path.write_bytes(whole[:-512])
  imagenet.check(archives, SYNSETS)


def test_truncated_archive_of_a_class_is_named(archives):
  inner = tar(images(SYNSETS[2]))
  for size in range(512, len(inner) - 512, 512):
    (archives / TRAIN).write_bytes(
      train((f'{SYNSETS[2]}.tar', inner[:size]), ('n0', b''))[: -512 - 1024]
      + bytes(1024)
    )
    assert f'{SYNSETS[2]}.tar in it: it is truncated' in refused(archives)


@pytest.mark.parametrize('name', [TRAIN, VALIDATION])
@pytest.mark.parametrize(
  'content', [b'', b'<!DOCTYPE html><p>Sign in' * 99, b'\x1f\x8b' * 512]
)
def test_other_files_are_refused(archives, name, content):
  (archives / name).write_bytes(content)
  message = refused(archives)
  assert (
    f'{archives / name} ({len(content):,} bytes): it is not a tar' in message
  )
  assert repr(content[:20]) in message


@pytest.mark.parametrize('name', [TRAIN, VALIDATION])
def test_corrupt_header_is_found(archives, name):
  data = bytearray((archives / name).read_bytes())
  second = data.rindex(b'ILSVRC' if name == VALIDATION else b'n01443537.tar')
  data[second : second + 20] = b'?' * 20
  (archives / name).write_bytes(data)
  assert 'it is corrupt after' in refused(archives)


@pytest.mark.parametrize('name', [TRAIN, VALIDATION])
def test_empty_archive_is_refused(archives, name):
  (archives / name).write_bytes(tar([]))
  assert f'{archives / name} (1,024 bytes): it is an empty' in refused(archives)


@pytest.mark.parametrize(
  ('member', 'reason'),
  [
    (('n09999999.tar', tar(images('n09999999'))), 'none of the 3 classes'),
    (('n01440764.tar', tar(images('n01440764'))), 'n01440764.tar twice'),
    (('n02084071.JPEG', b'x'), 'it holds n02084071.JPEG, where archives'),
    (('n02084071.tar', b'x' * 9000), 'n02084071.tar in it: it is not a tar'),
    (('n02084071.tar', b''), 'n02084071.tar in it: it is'),
    (('n02084071.tar', tar([])), 'n02084071.tar in it: it is an empty'),
    (
      ('n02084071.tar', tar(images('n02084071', 1) * 2)),
      'two images of the same name',
    ),
  ],
)
def test_wrong_members_of_train_are_named(archives, member, reason):
  (archives / TRAIN).write_bytes(train(member))
  message = refused(archives)
  assert f'{archives / TRAIN} (' in message and reason in message


@pytest.mark.parametrize(
  ('numbers', 'reason'),
  [
    ((2, 3), 'image 1 of 2 should be ILSVRC2012_val_00000001.JPEG and is'),
    ((1, 2, 4), 'image 3 of 3 should be ILSVRC2012_val_00000003.JPEG and is'),
    ((1, 1, 2), 'image 2 of 3 should be ILSVRC2012_val_00000002.JPEG and is'),
  ],
)
def test_validation_images_that_would_get_wrong_labels(
  archives, numbers, reason
):
  (archives / VALIDATION).write_bytes(validation(*numbers))
  assert reason in refused(archives)


def test_wrong_members_of_validation_are_named(archives):
  (archives / VALIDATION).write_bytes(tar([('val/1.JPEG', b'x')]))
  assert 'it holds val/1.JPEG, where images' in refused(archives)
  few = dataclasses.replace(imagenet.ARCHIVES['validation'], num_images=2)
  (archives / VALIDATION).write_bytes(validation(1, 2, 3))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(imagenet.ARCHIVES, 'validation', few)
    assert 'it holds 3 images, and there are 2 labels' in refused(archives)


def test_command_checks_before_it_builds(archives, tmp_path):
  def run(*options):
    with pytest.raises(SystemExit) as info:
      command.main(['imagenet2012', f'--data_dir={tmp_path}/data', *options])
    return str(info.value)

  for options in (), ('--imagenet_dir=',):
    assert 'give --imagenet_dir' in run(*options) and TRAIN in run(*options)
  path = archives / VALIDATION
  path.write_bytes(path.read_bytes()[:600])
  message = run(f'--imagenet_dir={archives}')
  assert message.startswith(f'error: {path} (600 bytes): it is truncated')
  assert not (tmp_path / 'data').exists()


def test_command_refuses_archives_for_other_data_sets(archives, tmp_path):
  with pytest.raises(SystemExit, match='--imagenet_dir is for imagenet2012'):
    command.main(
      ['digits', f'--data_dir={tmp_path}', f'--imagenet_dir={archives}']
    )
