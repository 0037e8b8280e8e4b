#!/usr/bin/env bash
# Train with several processes on this machine, or, with NNODES > 1, on
# several: run it on each, with its own NODE_RANK and the same MASTER_ADDR and
# PORT (29500, if not given). Without GPUs, GPUS is the number of processes, on
# CPUs over gloo.
set -euo pipefail

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1]" \
        "[PORT=a free one] $0 CONFIG GPUS [arguments of train.py]" >&2
    exit 2
fi

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python "$tools/torchrun.py" "$2" \
    "$tools/train.py" "$1" --launcher pytorch "${@:3}"
