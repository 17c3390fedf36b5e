"""Paths as users write them."""

import os
import pathlib

import pytest

from nfnets_jax import paths


def test_expands_the_home_directory(monkeypatch):
  monkeypatch.setenv('HOME', '/somewhere')
  assert paths.expand('~/a') == pathlib.Path('/somewhere/a')
  assert paths.expand('a/~') == pathlib.Path('a/~')
  assert paths.expand_literal('~/a') == pathlib.Path('/somewhere/a')


def test_the_current_folder():
  assert paths.expand('.') == paths.expand('./') == pathlib.Path()


def test_a_broken_link_is_called_so(tmp_path):
  (tmp_path / 'a').symlink_to('nowhere')
  with pytest.raises(FileNotFoundError, match='a is a broken link, to nowhere'):
    paths.existing(tmp_path / 'a')


def test_an_empty_home_counts_as_unset(monkeypatch):
  monkeypatch.delenv('HOME')
  unset = paths.expand('~/a')
  monkeypatch.setenv('HOME', '')
  assert paths.expand('~/a') == unset != pathlib.Path('/a')


def test_an_account_without_a_home_is_an_error(monkeypatch):
  monkeypatch.delenv('HOME')
  monkeypatch.setattr(os, 'getuid', lambda: 2**31 - 7)  # of no account
  with pytest.raises(ValueError, match=r'data_dir=~/a: the home.*HOME'):
    paths.expand('~/a', 'data_dir')


def test_an_unknown_home_is_an_error_that_names_the_option(monkeypatch):
  with pytest.raises(ValueError, match=r'--workdir=~nobody-here/a.*HOME'):
    paths.expand('~nobody-here/a', '--workdir')


@pytest.mark.parametrize(
  'path', ['', ' ', 'a\0b', 'http://a/b', 's3:/a', 'gs://']
)
def test_what_is_no_path_is_refused(path):
  with pytest.raises(ValueError, match='--workdir'):
    paths.expand(path, '--workdir')


@pytest.mark.parametrize('path', ['gs://bucket/a', 's3://bucket/a', 's3:/a'])
def test_what_is_read_by_local_libraries_is_no_bucket(path):
  with pytest.raises(ValueError, match=f'DST={path} is not a path on this'):
    paths.local(path, 'DST')


def test_paths_in_buckets():
  pytest.importorskip('gcsfs', reason="needs the extra 'buckets'")
  path = paths.expand_literal('gs://bucket/runs/lr=0.1', '--workdir')
  assert str(path / 'a.json') == 'gs://bucket/runs/lr=0.1/a.json'
  assert paths.in_bucket(path) and not paths.in_bucket('runs')
  assert paths.absolute(path) == path
  assert paths.absolute(paths.expand('/runs') / path) == path
  with pytest.raises(ValueError, match=r"--workdir=gs://b/\* has '\*'"):
    paths.expand_literal('gs://b/*', '--workdir')


@pytest.mark.parametrize(
  'name', ['lr=[0.1]', 'a\\b', '**', 'a?', 'a\nb', 'a\x7f', 'a\udcff', ']']
)
def test_patterns_are_refused_where_a_library_reads_them(name):
  with pytest.raises(ValueError, match='(?s)--workdir=.*pattern'):
    paths.expand_literal(f'runs/{name}/x', '--workdir')
  assert paths.expand(f'runs/{name}/x').parts[1:] == (name, 'x')


@pytest.mark.parametrize('name', ['lr=0.1', 'a b', 'é', '{a,b}', '%20', '#'])
def test_other_characters_pass(name):
  assert paths.expand_literal(name) == pathlib.Path(name)


def test_a_pattern_in_the_current_folder_is_found(tmp_path, monkeypatch):
  folder = tmp_path / 'x[1]'
  folder.mkdir()
  monkeypatch.chdir(folder)
  with pytest.raises(ValueError, match=r'runs \(.*x\[1\]/runs\) has'):
    paths.expand_literal('runs')


def test_existing(tmp_path):
  (tmp_path / 'weights.npz').touch()
  assert paths.existing(tmp_path / 'weights.npz').name == 'weights.npz'
  with pytest.raises(FileNotFoundError, match='did you mean weights.npz'):
    paths.existing(tmp_path / 'weight.npz', 'init_from', 'file')
  with pytest.raises(FileNotFoundError, match='there is no folder .*x either'):
    paths.existing(tmp_path / 'x' / 'y')
  with pytest.raises(NotADirectoryError, match='not a folder'):
    paths.existing(tmp_path / 'weights.npz', 'data_dir', 'folder')
  with pytest.raises(IsADirectoryError, match='a folder, not a file'):
    paths.existing(tmp_path, 'init_from', 'file')


def test_an_empty_variable_counts_as_unset(monkeypatch):
  monkeypatch.setenv('SOME_DIR', ' ')
  assert paths.from_environment('SOME_DIR', '/a') == pathlib.Path('/a')
  monkeypatch.setenv('SOME_DIR', '/b')
  assert paths.from_environment('SOME_DIR', '/a') == pathlib.Path('/b')


@pytest.mark.parametrize(
  'data',
  [
    b'a\nb\n',
    b'\xef\xbb\xbfa\r\nb\r\n\r\n',
    b'a\rb',
    'a\nb\n'.encode('utf-16'),
  ],
)
def test_lists_of_other_systems(tmp_path, data):
  path = tmp_path / 'names.txt'
  path.write_bytes(data)
  assert paths.read_text_lines(path) == ['a', 'b']


def test_only_line_ends_separate_lines(tmp_path):
  path = tmp_path / 'names.txt'
  path.write_text('a\u2028b\nc\x0bd\n')
  assert paths.read_text_lines(path) == ['a\u2028b', 'c\x0bd']


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-32'])
def test_lists_with_null_characters_are_refused(tmp_path, encoding):
  path = tmp_path / 'names.txt'
  path.write_bytes('cat\ndog\n'.encode(encoding))
  with pytest.raises(ValueError, match='names.txt is not text in UTF-8'):
    paths.read_text_lines(path)


def test_what_is_not_text_is_refused_by_name(tmp_path):
  path = tmp_path / 'names.txt'
  path.write_bytes(b'caf\xe9\n')
  with pytest.raises(ValueError, match=r'--classes: .*names.txt .*byte 3'):
    paths.read_text_lines(path, '--classes')
