#!/usr/bin/env bash
# Train on a slurm cluster, with GPUS processes of one GPU each. SRUN_ARGS are
# further arguments of srun.
set -euo pipefail

number='^[1-9][0-9]*$'
if [[ $# -lt 4 || ! ${GPUS:-8} =~ $number ||
    ! ${GPUS_PER_NODE:-8} =~ $number ]]; then
    echo "usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=]" \
        "$0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]" >&2
    exit 2
fi

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec bash "$tools/srun.sh" "$1" "$2" \
    "$tools/train.py" "$3" --work-dir "$4" "${@:5}"
