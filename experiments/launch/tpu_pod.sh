#!/bin/bash
# One run on all hosts of a Cloud TPU pod slice, from a workstation with gcloud:
#
#   TPU=my-slice ZONE=us-central2-b WORKDIR=gs://my-bucket/runs/f1 \
#     experiments/launch/tpu_pod.sh
#
# README.md here lists what the hosts need. Arguments are passed on:
# --config.seed=1.

set -euo pipefail

TPU=${TPU:?name of the slice}
ZONE=${ZONE:?zone of the slice}
WORKDIR=${WORKDIR:?folder that all hosts share, such as gs://BUCKET/FOLDER}
CONFIG=${CONFIG:-experiments/nfnet_imagenet.py:F1}
DATA_DIR=${DATA_DIR:-/mnt/data/tensorflow_datasets}
# The repository, with its environment, on every host.
REPOSITORY=${REPOSITORY:-nfnets_jax}
ATTEMPTS=${ATTEMPTS:-5}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="$1"
}

# No flags are needed: jax asks the metadata server. The remote shell splits the
# words again.
printf -v words ' %q' .venv/bin/python -m nfnets_jax.main --config="$CONFIG" \
  --workdir="$WORKDIR" --config.data.data_dir="$DATA_DIR" "$@"
printf -v main 'cd %q &&%s' "$REPOSITORY" "$words"

# A run resumes from its newest checkpoint.
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  on_all_hosts "$main" && exit 0
  echo "attempt $attempt failed" >&2
  # Other processes hold the chips until the heartbeat timeout, 60 s.
  sleep 90
done
exit 1
