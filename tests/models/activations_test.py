import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.models import activations, checks


@pytest.mark.parametrize('name', checks.ACTIVATIONS)
def test_gain_gives_unit_variance_by_monte_carlo(name):
  z = np.random.default_rng(0).standard_normal(1_000_000, np.float32)
  variance = np.var(jax.jit(activations.scaled(name))(z))
  # Two thousandths for the published rounding, the rest is sampling.
  assert variance == pytest.approx(1.0, abs=0.012)


@pytest.mark.parametrize('name', checks.ACTIVATIONS)
def test_gain_is_the_published_estimate_of_the_integral(name):
  z = np.linspace(-12, 12, 200_001, dtype=np.float32)
  weight = np.exp(-(z.astype(np.float64) ** 2) / 2)
  weight /= weight.sum()
  function = jax.jit(getattr(activations, name))
  y = np.asarray(function(z), np.float64)
  variance = weight @ y**2 - (weight @ y) ** 2
  assert activations.gain(name) == pytest.approx(variance**-0.5, rel=1e-3)


def test_derivations_hold():
  """The closed forms of the docstrings, evaluated."""
  pi = np.pi
  relu = np.sqrt(2 / (1 - 1 / pi))
  gelu = (1 / 3 + 1 / (2 * pi * np.sqrt(3)) - 1 / (4 * pi)) ** -0.5
  leaky = ((1 + 1e-4) / 2 - 0.99**2 / (2 * pi)) ** -0.5
  assert relu == pytest.approx(1.71286, abs=1e-5)
  assert gelu == pytest.approx(1.70093, abs=1e-5)
  assert leaky == pytest.approx(1.70483, abs=1e-5)
  assert activations.gain('relu') == pytest.approx(relu, rel=1e-3)
  assert activations.gain('gelu') == pytest.approx(gelu, rel=1e-3)
  assert activations.gain('leaky_relu') == pytest.approx(leaky, rel=1e-3)


def test_log_sigmoid_and_soft_sign_are_their_formulas():
  x = np.linspace(-9, 9, 101, dtype=np.float32)
  formulas = {
    'log_sigmoid': -np.log1p(np.exp(-x)),
    'soft_sign': x / (1 + np.abs(x)),
  }
  for name, expected in formulas.items():
    y = activations.unscaled(name)(jnp.asarray(x))
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize('name', checks.ACTIVATIONS)
def test_every_nonlinearity_is_a_function_of_one_element(name):
  x = np.random.default_rng(0).standard_normal((2, 3, 8), np.float32)
  function = jax.jit(activations.scaled(name))
  y = function(x)
  one_by_one = [function(v) for v in x.ravel()]
  np.testing.assert_allclose(
    y, np.reshape(one_by_one, x.shape), rtol=1e-5, atol=1e-6
  )


def test_gelu_is_the_tanh_form():
  x = np.linspace(-4, 4, 101, dtype=np.float32)
  inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
  np.testing.assert_allclose(
    activations.gelu(jnp.asarray(x)), 0.5 * x * (1 + np.tanh(inner)), atol=1e-6
  )


def test_keeps_dtype():
  x = jnp.ones((3,), jnp.bfloat16)
  assert activations.scaled('silu')(x).dtype == jnp.bfloat16


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match=r"'swish'; choose one of .*gelu.*silu"):
    activations.scaled('swish')


@pytest.mark.parametrize(
  ('name', 'near'),
  [('Gelu', 'gelu'), ('softsign', 'soft_sign'), ('leaky-relu', 'leaky_relu')],
)
def test_unknown_name_comes_with_the_nearest(name, near):
  with pytest.raises(ValueError, match=f"{name!r}; did you mean '{near}'?"):
    activations.gain(name)


@pytest.mark.parametrize(
  ('dtype', 'rtol'), [('float32', 0.0), ('bfloat16', 2.0**-8)]
)
def test_gelu_and_its_gradient_equal_those_of_jax(dtype, rtol):
  x = np.linspace(-12.0, 12.0, 2001).astype(dtype)
  dy = np.cos(3 * x)
  got = _with_gradient(activations.gelu)(x, dy)
  expected = _with_gradient(jax.nn.gelu)(np.float32(x), np.float32(dy))
  for a, b in zip(got, expected, strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(a, b, atol=5e-6, rtol=rtol)


def _with_gradient(function):
  @jax.jit
  def both(x, dy):
    y, pull_back = jax.vjp(function, x)
    return y, *pull_back(dy)

  return both


def test_gelu_keeps_its_input_alone():
  _, vjp = jax.vjp(activations.gelu, jnp.ones((4, 8)))
  assert [x.shape for x in jax.tree.leaves(vjp)] == [(4, 8)]


def test_gelu_of_all_platforms():
  x = np.linspace(-6.0, 6.0, 101, dtype=np.float32)
  dy = np.cos(x)
  exact, exact_gradient = _with_gradient(jax.nn.gelu)(x, dy)
  for function in (activations.gelu, activations._wide_gelu):
    np.testing.assert_allclose(jax.jit(function)(x), exact, atol=2e-6)
  for gradient in (activations._gelu_gradient, activations._wide_gelu_gradient):
    np.testing.assert_allclose(
      jax.jit(gradient)(x, dy), exact_gradient, atol=2e-6
    )
