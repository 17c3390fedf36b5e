# Every target that needs the environment makes it first. Try `make`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What only one target needs has an environment of its own, named after the
# extra: tensorflow to prepare data, timm as the peer of a bench, the notebook's
# Jupyter, the site's Sphinx, and the compilers of TPUs (684 MB) and GPUs (3.9 GB).
TF_BIN := $(VENV)-tensorflow/bin
TF_STAMP := $(VENV)-tensorflow/.installed
NOTEBOOK_BIN := $(VENV)-notebook/bin
DOCS_BIN := $(VENV)-docs/bin
TOPOLOGY ?= v3:4x4
COMPILE_VENV := $(VENV)$(if $(filter v%,$(TOPOLOGY)),-tpu)$(if $(filter h100%,$(TOPOLOGY)),-cuda)
CONFIG ?= experiments/nfnet_imagenet.py:F1
VARIANTS := f0 f1 f2 f3 f4 f5 f6
# The paper's claims, each a sweep.
CLAIMS := batch-size clipping clip-methods clip-layers ablation latency \
  transfer regularisation microbatch
SCALE ?= small

# Where data sets are kept; TFDS's ~/tensorflow_datasets if not given.
data_dir = $(if $(DATA_DIR),--data_dir='$(DATA_DIR)')
config_data_dir = $(if $(DATA_DIR),--config.data.data_dir='$(DATA_DIR)')

.DEFAULT_GOAL := help
.PHONY: help install train test test-thorough test-slow lint format bench \
  bench-compiled bench-input show-augment signal-plots tables notebook docs prepare imagenet clean \
  gpu gpu-pack compile compile-table check-topology \
  $(VARIANTS:%=reproduce-%) $(VARIANTS:%=rehearse-%) reproduce report \
  $(CLAIMS:%=reproduce-%)

help:  ## Show the targets.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | \
	  awk -F ':.*## ' '{ printf "  make %-21s %s\n", $$1, $$2 }'
	@echo
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) SCALE=$(SCALE) CONFIG=$(CONFIG)'
	@echo '  TOPOLOGY=$(TOPOLOGY) WORKDIR DATA_DIR DATA_NAME TESTS PEER ARGS'

install: $(STAMP)  ## Make the virtual environment with all dependencies.

