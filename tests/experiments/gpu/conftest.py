"""Folders of a run of `experiments.gpu`."""

import pytest


@pytest.fixture
def output(tmp_path, monkeypatch):
  for name in ('GPU_DRY_RUN', 'GPU_PACK', 'GPU_DATA_DIR', 'GPU_DATA_NAME'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('GPU_OUTPUT', str(tmp_path / 'out'))
  monkeypatch.setenv('GPU_SCRATCH', str(tmp_path / 'scratch'))
  (tmp_path / 'out').mkdir()
  (tmp_path / 'scratch').mkdir()
  return tmp_path / 'out'
