"""Settings are checked before any layer is built."""

import pytest

from nfnets_jax import models


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('nf_resnet50', {'padding': 'valid'}, "padding is 'valid'; choose one of "),
    ('nf_regnet_b0', {'padding': None}, "is None; choose one of 'same', 'symm"),
    ('nfnet_f0', {'activation': 'swish'}, "'swish'; choose .* 'gelu', .* 'sil"),
    ('nf_resnet50', {'activation': 'Relu'}, "'Relu'; did you mean 'relu'. cho"),
    ('nf_regnet_b0', {'activation': None}, 'is None; choose one of .celu'),
    (
      'nfnet_f0',
      {'use_two_convs': 'no'},
      "use_two_convs is 'no'; choose .* Tr",
    ),
    ('resnet50', {'use_se': 'False'}, "use_se is 'False'; choose one of True"),
    ('fixup_resnet50', {'stem_pool': None}, 'stem_pool is None; choose one of'),
  ],
)
def test_invalid_settings_name_the_choices(name, change, message):
  with pytest.raises(ValueError, match=message):
    models.feature_info(name, **change)
