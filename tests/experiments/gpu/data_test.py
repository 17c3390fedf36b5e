import pytest

from experiments.gpu import data


def test_without_data_the_remedy_is_named(output, monkeypatch):
  monkeypatch.setenv('GPU_DATA_NAME', 'cifar10')
  with pytest.raises(FileNotFoundError, match='cifar10 in .*make gpu-pack'):
    data.fields()
