import pytest

from experiments.benchmarks import estimates


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('none', 'is no JSON of nfnets_jax.compile --json'),
    ('[]', 'is no JSON of nfnets_jax.compile --json'),
    ('{"reason": "too large"}', 'has no training step: too large'),
    (
      '{"topology": "local", "training": {"seconds": null}}',
      'has no time for local; compile for a TPU or GPU',
    ),
  ],
)
def test_files_without_an_estimate(tmp_path, content, message):
  file = tmp_path / 'x.json'
  file.write_text(content)
  with pytest.raises(ValueError, match=message):
    estimates.read(str(file))
