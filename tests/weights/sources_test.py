"""What users call weights."""

import pathlib

import pytest

from nfnets_jax import weights
from nfnets_jax.weights import timm


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    (
      'dm_nfnet_f0',
      "timm's name of nfnet_f0; did you mean hf-hub:timm/dm_nfnet_f0.dm_in1k",
    ),
    (
      'timm/dm_nfnet_f3.dm_in1k',
      r'of nfnet_f3; did you mean hf-hub:timm/dm_nfnet_f3\.dm_in1k\?',
    ),
    ('tf_efficientnet_b0', "timm's name of efficientnet_b0"),
    ('nf_regnet_b1.ra2_in1k', "timm's name of nf_regnet_b1"),
    ('nfnet_f0', "name of a model; weights are .*'released' .*authors', of"),
    ('nf_resnet50', 'name of a model; weights are'),
    ('F0', "nfnet_f0 is called 'released', with that model"),
    ('F6_haiku.npz', "nfnet_f6 is called 'released'"),
    ('relased', "did you mean 'released'"),
    ('Released', "did you mean 'released'"),
    ('pretrained', "did you mean 'released'"),
    (
      'runs/digits',
      r'weights are a \.npz or \.safetensors file, the folder of',
    ),
    ('mine.safetensor', 'did you mean mine.safetensors'),
  ],
)
def test_names_that_are_no_file(tmp_path, monkeypatch, source, message):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('mine.safetensors').touch()
  with pytest.raises(FileNotFoundError, match=message) as error:
    weights.locate(source, option='init_from')
  assert str(error.value).startswith('init_from: there is no file or folder ')


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('', 'init_from is empty'),
    (' ', 'init_from is empty'),
    ('https://host/F0_haiku.npz', 'not a path; buckets are gs://'),
    ('gs://', 'not a path; buckets are gs://'),
    ('~nobody_of_that_name/x.npz', 'give a path without ~'),
  ],
)
def test_what_is_no_path(source, message):
  with pytest.raises(ValueError, match=message):
    weights.locate(source, option='init_from')


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'F0.npz').write_bytes(b'\x80\x04}.')
  assert weights.locate('~/F0.npz') == tmp_path / 'F0.npz'


def test_released(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  place = weights.locate('released', 'nfnet_f1')
  assert place == tmp_path / 'nfnets_jax/nfnet_f1.npz'
  assert not place.parent.exists()  # nothing is downloaded
  with pytest.raises(ValueError, match="no released weights of 'resnet50'"):
    weights.locate('released', 'resnet50')
  with pytest.raises(ValueError, match='need the name of a model'):
    weights.locate('released')


def test_counterparts():
  assert timm.counterpart('dm_nfnet_f6') == 'nfnet_f6'
  assert timm.counterpart('nf_resnet50') == 'nf_resnet50'
  assert timm.counterpart('resnet50') is None
  assert timm.counterpart('') is None
