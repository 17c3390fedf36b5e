"""Normaliser-Free ResNets (NFNets) in JAX, with adaptive gradient clipping.

There is one subpackage per concern; none is imported by default:

* `nfnets_jax.agc`: adaptive gradient clipping, for any JAX project;
* `nfnets_jax.models`: the networks, as Haiku modules;
* `nfnets_jax.data`: data sets and the input pipeline, with MixUp, CutMix and
  RandAugment, all on the host;
* `nfnets_jax.training`: the recipe and the training loop;
* `nfnets_jax.runtime`: devices, processes and files of a run;
* `nfnets_jax.weights`: reads and writes published weights.

Reference:
  Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition
  Without Normalization", 2021, https://arxiv.org/abs/2102.06171
"""

__version__ = '0.1.0'
