"""The claims of the paper: one file each, the record of that experiment."""

from collections.abc import Mapping

from experiments.reproduce import claim, small_scale
from experiments.reproduce.claims import (
  ablation,
  batch_size,
  clip_layers,
  clip_methods,
  clipping,
  microbatch,
  regularisation,
  transfer,
)

# All but `latency`, which trains nothing.
CLAIMS: Mapping[str, claim.Claim] = {
  module.CLAIM.name: small_scale.at_small(module.CLAIM)
  for module in (
    batch_size,
    clipping,
    clip_methods,
    clip_layers,
    ablation,
    transfer,
    regularisation,
    microbatch,
  )
}
