#!/usr/bin/env bash
# Write the images' lock files anew from pyproject.toml and docker/torch.in, hashes included. Needs uv (pip install uv).
#   torch-cuda.lock    torch, torchvision and all they need, CUDA libraries included
#   requirements.lock  all the rest; the same for CUDA and CPU
# Versions stay as they are where they still fit; UPGRADE=1 takes the newest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

common=(--quiet --generate-hashes --no-annotate --no-emit-index-url --python-version 3.11
  --custom-compile-command docker/lock.sh)
[[ -z "${UPGRADE:-}" ]] || common+=(--upgrade)

uv pip compile docker/torch.in --output-file docker/torch-cuda.lock "${common[@]}"
mapfile -t heavy < <(grep -oE '^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)' docker/torch-cuda.lock)
uv pip compile pyproject.toml docker/torch.in --constraint docker/torch-cuda.lock \
  --output-file docker/requirements.lock "${common[@]}" "${heavy[@]/#/--no-emit-package=}"
