#!/usr/bin/env bash
# Evaluate with several processes; see dist_train.sh.
set -euo pipefail

if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1]" \
        "[PORT=a free one] $0 CONFIG CHECKPOINT GPUS" \
        "[arguments of test.py]" >&2
    exit 2
fi

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python "$tools/torchrun.py" "$3" \
    "$tools/test.py" "$1" "$2" --launcher pytorch "${@:4}"
