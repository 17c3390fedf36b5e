from experiments.gpu import common, report


def _step(model, form, seconds, batch=32, largest=False, **values):
  return {
    'part': 2, 'what': 'step', 'model': model, 'form': form, 'batch': batch,
    'seconds': seconds, 'rounds': [seconds], 'memory': 2**30, 'tflops': 330.0,
    'images_per_second': batch / seconds, 'largest': largest, **values,
  }  # fmt: skip


def _timm(model, seconds, **values):
  return {
    **_step(model, 'ours', seconds), 'what': 'timm', 'status': 'measured',
    'mode': 'eager', 'layout': 'last', **values,
  }  # fmt: skip


def _run(net, batch, top_1, message=None):
  return {
    'part': 3, 'what': 'run', 'labels': {'net': net, 'batch': batch},
    'top_1': top_1, 'message': message, 'epochs': 15.0,
  }  # fmt: skip


RESULTS = [
  {'part': 2, 'what': 'peak', 'tflops': 800.0},
  _step('nfnet_f0', 'ours', 0.007),
  _step('nfnet_f0', 'released', 0.008),
  _timm('nfnet_f0', 0.020),
  _timm('nfnet_f0', 0.010, mode='compiled'),
  # More images a step, and faster by image; not what the ratio is of.
  _timm('nfnet_f0', 0.2, batch=1024, largest=True, images_per_second=5120),
  _step('nfnet_f1', 'ours', 0.010),
  _step('efficientnet_b7', 'ours', 0.086),
  _run('BN', 256, 0.91),
  _run('NF + AGC', 4096, 0.902),
  _run('NF', 4096, None, 'loss is nan at step 3'),
]


def test_goals_are_of_the_fastest_of_timm_at_the_same_batch():
  lines = report.goals(RESULTS)
  assert 'F0 step ÷ the fastest of timm, at most 0.8: 0.700: met.' in lines[0]
  assert 'F0, at least 40 % of the measured peak: 41.2%: met' in lines[1]
  assert 'timm, at most 0.8: not measured' in lines[2]
  assert 'as fast as EfficientNet-B7: 8.60: not met' in lines[4]
  assert 'within a point of BN at 256: 0.80 points below: met' in lines[5]
  assert lines[6] == '* 96 % on CIFAR-10: not measured.'


def test_a_report_of_what_there_is(output):
  report.write(output)
  assert 'not measured' in (output / 'report.md').read_text()
  for line in RESULTS:
    common.add(**line)
  common.add(2, 'kernels', model='nfnet_f0', count=2682.0, seconds=0.0119)
  common.add(4, 'failed', job='record', message='stopped after 9 s, its limit')
  common.add(1, 'failed', job='right f0', message='no such convolution')
  common.add(1, 'loss', job='right f0', value=0.0)
  report.write(output)
  page = (output / 'report.md').read_text()
  assert '| NF + AGC |  | 90.20% |' in page
  assert '| NF |  | loss is nan at step 3 |' in page
  assert 'nfnet_f0: 2682 kernels a step, 11.90 ms in all' in page
  assert 'part 4, record: stopped after 9 s, its limit' in page
  assert 'no such convolution' not in page  # the same job gave a result later
  row = next(x for x in page.splitlines() if 'timm, eager' in x)
  assert '20.00 (20.00 to 20.00) | 1600 | 41.2% | 1.00 | 0.350 |' in row
