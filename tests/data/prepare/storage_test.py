"""The disk is asked before, and what is left on it is told."""

import pytest

from nfnets_jax.data.prepare import storage


def test_space_is_checked_on_the_disk_of_a_new_folder(tmp_path):
  folder = tmp_path / 'a' / 'b'
  storage.check_space(folder, 1)
  assert not folder.parent.exists()
  with pytest.raises(OSError, match=r'not enough space in .*/a/b: 1,000.* GB'):
    storage.check_space(folder, 10**15)


def test_leftovers_are_named_with_their_sizes(tmp_path):
  target = tmp_path / 'my digits' / '1.0.0'
  assert storage.leftovers(target) == []
  for name in 'incomplete.ABC123_1.0.0', 'incomplete.ABC123_2.0.0', '1.0.0':
    folder = target.with_name(name)
    folder.mkdir(parents=True)
    with (folder / 'bucket.tmp').open('wb') as file:
      file.truncate(1_500_000_000)
  (line,) = storage.leftovers(target)
  path = target.with_name('incomplete.ABC123_1.0.0')
  assert line.startswith(f'{path} (1.5 GB) ')
  assert line.endswith(f": rm -r '{path}'")
  assert storage.leftovers(target, keep=path) == []
