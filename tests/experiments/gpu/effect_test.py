from experiments.gpu import effect
from experiments.reproduce import claim, claims


def test_part_3_makes_runs_of_the_claim(output):
  known = {
    run.name: claim.fingerprint(run, {})
    for run in claims.CLAIMS['batch-size'].runs('gpu', {})
  }
  for number, (net, batch, _) in enumerate(effect.RUNS):
    run = effect.create_run(number)
    assert known[run.name] == claim.fingerprint(run, {})
    assert (run.labels['net'], run.config.batch_size) == (net, batch)
  assert len(set(effect.RUNS)) == 3 * 3
