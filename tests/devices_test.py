import types

import jax
import pytest

from nfnets_jax import devices
from tests import commands


@pytest.fixture
def choose(monkeypatch):
  """Sets $JAX_PLATFORMS as jax would have read it."""
  before = devices._chosen()
  jax.devices()  # so that the backend of the other tests stays

  def set_to(text):
    monkeypatch.setenv('JAX_PLATFORMS', text)
    jax.config.update('jax_platforms', text)

  yield set_to
  jax.config.update('jax_platforms', before)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('cuda', r"=cuda, .* no 'cuda' .* only cpu; .* 'jax\[cuda13\]'; or unset"),
    ('tpu', r"=tpu, .* no 'tpu' .* only cpu; .* pip install 'jax\[tpu\]'; or"),
    (
      'nonsense',
      "=nonsense, .* no 'nonsense' .* only cpu; unset JAX_PLATFORMS",
    ),
    # jax itself would go on without a word.
    ('cpu,cuda', "=cpu,cuda, but jax finds no 'cuda' device here, only cpu"),
  ],
)
def test_platforms_that_are_missing(choose, text, message):
  choose(text)
  with pytest.raises(ValueError, match=f'JAX_PLATFORMS{message}'):
    devices.start()
  assert devices._chosen() == text


@pytest.mark.parametrize('text', ['cpu', '', ' '])
def test_platforms_that_are_there(choose, text):
  choose(text)
  devices.start()


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('module', 'arguments'),
  [
    ('nfnets_jax.main', '--config=experiments/digits.py --workdir=DIR'),
    ('nfnets_jax.predict', '--model=nfnet_tiny --weights=random DIR'),
    ('experiments.reproduce.sweep', '--output=DIR'),
  ],
)
def test_commands_name_the_variable(tmp_path, module, arguments):
  """From the start, where jax gives a bare assertion or a traceback."""
  words = arguments.replace('DIR', str(tmp_path / 'new')).split()
  done = commands.run(module, *words, timeout=100, JAX_PLATFORMS='nonsense')
  assert done.returncode == 1
  assert 'error: JAX_PLATFORMS=nonsense, but jax finds no' in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'new').exists()


def _device(stats):
  return types.SimpleNamespace(
    platform='gpu', device_kind='Abacus', memory_stats=lambda: stats
  )


def test_accelerator_says_how_much_memory_it_has():
  assert devices.memory(_device({'bytes_limit': 7 * 2**30})) == 7 * 2**30


@pytest.mark.parametrize('stats', [None, {}])
def test_accelerator_that_does_not_say(stats):
  with pytest.raises(ValueError, match='Abacus .* set config.micro_batches'):
    devices.memory(_device(stats))
  assert devices.known_memory(_device(stats)) is None


def test_devices_of_a_host_share_its_memory():
  assert jax.local_device_count() == 8
  assert devices.memory() == devices._host_memory() // 8
  assert devices.memory() > 2**24


@pytest.mark.parametrize(
  ('files', 'expected'),
  [
    ({}, None),
    ({'memory.max': 'max\n'}, None),
    ({'memory.max': '1000000\n'}, 10**6),
    ({'memory/memory.limit_in_bytes': '2000000\n'}, 2 * 10**6),
    # No limit, as the first version writes it.
    ({'memory/memory.limit_in_bytes': '9223372036854771712\n'}, None),
  ],
)
def test_control_group_limits_the_host(tmp_path, files, expected):
  machine = devices._host_memory(tmp_path / 'missing')
  for name, text in files.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  assert devices._host_memory(tmp_path) == (expected or machine)
