import pytest

from experiments.gpu import pack


def test_the_pack_has_a_tested_version_of_each_package():
  tested = pack.versions()
  assert {*pack._PACKAGES, *pack._SOURCES} <= tested.keys()
  # They differ between versions of Python, and the machine has its own.
  assert not {'jax', 'numpy', 'scipy'} & tested.keys()


def test_missing_packages_are_named_with_the_remedy(output, monkeypatch):
  assert pack.install() is None  # nothing is missing here
  monkeypatch.setattr(pack, '_SOURCES', ('promise', 'no-such-package'))
  monkeypatch.setenv('GPU_PACK', str(output))
  with pytest.raises(SystemExit, match='lacks no-such-package, .*gpu-pack'):
    pack.install()
