"""Part 3: the paper's main effect, the claim `batch-size` at SCALE=gpu.

  python -m experiments.gpu.effect NUMBER

makes one of `RUNS`, the runs of that claim with one seed, most important first.
λ is that chosen on held-out images at SCALE=small for an eighth of the batch.
"""

import argparse
from typing import Any

from experiments.gpu import common, data
from experiments.reproduce import claim, runner, scales
from nfnets_jax.runtime import interrupt, logbook

# Net, batch and λ.
RUNS: tuple[tuple[str, int, float | None], ...] = (
  ('BN', 256, None),
  ('NF + AGC', 4096, 0.01),
  ('NF', 4096, None),
  ('BN', 4096, None),
  ('NF + AGC', 256, 0.16),
  ('NF', 256, None),
  ('NF + AGC', 1024, 0.16),
  ('BN', 1024, None),
  ('NF', 1024, None),
)


def create_run(number: int) -> claim.Run:
  """Returns a run of `RUNS`; in a dry run, of a tiny net on few images."""
  net, batch, clipping = RUNS[number]
  changes = {} if clipping is None else {'optimizer.clipping': clipping}
  run = scales.resnet_run(net, 'gpu', batch, 0, changes)
  if not common.dry_run():
    return run
  run.config.model.depth = (1, 1, 1)
  run.config.model.width = (16, 16, 16)
  run.config.model.stem_width = 16
  run.config.batch_size = batch // 64
  run.config.eval_batch_size = 32
  run.config.data.train_split = 'train[:128]'
  run.config.data.test_split = 'test[:64]'
  run.config.data.image_size = run.config.data.eval_image_size = 16
  run.config.epochs = 1.0
  run.config.optimizer.warmup_epochs = 0.0
  return claim.Run(run.name, run.labels, run.config, held_out='train[-64:]')


def main(argv: list[str] | None = None) -> None:
  """Makes a run and records it, even if it is stopped."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.effect',
    description='Makes a run of the main effect.',
  )
  parser.add_argument('number', type=int, choices=range(len(RUNS)))
  number = parser.parse_args(argv).number
  runner.start()
  folder = common.scratch() / 'batch-size'
  folder.mkdir(parents=True, exist_ok=True)
  # Nine runs share sixteen cores; threads share the decoded images.
  fields: dict[str, Any] = {'num_workers': 2, 'worker_type': 'threads'}
  if common.dry_run():
    fields = {'num_workers': 0}
  runs = runner.Runner(folder, data.fields() | fields)
  run = create_run(number)
  try:
    result = runs.make(run)
  except interrupt.StoppedError as error:
    (workdir,) = (folder / 'runs').glob(f'{run.name},*')
    lines = logbook.read(workdir)
    result = {
      'name': run.name,
      'labels': dict(run.labels),
      'status': 'unfinished',
      'message': str(error),
      'top_1': None,
      'last': lines[-1] if lines else None,
    }
  common.add(3, 'run', epochs=run.config.epochs, **result)
  if result['status'] in ('refused', 'unfinished'):
    raise SystemExit(f'{run.name}: {result["message"]}')


if __name__ == '__main__':
  main()
