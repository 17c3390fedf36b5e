"""Photographs in, names out; weights in and out of all forms."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import time

import haiku as hk
import jax
import jax.export
import numpy as np
import pytest
from PIL import ExifTags, Image

from nfnets_jax import convert, extras, models, predict, weights
from nfnets_jax.data import image_files, loader, transforms
from nfnets_jax.data.datasets import load
from nfnets_jax.training.normalize import normalize


@pytest.fixture(scope='module')
def tiny():
  """Weights whose classes differ enough to tell them apart."""
  found = predict.random_weights('nfnet_tiny', 10)
  found.params['NFNet/~/linear']['w'] = 30 * found.params['NFNet/~/linear']['w']
  return found


@pytest.fixture(scope='module')
def weight_file(tiny, tmp_path_factory):
  path = tmp_path_factory.mktemp('weights') / 'tiny.npz'
  weights.write(path, tiny)
  return path


@pytest.fixture(scope='module')
def photographs(shared, tmp_path_factory):
  """Ten photographs of ImageNet, in folders."""
  folder = tmp_path_factory.mktemp('photographs')
  path = shared / 'data' / 'imagenet-sample' / 'ILSVRC2012_img_val.tar'
  with tarfile.open(path) as tar:
    members = [x for x in tar if x.name.endswith('.JPEG')][:10]
    for i, member in enumerate(members):
      inside = folder / f'part{i % 2}'
      inside.mkdir(exist_ok=True)
      data = tar.extractfile(member).read()
      (inside / member.name.rpartition('/')[2]).write_bytes(data)
  return folder


@pytest.fixture
def drawing(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  path = tmp_path / 'drawing.png'
  Image.fromarray(pixels).save(path)
  return path


@pytest.mark.thorough
def test_probabilities_are_those_of_the_evaluation(photographs, tiny):
  """From the files on, through the loader of the evaluation."""
  found = {
    file.name: x
    for file, x, problem in predict.predict(
      predict.find_images([photographs]), tiny, batch_size=4
    )
    if not problem
  }
  assert len(found) == 10
  dataset = load('folder', 'validation[:100%]', _as_split(photographs))
  batches = loader.eval_batches(
    dataset,
    batch_size=4,
    transform=transforms.eval_transform(32, 'resize_crop_32'),
    num_workers=0,
  )
  net = hk.transform(lambda x: models.create('nfnet_tiny', 10)(x, False))
  logits = []
  for batch in batches:
    images = normalize(batch['image'])
    outputs = jax.jit(net.apply)(tiny.params, None, images)
    logits.append(outputs['logits'][batch['mask'] > 0])
  expected = jax.nn.softmax(np.concatenate(logits))
  names = [dataset.source[i]['file_name'] for i in range(10)]
  for name, x in zip(names, expected, strict=True):
    np.testing.assert_allclose(found[name.rpartition('/')[2]], x, atol=1e-5)


def _as_split(folder):
  root = folder.parent / 'split'
  if not root.exists():
    root.mkdir()
    for split in ('train', 'validation'):
      (root / split).symlink_to(folder)
  return root


@pytest.mark.thorough
def test_command_on_photographs(photographs, capsys):
  argv = ['--model=nfnet_tiny', '--weights=random', '--batch=4', '--json']
  predict.main([*argv, '--top=3', str(photographs)])
  lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
  assert len(lines) == 10
  names = predict.class_names(1000)
  for line in lines:
    assert str(photographs) in line['file']
    probabilities = [x['probability'] for x in line['top']]
    assert len(probabilities) == 3
    assert sorted(probabilities, reverse=True) == probabilities
    assert all(names[x['class']] == x['name'] for x in line['top'])


@pytest.mark.thorough
def test_command_prints_a_table(drawing, weight_file, tmp_path, capsys):
  classes = tmp_path / 'classes.txt'
  classes.write_text('\n'.join(f'digit {i}' for i in range(10)))
  argv = [f'--weights={weight_file}', f'--classes={classes}', str(drawing)]
  predict.main(argv)
  first, *lines = capsys.readouterr().out.splitlines()
  assert first == str(drawing)
  assert len(lines) == 5
  assert all(' %  digit ' in line for line in lines)
  predict.main([*argv, '--precision=bfloat16', '--image_size=48', '--top=99'])
  assert len(capsys.readouterr().out.splitlines()) == 11


def test_corrupt_photographs_are_reported_and_the_others_classified(
  drawing, weight_file, capsys
):
  broken = drawing.with_name('broken.png')
  broken.write_bytes(drawing.read_bytes()[:99])
  argv = [f'--weights={weight_file}', '--json', str(broken), str(drawing)]
  with pytest.raises(SystemExit, match='1 of 2 files could not be decoded'):
    predict.main(argv)
  lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
  assert lines[0]['error']
  assert not lines[0]['top']
  assert len(lines[1]['top']) == 5


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--weights=random', 'IMAGE'], 'random weights need a --model'),
    (['--weights=released', 'IMAGE'], 'released weights need a --model'),
    (['--weights=gone.npz', 'IMAGE'], 'gone.npz'),
    (['--weights=FILE', '--model=nfnet_f0', 'IMAGE'], 'holds nfnet_tiny, not'),
    (['--weights=FILE', 'gone.jpg'], 'there is no file or folder gone.jpg'),
    (['--weights=FILE', 'FOLDER'], 'there is no photograph in'),
    (
      ['--weights=FILE', '--classes=IMAGE.txt', 'IMAGE'],
      '1 names, and the net',
    ),
    (['--weights=FILE', '--crop=square', 'IMAGE'], "'square'"),
    (['--weights=EMPTY', 'IMAGE'], 'holds no run'),
    (['--weights=IMAGE', 'IMAGE'], 'this is an image'),
    (['--weights=dm_nfnet_f0', 'IMAGE'], "timm's name of nfnet_f0"),
    (['--weights=nfnet_f0', 'IMAGE'], 'that is the name of a model'),
    (['--weights=', 'IMAGE'], '--weights is empty'),
    (['--weights=https://runs/digits', 'IMAGE'], 'buckets are gs://'),
    (['--weights=FILE', ''], 'IMAGE is empty'),
    (['--weights=FILE', 's3://photographs'], 'IMAGE=s3://.*mount the bucket'),
    (['--weights=FILE', '--classes=gone.txt', 'IMAGE'], 'no file gone.txt'),
    (['--weights=FILE', '--classes=IMAGE', 'IMAGE'], 'is not text in UTF-8'),
    (['--weights=FILE', '--classes=', 'IMAGE'], 'classes is empty'),
    # Nothing of all this waits for the weights to be drawn.
    (['--weights=random', '--model=nfnet_f9', 'IMAGE'], "'nfnet_f9'"),
    (['--weights=FILE', '--features=x.txt', 'IMAGE'], 'must end in .npz'),
    (['--weights=FILE', '--features=FILE', 'IMAGE'], 'already exists'),
    (['--weights=FILE', '--crop=crop_rezise', 'IMAGE'], 'mean crop_resize'),
    (
      ['--weights=random', '--model=nfnet_f6', '--crop=resize_crop', 'IMAGE'],
      "'resize_crop'",
    ),
    (
      ['--weights=random', '--model=nfnet_f6', '--classes=gone.txt', 'IMAGE'],
      'no file gone.txt',
    ),
  ],
)
def test_bad_arguments(argv, message, drawing, weight_file, tmp_path):
  folder = tmp_path / 'folder'
  folder.mkdir()
  drawing.with_name('drawing.png.txt').write_text('one\n')
  names = {'IMAGE': drawing, 'FILE': weight_file, 'FOLDER': folder}
  names['EMPTY'] = folder
  for name, path in names.items():
    argv = [x.replace(name, str(path)) for x in argv]
  start = time.process_time()
  with pytest.raises(SystemExit, match=message):
    predict.main(argv)
  assert time.process_time() - start < 5


ANIMALS = ('cat', 'hot air', 'Eichhörnchen', *'0123456')


@pytest.fixture(scope='module')
def animal_file(tiny, tmp_path_factory):
  path = tmp_path_factory.mktemp('weights') / 'animals.npz'
  facts = {'image_size': 16, 'crop': 'resize', 'class_names': ANIMALS}
  weights.write(path, dataclasses.replace(tiny, **facts))
  return path


@pytest.mark.thorough
def test_size_crop_and_names_are_those_of_the_weights(
  animal_file, weight_file, drawing, tmp_path, capsys
):
  def run(*flags):
    predict.main([*flags, '--json', '--top=10', str(drawing)])
    found = capsys.readouterr()
    (line,) = found.out.splitlines()
    top = {x['class']: x for x in json.loads(line)['top']}
    probabilities = [top[k]['probability'] for k in range(10)]
    return probabilities, [top[k]['name'] for k in range(10)], found.err

  own, names, told = run(f'--weights={animal_file}')
  assert names == list(ANIMALS)
  assert told == 'nfnet_tiny, 10 classes; images of 16 px, crop resize\n'
  classes = tmp_path / 'classes.txt'
  # As an editor on Windows saves it.
  classes.write_bytes('\r\n'.join('ABCDEFGHIJ').encode('utf-8-sig'))
  flags = ['--image_size=16', '--crop=resize', f'--classes={classes}']
  same, names, _ = run(f'--weights={weight_file}', *flags)
  assert same == own
  assert names == list('ABCDEFGHIJ')
  _, names, _ = run(f'--weights={animal_file}', *flags)
  assert names == list('ABCDEFGHIJ')  # flags come first
  plain, names, told = run(f'--weights={weight_file}')
  assert plain != own
  assert names[0] == 'class 0'
  assert 'images of 32 px, crop resize_crop_32' in told
  other, _, _ = run(
    f'--weights={animal_file}', '--image_size=32', '--crop=resize_crop_32'
  )
  assert other == plain


@pytest.mark.parametrize(
  'data',
  [
    'tench\nKrähe\nline\u2028separator\n'.encode(),
    'tench\r\nKrähe\r\nline\u2028separator'.encode('utf-8-sig'),
    'tench\rKrähe\rline\u2028separator\r'.encode(),
    'tench\nKrähe \nline\u2028separator\n\n'.encode('utf-16'),
  ],
)
def test_lists_of_classes(tmp_path, data):
  path = tmp_path / 'classes.txt'
  path.write_bytes(data)
  names = ['tench', 'Krähe', 'line\u2028separator']
  assert predict.class_names(3, path) == names
  with pytest.raises(ValueError, match=r'txt has 3 names, .* 1000 classes'):
    predict.class_names(1000, path)


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'tench\n\ncrow\n', 'classes.txt:2 is empty'),
    (b'', 'has 0 names, and the network 3 classes'),
    ('Krähe\n'.encode('latin-1'), 'classes.txt is not text in UTF-8'),
  ],
)
def test_lists_that_are_none(tmp_path, data, message):
  path = tmp_path / 'classes.txt'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message):
    predict.class_names(3, path)


@pytest.mark.thorough
def test_names_that_are_no_text_are_printed(tiny, tmp_path, capsys):
  """Those of files, and on a terminal that has not all letters."""
  file = tmp_path / 'gr\udcfcn.png'
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / 'x.png')
  (tmp_path / 'x.png').rename(file)
  path = tmp_path / 'tiny.npz'
  weights.write(path, dataclasses.replace(tiny, class_names=ANIMALS))
  code = 'import sys; from nfnets_jax import predict; predict.main()'
  done = subprocess.run(
    [sys.executable, '-c', code, f'--weights={path}', '--top=10', file],
    env={
      'PYTHONPATH': str(pathlib.Path(__file__).parents[1]),
      'PYTHONIOENCODING': 'ascii:strict',
      'HOME': str(tmp_path),
    },
    capture_output=True,
    check=True,
  )
  assert re.search(rb'gr\\(udcfc|xfc)n\.png\n', done.stdout)
  assert b'%  Eichh\\xf6rnchen\n' in done.stdout


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['out.tflite'], 'must end in .npz, .safetensors, .stablehlo or .onnx'),
    (['folder'], 'must end in .*; --to=hub writes a folder'),
    (['folder', '--to=hub'], 'needs the license'),
    (['out.npz', '--license=mit'], '--license has no effect on a .npz'),
    ([''], 'DST is empty'),
    (['gs://bucket/out.npz'], 'DST=gs://.*mount the bucket'),
    (['out.npz', '--to=timm'], 'must end in .safetensors'),
    (['out.npz', '--batch=8'], '--batch has no effect on a .npz'),
    (['out.npz', '--image_size=8'], '--image_size has no effect on a .npz'),
    (['out.stablehlo', '--to=timm'], '--to has no effect on a .stablehlo'),
    (['out.stablehlo', '--batch=0'], '--batch must be at least 1, got 0'),
    (['out.stablehlo', '--image_size=-1'], '--image_size must be at least 1'),
  ],
)
def test_targets_are_checked_first(argv, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  start = time.process_time()
  with pytest.raises(SystemExit, match=message):
    convert.main(['random', *argv, '--model=nfnet_f6'])
  assert time.process_time() - start < 5
  assert not list(tmp_path.iterdir())


def test_sources_of_convert(tmp_path, drawing):
  target = str(tmp_path / 'out.npz')
  for source, message in (
    ('dm_nfnet_f0', "SRC: .*timm's name of nfnet_f0"),
    ('', 'SRC is empty'),
    (str(tmp_path), 'SRC: .* holds no run'),
    (str(drawing), 'this is an image'),
  ):
    with pytest.raises(SystemExit, match=message):
      convert.main([source, target])


@pytest.mark.thorough
def test_conversions_keep_size_crop_and_names(animal_file, tmp_path, capsys):
  target = tmp_path / 'timm.safetensors'
  convert.main([str(animal_file), str(target), '--to=timm'])
  found = weights.read(target)
  assert found.class_names == ANIMALS
  assert predict.evaluation_of(found) == (16, 'resize')
  assert 'does not hold' not in capsys.readouterr().out
  released = tmp_path / 'released.npz'
  convert.main([str(target), str(released), '--to=released'])
  assert 'images of 16 px, crop resize' in capsys.readouterr().out
  found = weights.read(released)
  assert found.class_names == ANIMALS
  assert predict.evaluation_of(found) == (16, 'resize')
  # Without the JSON file beside it, nothing is known.
  alone = tmp_path / 'F0_haiku.npz'
  alone.write_bytes(released.read_bytes())
  assert predict.evaluation_of(weights.read(alone)) == (32, 'resize_crop_32')


def test_onnx_names_its_extra(tmp_path, monkeypatch):
  monkeypatch.setattr(extras, '_is_installed', lambda package: False)
  with pytest.raises(SystemExit, match=r"'jax2onnx'.*nfnets_jax\[onnx\]"):
    convert.main(['random', str(tmp_path / 'out.onnx'), '--model=nfnet_f6'])


@pytest.mark.thorough
def test_model_card(animal_file, tmp_path):
  folder = tmp_path / 'mine'
  argv = [str(animal_file), str(folder), '--to=hub', '--license=cc0-1.0']
  convert.main(argv)
  names = {x.name for x in folder.iterdir()}
  assert names == {'README.md', 'config.json', 'model.safetensors'}
  assert weights.read(folder / 'model.safetensors').class_names == ANIMALS
  card = (folder / 'README.md').read_text()
  assert card.startswith(
    '---\nlicense: "cc0-1.0"\nlibrary_name: "nfnets_jax"\n'
  )
  with pytest.raises(SystemExit, match='mine is not empty'):
    convert.main(argv)


@pytest.mark.thorough
def test_program_takes_images_of_the_size_of_the_weights(
  animal_file, tmp_path, capsys
):
  for flags, px in (([], 16), (['--image_size=24'], 24)):
    target = tmp_path / f'{px}.stablehlo'
    convert.main([str(animal_file), str(target), '--batch=2', *flags])
    program = jax.export.deserialize(bytearray(target.read_bytes()))
    assert program.in_avals[0].shape == (2, px, px, 3)
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    out = capsys.readouterr().out
    assert f'images of {px} px, crop resize' in out
    facts = json.loads((tmp_path / f'{px}.stablehlo.json').read_bytes())
    assert facts['class_names'] == list(ANIMALS)
    assert facts['input']['shape'] == [2, px, px, 3]
  assert target.stat().st_mode & 0o777 == animal_file.stat().st_mode & 0o777
  with pytest.raises(SystemExit, match='an exported program, which cannot be'):
    convert.main([str(target), str(tmp_path / 'x.npz')])


@pytest.mark.thorough
def test_predicts_with_a_program(animal_file, drawing, tmp_path, capsys):
  target = tmp_path / 'animals.stablehlo'
  convert.main([str(animal_file), str(target), '--batch=2'])
  features = tmp_path / 'features.npz'
  capsys.readouterr()
  argv = ['--json', '--top=10', *3 * [str(drawing)]]
  predict.main([f'--weights={animal_file}', f'--features={features}', *argv])
  expected = capsys.readouterr()
  predict.main([f'--weights={target}', *argv])
  found = capsys.readouterr()
  assert found.err == expected.err
  for a, b in zip(
    found.out.splitlines(), expected.out.splitlines(), strict=True
  ):
    a, b = (
      {x['name']: x['probability'] for x in json.loads(line)['top']}
      for line in (a, b)
    )
    assert a.keys() == b.keys() == set(ANIMALS)
    assert a == pytest.approx(b, abs=1e-5)
  with np.load(features) as file:
    assert file['pool'].shape == (3, 512)
    assert file['pool'].any()
    assert list(file['file_name']) == 3 * [str(drawing)]
  for flag, message in (
    ('--image_size=32', 'takes images of 16 px, not 32'),
    ('--precision=float32', '--precision needs the weights'),
    ('--features=x.npz', '--features needs the weights'),
    ('--model=nfnet_f0', 'is of nfnet_tiny, not nfnet_f0'),
  ):
    with pytest.raises(SystemExit, match=message):
      predict.main([f'--weights={target}', flag, *argv])
  target.with_name('animals.stablehlo.json').unlink()
  with pytest.raises(SystemExit, match=r'there is no .*stablehlo\.json'):
    predict.main([f'--weights={target}', *argv])


@pytest.mark.thorough
def test_convert_there_and_back(weight_file, tiny, tmp_path, capsys):
  chain = [
    ('timm.safetensors', 'timm'),
    ('released.npz', 'released'),
    ('ours.safetensors', 'haiku'),
  ]
  source = weight_file
  for name, form in chain:
    target = tmp_path / name
    convert.main([str(source), str(target), f'--to={form}'])
    assert 'nfnet_tiny, 10 classes, ' in capsys.readouterr().out
    source = target
  back = weights.load(source, 'nfnet_tiny')
  for module, leaves in tiny.params.items():
    for leaf, x in leaves.items():
      np.testing.assert_array_equal(back[module][leaf], x)
  with pytest.raises(SystemExit, match='choose another name'):
    convert.main([str(weight_file), str(target)])
  with pytest.raises(SystemExit, match='must end in .safetensors'):
    convert.main([str(weight_file), str(tmp_path / 'x.npz'), '--to=timm'])
  with pytest.raises(SystemExit, match='choose another name'):
    target = tmp_path / 'x.stablehlo'
    target.touch()
    convert.main([str(weight_file), str(target)])


@pytest.mark.thorough
def test_exported_program_runs_without_haiku(weight_file, tiny, tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  expected = np.asarray(jax.jit(predict.create_forward(tiny))(images))
  target = tmp_path / 'tiny.stablehlo'
  convert.main([str(weight_file), str(target)])
  np.save(tmp_path / 'images.npy', images)
  code = (
    'import sys, jax.export, numpy as np\n'
    'program = jax.export.deserialize(open(sys.argv[1], "rb").read())\n'
    'images = np.load(sys.argv[2])\n'
    'np.save(sys.argv[3], program.call(images))\n'
    'program.call(images[:1])  # any number of images\n'
    'assert "haiku" not in sys.modules and "nfnets_jax" not in sys.modules'
  )
  out = tmp_path / 'logits.npy'
  argv = [sys.executable, '-c', code, target, tmp_path / 'images.npy', out]
  subprocess.run(argv, check=True, cwd=tmp_path)
  np.testing.assert_allclose(np.load(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_folded_forward_is_the_plain_one(tiny):
  images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
  net = hk.transform(lambda x: models.create('nfnet_tiny', 10)(x, False))
  plain = jax.jit(net.apply)(tiny.params, None, normalize(images))
  folded = jax.jit(predict.create_forward(tiny))(images)
  np.testing.assert_allclose(folded, plain['logits'], rtol=1e-5, atol=1e-5)
  half = jax.jit(predict.create_forward(tiny, 'bfloat16'))(images)
  assert half.dtype == np.float32
  np.testing.assert_allclose(half, folded, atol=0.05 * np.abs(folded).max())
  with pytest.raises(ValueError, match="precision 'float16'"):
    predict.create_forward(tiny, 'float16')


@pytest.mark.slow
def test_statistics_are_used():
  found = predict.random_weights('resnet50', 3)
  assert found.state
  images = np.zeros((1, 32, 32, 3), np.uint8)
  assert jax.jit(predict.create_forward(found))(images).shape == (1, 3)


def test_images_that_pillow_reads(tiny, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).convert('RGBA').save(buffer, 'PNG')
  file = tmp_path / 'grey.png'
  file.write_bytes(buffer.getvalue())
  ((_, found, problem),) = predict.predict([file], tiny, batch_size=1)
  assert not problem
  assert found.sum() == pytest.approx(1)


def test_folders_are_walked_as_by_the_data_set(drawing, tmp_path, caplog):
  root = tmp_path / 'pictures'
  inside = root / 'train' / 'cat'
  inside.mkdir(parents=True)
  for name in b'1.jpg', b'2.JPEG', b'caf\xe9.tif', b'.hidden.jpg', b'x.txt':
    (inside / os.fsdecode(name)).write_bytes(drawing.read_bytes())
  (inside / 'gone.jpg').symlink_to('nowhere')
  (inside / 'linked.jpg').symlink_to('1.jpg')
  found = predict.find_images([root])
  (record,) = caplog.records
  for text in 'hidden', 'broken links', 'x.txt':
    assert text in record.getMessage()
  source = load('folder', 'train', root).source
  names = [source[i]['file_name'] for i in range(len(source))]
  assert sorted(names) == [
    image_files.printable(file.relative_to(root)) for file in found
  ]
  assert len(names) == 4


def test_home_and_missing_files(drawing, monkeypatch):
  monkeypatch.setenv('HOME', str(drawing.parent))
  assert predict.find_images(['~/drawing.png']) == [drawing]
  with pytest.raises(FileNotFoundError, match=r'did you mean drawing.png\?'):
    predict.find_images([drawing, '~/drawin.png'])


@pytest.mark.thorough
def test_bad_files_end_nothing(drawing, weight_file, tmp_path, capsys):
  root = tmp_path / 'pictures'
  root.mkdir()
  upright = drawing.read_bytes()
  (root / os.fsdecode(b'caf\xe9.png')).write_bytes(upright)
  (root / 'deep.tif').write_bytes(b'')
  Image.new('F', (8, 8), 0.5).save(root / 'float.tif')
  Image.new('1', (8193, 8192)).save(root / 'large.png')
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 3
  Image.open(drawing).rotate(180).save(root / 'turned.png', exif=exif)
  argv = [f'--weights={weight_file}', '--batch=2', str(root)]
  with pytest.raises(SystemExit, match='3 of 5 files'):
    predict.main([*argv, '--json'])
  lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
  assert [pathlib.Path(x['file']).name for x in lines] == [
    'caf\\xe9.png',
    'deep.tif',
    'float.tif',
    'large.png',
    'turned.png',
  ]
  for line, problem in zip(
    lines[1:4], ['identify', 'mode F', 'limit'], strict=True
  ):
    assert problem in line['error']
  for mine, other in zip(lines[0]['top'], lines[4]['top'], strict=True):
    assert mine['class'] == other['class']
    assert mine['probability'] == pytest.approx(other['probability'])
  with pytest.raises(SystemExit, match='3 of 5 files'):
    predict.main(argv)
  assert 'caf\\xe9.png\n' in capsys.readouterr().out


def test_a_file_without_memory_ends_nothing(drawing, tiny, monkeypatch):
  limit = drawing.with_name('endless.png')
  limit.write_bytes(drawing.read_bytes())
  read = pathlib.Path.read_bytes

  def read_bytes(path):
    if path == limit:
      raise MemoryError
    return read(path)

  monkeypatch.setattr(pathlib.Path, 'read_bytes', read_bytes)
  found = list(predict.predict([limit, drawing], tiny, batch_size=1))
  assert found[0][1:] == (None, 'MemoryError')
  assert found[1][1].sum() == pytest.approx(1)
