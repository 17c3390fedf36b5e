import importlib.metadata

from experiments.gpu import machine


def test_versions_of_packages_from_wheels(output, tmp_path):
  folder = tmp_path / 'site' / 'dm_haiku-9.8.7.dist-info'
  folder.mkdir(parents=True)
  (folder / 'METADATA').write_text('Name: dm-haiku\nVersion: 9.8.7\n')
  found = machine.versions(folder.parent)
  assert found['dm-haiku'] == '9.8.7'
  assert found['jax'] == importlib.metadata.version('jax')
