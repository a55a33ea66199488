#!/usr/bin/env bash
# Train with torchrun, started on every node with its number in the hostfile, from 0. A rank that dies, or a node that
# is started again, brings all ranks back to the newest checkpoint, MAX_RESTARTS times (default 3).
#
#   launch/cluster/torchrun.sh HOSTFILE NODE_RANK output=/shared/runs/cluster [OPTION | KEY=VALUE]...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
usage='usage: torchrun.sh HOSTFILE NODE_RANK [OPTION | KEY=VALUE]...'
hostfile=${1:?${usage}} node_rank=${2:?${usage}}
shift 2

job=(launch/train.py --deepspeed_config ds_configs/z2.json "$@")
master=$(python launch/cluster/check.py "${hostfile}" --no-ssh -- "${job[@]}")
mapfile -t hosts < <(sed -nE 's/^[[:space:]]*(.*@)?([^#[:space:]]+)[[:space:]]+slots=.*/\2/p' "${hostfile}")
mapfile -t slots < <(sed -nE 's/^[^#]*[[:space:]]slots=([0-9]+).*/\1/p' "${hostfile}")
if [[ ! ${node_rank} =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((node_rank >= ${#slots[@]})); then
  echo "error: NODE_RANK: got ${node_rank@Q}, wanted a number from 0 to $((${#slots[@]} - 1)), a line of ${hostfile}" >&2
  exit 2
fi
port=${MASTER_PORT:-29500}
# torchrun answers a port in use with a page of its own; bind as it does
bind='import socket, sys; socket.create_server(("", int(sys.argv[1])))'
if ((node_rank == 0)) && ! python -c "${bind}" "${port}" 2> /dev/null; then
  echo "error: MASTER_PORT: ${port} is in use on ${HOSTNAME} or no port; set another on all nodes, or wait" >&2
  exit 2
fi
exec torchrun --nnodes "${#slots[@]}" --nproc_per_node "${slots[${node_rank}]}" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv_backend c10d --rdzv_endpoint "${master}:${port}" --rdzv_id "${JOB_ID:-ase-dist}" \
  --rdzv_conf "is_host=$((node_rank == 0))" --local_addr "${hosts[${node_rank}]}" "${job[@]}"
