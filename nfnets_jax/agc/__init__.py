"""Adaptive gradient clipping (AGC) as an optax gradient transformation.

Depends on jax and optax only:

  optimizer = optax.chain(
      nfnets_jax.agc.adaptive_grad_clip(0.01), optax.sgd(0.1, 0.9))

docs/agc.md is the guide, with recipes for Haiku, Flax and Equinox.

Reference:
  Brock et al. 2021, section 4.1.
"""

from nfnets_jax.agc.clip import adaptive_grad_clip as adaptive_grad_clip
from nfnets_jax.agc.paths import is_head as is_head
from nfnets_jax.agc.state import AGCState as AGCState
from nfnets_jax.agc.state import Statistics as Statistics
from nfnets_jax.agc.tuning import Row as Row
from nfnets_jax.agc.tuning import Summary as Summary
from nfnets_jax.agc.tuning import suggest_clipping as suggest_clipping
from nfnets_jax.agc.tuning import summarize as summarize
from nfnets_jax.agc.units import unitwise_norm as unitwise_norm