# $(call make_venv,folder,extra)
define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit( \
	  None if (3, 11) <= v <= (3, 13) else \
	  "Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(2)]'
	@touch $(1)/.installed
endef

$(STAMP): setup.py pyproject.toml constraints.txt
	$(call make_venv,$(VENV),dev)

$(VENV)-%/.installed: setup.py pyproject.toml constraints.txt
	$(call make_venv,$(VENV)-$*,$*)

train: WORKDIR ?= runs/digits
train: $(STAMP)  ## Train a small NFNet on handwritten digits and show the result.
	$(BIN)/python -m nfnets_jax.main --config=experiments/digits.py --workdir='$(WORKDIR)' $(ARGS)

prepare: $(TF_STAMP)  ## Prepare another data set of TFDS's catalogue, as in NAME=cifar10.
	$(TF_BIN)/python -m nfnets_jax.data.prepare $(NAME) $(data_dir)

imagenet: $(TF_STAMP)  ## Prepare ImageNet: IMAGENET_DIR=folder of the tars, or FROM_TFRECORD=folder.
	$(TF_BIN)/python -m nfnets_jax.data.prepare imagenet2012 $(data_dir) \
	  $(if $(FROM_TFRECORD),--from_tfrecord='$(FROM_TFRECORD)',--imagenet_dir='$(IMAGENET_DIR)')

reproduce-f1:  ## Train NFNet-F1 on ImageNet as in the paper; also f0 to f6, f5 and f6 with SAM.
$(VARIANTS:%=reproduce-%): WORKDIR ?= runs/$@
$(VARIANTS:%=reproduce-%): reproduce-f%: $(STAMP)
	$(BIN)/python -m experiments.reproduce.nfnet --workdir='$(WORKDIR)' \
	  --config=experiments/nfnet_imagenet.py:F$* $(config_data_dir) $(ARGS)

rehearse-f1:  ## All of that with a few photographs, killed once and resumed.
$(VARIANTS:%=rehearse-%): WORKDIR ?= runs/$@
$(VARIANTS:%=rehearse-%): rehearse-f%: $(STAMP)
	$(BIN)/python -m experiments.reproduce.nfnet --workdir='$(WORKDIR)' --rehearse \
	  --config=experiments/rehearse.py:F$* $(config_data_dir) $(ARGS)

sweep = $(BIN)/python -m experiments.reproduce.sweep --scale=$(SCALE) \
  --output='$(WORKDIR)' $(data_dir) $(if $(DATA_NAME),--data_name='$(DATA_NAME)')
page = $(BIN)/python -m experiments.reproduce.report --output='$(WORKDIR)'

reproduce: WORKDIR ?= runs/reproduce
reproduce: $(STAMP)  ## Run all claims of the paper at SCALE=small, gpu or paper.
	$(sweep) $(ARGS)
	$(if $(findstring --list,$(ARGS)),,$(page))

reproduce-batch-size:  ## One claim; also clipping, ablation and the like.
$(CLAIMS:%=reproduce-%): WORKDIR ?= runs/reproduce
$(CLAIMS:%=reproduce-%): reproduce-%: $(STAMP)
	$(sweep) --row=$* $(ARGS)
	$(if $(findstring --list,$(ARGS)),,$(page))

report: WORKDIR ?= runs/reproduce
report: $(STAMP)  ## Draw every claim that has results, in report.html.
	$(page)

pytest = $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

test: $(STAMP)  ## Run the fast tests and the examples of the docstrings.
	$(pytest) -m 'not slow and not thorough'

test-thorough: TESTS ?= tests
test-thorough: $(STAMP)  ## Run the tests that take several seconds each, all or those of TESTS.
	$(pytest) -m 'thorough and not slow' $(TESTS)

test-slow: $(STAMP) $(TF_STAMP) $(VENV)-notebook/.installed  ## Run the slow tests.
	NFNETS_TENSORFLOW_PYTHON=$(abspath $(TF_BIN)/python) \
	  NFNETS_NOTEBOOK_PYTHON=$(abspath $(NOTEBOOK_BIN)/python) \
	  $(BIN)/python -m pytest -m slow tests

lint: $(STAMP)  ## Check style and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: PEER ?= released
bench: $(STAMP) $(if $(findstring timm,$(PEER)),$(VENV)-timm/.installed)  ## Time a net beside PEER='released timm' or another net.
	$(BIN)/python -m experiments.benchmarks.speed --peer $(PEER) \
	  --peer_python=$(VENV)-timm/bin/python $(ARGS)

bench-compiled: TOPOLOGY = v3:2x2
bench-compiled: check-topology $(COMPILE_VENV)/.installed  ## Estimate a net beside the released form for TOPOLOGY, as in v5e:2x2, h100.
	$(COMPILE_VENV)/bin/python -m experiments.benchmarks.compiled --topology='$(TOPOLOGY)' $(ARGS)

bench-input: $(TF_STAMP)  ## Time the input pipeline beside tf.data, on photographs.
	$(TF_BIN)/python -m experiments.benchmarks.input_pipeline $(data_dir) $(ARGS)

show-augment: WORKDIR ?= runs/show-augment
show-augment: $(STAMP)  ## Draw augmented training images with their labels.
	$(BIN)/python -m experiments.figures.show_augment --output='$(WORKDIR)'/augment.png \
	  --config=experiments/nfnet_imagenet.py:F1 $(config_data_dir) $(ARGS)

# Before an environment of gigabytes is made for a name that does not exist.
check-topology:
	@echo '$(TOPOLOGY)' | grep -qxE \
	  'local|h100(x[1-9][0-9]*)?|v(2|3|4|5e|5p|6e):[0-9]+(x[0-9]+){1,2}' || \
	  { echo "error: there is no topology '$(TOPOLOGY)'; give local, h100, h100x8," \
	  "or the chips of a TPU slice, as in v3:4x4, v4:2x2x1, v5e:8x8" >&2; exit 1; }

compile: check-topology $(COMPILE_VENV)/.installed  ## Compile CONFIG's steps for TOPOLOGY, as in h100x8: do they fit?
	$(COMPILE_VENV)/bin/python -m nfnets_jax.compile --config='$(CONFIG)' --topology='$(TOPOLOGY)' $(ARGS)

compile-table: WORKDIR ?= runs/compiled
compile-table: $(VENV)-tpu/.installed $(VENV)-cuda/.installed  ## Estimate nets on TPUs and GPUs, cell by cell; also ARGS=--latency or --claims; hours.
	$(VENV)-tpu/bin/python -m experiments.benchmarks.compile_table --output='$(WORKDIR)' \
	  --tpu_python=$(VENV)-tpu/bin/python --cuda_python=$(VENV)-cuda/bin/python $(ARGS)

tables: $(STAMP)  ## Write the tables in docs from code and results.
	$(BIN)/python -m experiments.figures.tables
	$(BIN)/python -m experiments.figures.results

notebook: $(VENV)-notebook/.installed  ## Execute the notebook and keep its outputs.
	$(NOTEBOOK_BIN)/python -m nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False experiments/examples/quickstart.ipynb

docs: $(VENV)-docs/.installed  ## Build the site in docs/_build/html; warnings are errors.
	$(DOCS_BIN)/python -m sphinx --fail-on-warning --keep-going --builder html \
	  docs docs/_build/html $(ARGS)

signal-plots: WORKDIR ?= runs/signal-plots
signal-plots: $(STAMP)  ## Draw the signal at initialisation beside the theory.
	$(BIN)/python -m experiments.figures.signal_plots --output_dir='$(WORKDIR)' $(ARGS)

gpu: GPU_OUTPUT ?= runs/gpu
gpu: $(if $(GPU_DRY_RUN),$(STAMP))  ## Check and measure on an accelerator; tiny, on a CPU, with GPU_DRY_RUN=1.
	$(if $(GPU_DRY_RUN),GPU_DRY_RUN=1 $(BIN)/python,$(PYTHON)) -m experiments.gpu.run \
	  --output='$(GPU_OUTPUT)' $(data_dir) $(if $(DATA_NAME),--data_name='$(DATA_NAME)') $(ARGS)

gpu-pack: $(STAMP)  ## Gather wheels and CIFAR-10 for a machine without a network.
	$(BIN)/python -m experiments.gpu.pack $(data_dir) \
	  $(if $(DATA_NAME),--data_name='$(DATA_NAME)') $(ARGS)

clean:  ## Remove the environments, builds and caches; runs and data stay.
	rm -rf $(VENV) $(addprefix $(VENV)-,notebook docs tensorflow timm tpu cuda) build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
