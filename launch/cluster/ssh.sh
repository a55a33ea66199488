#!/usr/bin/env bash
# Train on the nodes of a hostfile, from any machine that can log in to them: DeepSpeed's launcher over pdsh and ssh.
# The checkout and its Python must have the same path on all nodes, the run folder must be shared.
#
#   launch/cluster/ssh.sh HOSTFILE output=/shared/runs/cluster [OPTION | KEY=VALUE]...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
hostfile=${1:?usage: ssh.sh HOSTFILE [OPTION | KEY=VALUE]...}
shift

for name in $(compgen -e MLFLOW); do # DeepSpeed writes their values, a password too, into a command line on every node
  unset "${name}"
done
job=(launch/train.py --deepspeed_config ds_configs/z2.json "$@")
export DS_ENV_FILE=${DS_ENV_FILE:-.deepspeed_env}
master=$(python launch/cluster/check.py "${hostfile}" --env "${DS_ENV_FILE}" -- "${job[@]}")
exec deepspeed --hostfile "${hostfile}" --master_addr "${master}" --master_port "${MASTER_PORT:-29500}" "${job[@]}"
