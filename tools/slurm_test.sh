#!/usr/bin/env bash
# Evaluate on a slurm cluster; see slurm_train.sh.
set -euo pipefail

number='^[1-9][0-9]*$'
if [[ $# -lt 4 || ! ${GPUS:-8} =~ $number ||
    ! ${GPUS_PER_NODE:-8} =~ $number ]]; then
    echo "usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=]" \
        "$0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]" >&2
    exit 2
fi

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec bash "$tools/srun.sh" "$1" "$2" \
    "$tools/test.py" "$3" "$4" "${@:5}"
