# An image for CPUs, with this repository in /nfnets_jax and its environment:
#
#   docker build --tag nfnets_jax .
#   docker build --tag nfnets_jax --build-arg EXTRA=tpu .
#
# EXTRA is an extra of setup.py. Dockerfile.cuda is for NVIDIA GPUs.
FROM debian:trixie-slim

RUN apt-get update \
  && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /nfnets_jax

# Before the code, so that a change to it installs nothing again.
COPY LICENSE README.md constraints.txt pyproject.toml setup.py ./
COPY nfnets_jax/__init__.py nfnets_jax/
ARG EXTRA=train
RUN python3 -m venv .venv \
  && .venv/bin/python -m pip install --no-cache-dir \
    --constraint constraints.txt --editable ".[$EXTRA]"

COPY nfnets_jax nfnets_jax
COPY experiments experiments
