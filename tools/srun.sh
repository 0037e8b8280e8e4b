#!/usr/bin/env bash
# srun as slurm_train.sh and slurm_test.sh need it: GPUS processes of one GPU
# each. SRUN_ARGS are further arguments of srun.
#     srun.sh PARTITION JOB_NAME SCRIPT [its arguments ...]
set -euo pipefail

gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# shellcheck disable=SC2086  # SRUN_ARGS is a list
exec srun \
    --partition="$1" \
    --job-name="$2" \
    --gres="gpu:$per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "${@:3}" --launcher slurm
