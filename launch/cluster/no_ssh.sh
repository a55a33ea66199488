#!/usr/bin/env bash
# Train without any way from node to node but the ranks' own connections: start this on every node, each with its number
# in the hostfile, from 0. DeepSpeed (0.19.8) reads no .deepspeed_env this way: set variables on each node.
#
#   launch/cluster/no_ssh.sh HOSTFILE NODE_RANK output=/shared/runs/cluster [OPTION | KEY=VALUE]...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
usage='usage: no_ssh.sh HOSTFILE NODE_RANK [OPTION | KEY=VALUE]...'
hostfile=${1:?${usage}} node_rank=${2:?${usage}}
shift 2

job=(launch/train.py --deepspeed_config ds_configs/z2.json "$@")
master=$(python launch/cluster/check.py "${hostfile}" --no-ssh -- "${job[@]}")
mapfile -t slots < <(sed -nE 's/^[^#]*[[:space:]]slots=([0-9]+).*/\1/p' "${hostfile}")
if [[ ! ${node_rank} =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((node_rank >= ${#slots[@]})); then
  echo "error: NODE_RANK: got ${node_rank@Q}, wanted a number from 0 to $((${#slots[@]} - 1)), a line of ${hostfile}" >&2
  exit 2
fi
exec deepspeed --hostfile "${hostfile}" --no_ssh --node_rank "${node_rank}" --master_addr "${master}" \
  --master_port "${MASTER_PORT:-29500}" "${job[@]}"
