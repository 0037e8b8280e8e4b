#!/usr/bin/env bash
# Set up and run the whole suite in two processes; arguments go to pytest, which
# takes the last of a kind: -n 0 for one process, -n 8 for eight. The kernels for
# a GPU come last, on the CPU by Triton's interpreter, in an environment that is
# the same but for Triton and the numpy that this interpreter knows; not where
# the first argument names tests. --stack onedl, before all others, takes the
# maintained forks of OpenMMLab's packages in place of these.
set -euo pipefail
if [[ ${1:-} == --stack ]]; then
    POLYNL_STACK=${2:-missing}
    shift 2 || shift
fi
# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" \
    mmdet mmseg -- skimage sklearn scipy cityscapesscripts pytest xdist hypothesis \
    ruff onnx onnxruntime onnxscript
cd "$ROOT"
python -m ruff check .
python -m ruff format --check .
# A process has a core; tests of a file share what is costly to make.
export OMP_NUM_THREADS=1
python -m pytest -n 2 --dist loadfile "$@"
if [[ $(uname -s)-$POLYNL_STACK != Linux-official || ${1:--} != -* ]]; then
    exit
fi

KERNELS=${POLYNL_VENV:-$ROOT/.venv}-kernels
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
if ! "$KERNELS/bin/python" -c 'import triton' 2> /dev/null; then
    say "making an environment with Triton in $KERNELS"
    python -m venv --without-pip "$KERNELS"
    python -m pip --python "$KERNELS/bin/python" install -qq --no-deps \
        triton==3.6.0 'numpy<2.4' || die "pip could not install Triton"
fi
# All that is not found there is that of the environment of the suite.
site python > "$(site "$KERNELS/bin/python")/suite.pth"
TRITON_INTERPRET=1 exec "$KERNELS/bin/python" -m pytest -n 2 \
    tests/test_ops/test_kernels.py
