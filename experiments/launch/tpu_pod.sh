#!/bin/bash
# One run on all hosts of a Cloud TPU pod slice, from a workstation with gcloud:
#
#   TPU=my-slice ZONE=us-central2-b WORKDIR=/mnt/runs/f1 \
#     experiments/launch/tpu_pod.sh
#
# README.md here explains it, and what has to be on the hosts before.

set -euo pipefail

TPU=${TPU:?the name of the slice}
ZONE=${ZONE:?the zone that it is in}
WORKDIR=${WORKDIR:?a folder that all hosts share, such as a mounted bucket}
CONFIG=${CONFIG:-experiments/nfnet_imagenet.py:F1}
DATA_DIR=${DATA_DIR:-/mnt/data/tensorflow_datasets}
# Where the repository and its environment are on every host.
REPOSITORY=${REPOSITORY:-nfnets_jax}
ATTEMPTS=${ATTEMPTS:-5}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="$1"
}

# jax asks the metadata server which host is which: no flags are needed.
main="cd '$REPOSITORY' && .venv/bin/python -m nfnets_jax.main \
  --config='$CONFIG' --workdir='$WORKDIR' --config.data.data_dir='$DATA_DIR'"

# A run goes on from its newest checkpoint, so that failures may be outlived.
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  on_all_hosts "$main" && exit 0
  echo "attempt $attempt has failed" >&2
  # Processes that are left hold the chips until the heartbeat's timeout, 60 s.
  sleep 90
done
exit 1
