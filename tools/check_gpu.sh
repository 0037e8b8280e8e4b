#!/usr/bin/env bash
# What works on this machine's GPU: mixed precision, NCCL, loss scaling, fused
# layers and the tests of the operation, on small data, in a few minutes. Takes
# the active environment as it is. All it writes is in work_dirs/check_gpu/,
# made anew at every run. --cpu: the same without a GPU, in float32, over gloo.
# shellcheck disable=SC2329 # step calls the functions
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$PWD/work_dirs/check_gpu
# What NCCL says of itself when it starts.
export NCCL_DEBUG=${NCCL_DEBUG:-VERSION}
device=cuda precision=AMP amp=(--amp) backend=NCCL started='NCCL version'

case "$*" in
    '') ;;
    --cpu)
        export CUDA_VISIBLE_DEVICES=''
        device=cpu precision=float32 amp=() backend=gloo started='over gloo'
        ;;
    *)
        echo "usage: $0 [--cpu]" >&2
        exit 2
        ;;
esac

python - "$device" << 'PY' || exit
import sys
from importlib.util import find_spec

stack = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
missing = [name for name in stack if find_spec(name) is None]
if missing:
    sys.exit(f'check_gpu.sh: error: not installed: {", ".join(missing)}')

import torch

machine = 'no GPU'
if sys.argv[1] == 'cuda':
    if not torch.cuda.is_available():
        sys.exit(
            f'check_gpu.sh: error: torch {torch.__version__} sees no GPU '
            '(--cpu: the same steps without one)'
        )
    machine = torch.cuda.get_device_name()
triton = 'no triton'
if find_spec('triton'):
    import triton

    triton = f'triton {triton.__version__}'
cuda = torch.version.cuda
print(f'{machine}, torch {torch.__version__}, CUDA {cuda}, {triton}')
PY

rm -rf "$out"
mkdir -p "$out/logs"
cd "$out" || exit # the configs look for their data here
trap 'exit 130' INT

det=$root/configs/mini/retinaface_r50-polynl_mini-wider.py
seg=$root/configs/mini/polynl_r18-d4_mini-cityscapes.py
start=det/epoch_1.pth
scale=1e12 # of the loss, whose gradients float16 can not hold then
failed=0

# Run a command with its output in a log, and say how it went. The log has to
# have the pattern: a tool may end well and not have done what was to be seen.
step() { # NAME WHAT PATTERN COMMAND ...
    local log=$out/logs/$1.log what=$2 pattern=$3 since=$SECONDS status=ok
    if ! "${@:4}" > "$log" 2>&1 || ! grep -q "$pattern" "$log" \
        || grep -qE ' loss: (nan|inf)' "$log"; then
        status=FAILED
        what+=" (see $log)"
        failed=1
    fi
    printf '%-7s%4d s  %s\n' "$status" $((SECONDS - since)) "$what"
}

# Of what starts and never ends, as NCCL may, the other steps are not to wait.
run() { timeout --foreground -k 30 600 "$@"; }

tool() { run python "$root/tools/$1" "${@:2}"; }

data() { # KIND TRAIN VAL
    tool make_mini_data.py "$1" --out "data/mini_${1%_face}" --seed 0 \
        --train "$2" --val "$3"
}

all_data() { data wider_face 40 2 && data cityscapes 40 4; }

# Ten steps of training in all cases, options after the work directory.
train() {
    tool train.py "$det" "${amp[@]}" --work-dir "$1" \
        --cfg-options train_cfg.max_epochs=1 "${@:2}"
}

dist_train() {
    run bash "$root/tools/dist_train.sh" "$det" 1 "${amp[@]}" \
        --work-dir dist --cfg-options train_cfg.max_epochs=1
}

overflow() {
    local options=optim_wrapper.loss_scale
    train overflow "load_from=$start" "$options.init_scale=$scale" \
        "$options.backoff_factor=0.01" \
        && tool check_loss_scaling.py "$start" overflow/epoch_1.pth "$scale"
}

segmentation() {
    tool train.py "$seg" "${amp[@]}" --work-dir seg --cfg-options \
        train_cfg.max_iters=10 train_cfg.val_interval=10 \
        default_hooks.checkpoint.interval=10 \
        && tool test.py "$seg" seg/iter_10.pth --work-dir seg_test
}

step data 'mini data' 'cityscapes made' all_data
step train "train.py of a detector, $precision" 'Saving checkpoint' train det
step dist "dist_train.sh CONFIG 1 over $backend, $precision" "$started" \
    dist_train
step resume "train.py --resume, $precision" 'resumed epoch: 1' \
    train resumed train_cfg.max_epochs=2 --resume "$start"
step fuse 'test.py --fuse' 'fuse_test: [1-9]' \
    tool test.py "$det" "$start" --fuse --work-dir fuse
step tta 'test.py --tta' 'Epoch(test)' \
    tool test.py "$det" "$start" --tta --work-dir tta
step fuse_train "fuse_train, $precision" 'fuse_train: [1-9]' \
    train fuse_train "load_from=$start" model.backbone.norm_eval=True \
    custom_hooks.0.fuse_train=True
if ((${#amp[@]})); then
    step overflow 'gradient scaling, after steps with infinite gradients' \
        'steps skipped' overflow
else
    echo 'not run        gradient scaling: needs AMP'
fi
step seg "train.py and test.py of a segmentation, $precision" 'Iter(test)' \
    segmentation
if [[ -d $root/tests ]] && python -c 'import pytest' &> /dev/null; then
    step tests "tests of the operation, $device" ' passed' \
        run python -m pytest -q "$root/tests/test_ops" -k "$device"
else
    echo 'not run        tests of the operation: need pytest and a checkout'
fi
echo "logs: $out/logs"
exit "$failed"
