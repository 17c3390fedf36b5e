r"""Any run of a claim at the paper's scale, by the name that the sweep lists.

Command:
  make reproduce-batch-size SCALE=paper ARGS=--list
  python -m nfnets_jax.main --workdir=DIR \
    --config=experiments/reproduce/run_config.py:paper/resnet/net=BN,batch=256,seed=0
"""

import copy

from ml_collections import config_dict

from experiments import arguments
from experiments.reproduce import claim, cost
from experiments.reproduce.claims import CLAIMS


def get_config(
  name: str = 'paper/resnet/net=BN,batch=256,seed=0',
) -> config_dict.ConfigDict:
  """Returns the config of a run, such as 'paper/resnet/net=BN,...'."""
  runs: dict[str, claim.Run] = {}
  for each in CLAIMS:
    runs |= {run.name: run for run in cost.planned(each)}
    if name in runs:
      break
  arguments.check('run', name, runs)
  # Not copy_and_resolve_references, after which fields that are None have no
  # type and cannot be overridden.
  return copy.deepcopy(runs[name].config)
