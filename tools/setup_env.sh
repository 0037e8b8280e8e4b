# Sourced by quickstart.sh and run_tests.sh, with the hosts and then, after --,
# the light modules that they need as arguments: leaves a working environment
# active and the repository root in $ROOT.
#
# An active environment that already runs torch, mmcv's compiled operations
# and the hosts is taken as it is. Otherwise one is made in $POLYNL_VENV (by
# default .venv in the repository) and the stack installed into it; what is
# there already is not built again.
#
# $POLYNL_STACK says whose distributions are installed: OpenMMLab's, or with
# 'onedl' the forks that are maintained, whose modules have the same names.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The package and the tools of this checkout come first everywhere.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

case ${POLYNL_STACK:=official} in
    official)
        MMENGINE=mmengine==0.10.7
        MMCV=mmcv==2.1.0
        MMCV_FILES=77 # C++ sources in it
        HOST_PACKAGES=(mmdet==3.3.0 mmsegmentation==1.2.2)
        EXTRAS=det,seg,mini,tests
        ;;
    onedl)
        MMENGINE=onedl-mmengine==0.10.12
        MMCV=onedl-mmcv==2.3.6
        MMCV_FILES=78
        HOST_PACKAGES=(onedl-mmdetection==3.5.1 onedl-mmsegmentation==1.4.2)
        EXTRAS=onedl-det,onedl-seg,mini,tests
        ;;
    *)
        echo "[setup] error: stack $POLYNL_STACK, expected official or onedl" >&2
        exit 1
        ;;
esac

say() { echo "[setup] $*"; }
die() {
    echo "[setup] error: $*" >&2
    exit 1
}

# Says in a line what does not work.
host_stack_works() {
    python - "$POLYNL_STACK" "${HOSTS[@]}" 2>&1 > /dev/null << 'PY'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter('ignore')
try:
    if sys.argv[1] == 'onedl':
        version('onedl-mmcv')
    import mmengine, torch
    from mmcv.ops import nms
    import pkg_resources  # mmengine's
    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    for host in sys.argv[2:]:
        __import__(host)
except Exception as error:
    text = str(error).split('\n')[0]
    sys.exit(f'{type(error).__name__}: {text}')
PY
}

# Packages of those modules among its arguments that are not there.
missing_light() {
    python - "$@" << 'PY'
import sys
from importlib.util import find_spec
package = dict(
    skimage='scikit-image', sklearn='scikit-learn', xdist='pytest-xdist'
)
print(*(package.get(m, m) for m in sys.argv[1:] if find_spec(m) is None))
PY
}

install_mmcv() {
    local log=$VENV/mmcv-build.log scratch start=$SECONDS last=0 minutes done left
    scratch=$(mktemp -d)
    say "$MMCV comes as source: $MMCV_FILES C++ files, about" \
        "9 minutes on two cores, seconds if pip built it here before"
    # -g0 -O2 halves the time of Python's default flags. A process group of
    # its own, so that an interrupt ends the compilers, too.
    set -m
    TMPDIR=$scratch CFLAGS=${CFLAGS:--g0 -O2} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        python -m pip install --no-build-isolation "$@" \
        "$MMCV" > "$log" 2>&1 &
    local pid=$!
    set +m
    trap 'kill -- "-$pid"; rm -rf "$scratch"; exit 130' INT TERM
    while kill -0 "$pid" 2> /dev/null; do
        sleep 2
        if ((SECONDS - start - last >= 30)); then
            last=$((SECONDS - start))
            minutes=$((last / 60)).$((last % 60 / 6))
            done=$(find "$scratch" -name '*.o' 2> /dev/null | wc -l)
            left=""
            ((done == 0)) || left=", about $((
                last * (MMCV_FILES - done) / done / 60 + 1)) min left"
            say "mmcv: $done of $MMCV_FILES files compiled, $minutes min$left"
        fi
    done
    local status=0
    wait "$pid" || status=$?
    trap - INT TERM
    rm -rf "$scratch"
    ((status == 0)) || die "mmcv did not build, see $log"
}

install_stack() {
    command -v g++ > /dev/null || die "g++ is missing: mmcv is built from" \
        "source (Debian: apt-get install g++)"
    [[ -f $(python -c 'import sysconfig; print(sysconfig.get_path("include"))'
    )/Python.h ]] || die "Python.h is missing: mmcv is built from source" \
        "(Debian: apt-get install python3-dev)"
    say "torch and build tools"
    # The exact version lets pip take the CPU build where one is set up.
    python -m pip install -qq torch==2.13.0 'setuptools<81' wheel ninja \
        || die "pip could not install torch"
    python -m pip install -qq "$MMENGINE" opencv-python \
        || die "pip could not install $MMENGINE"
    local reason
    reason=$(python -c 'import cv2' 2>&1) || die "OpenCV does not load:" \
        "${reason##*$'\n'} (Debian: apt-get install libgl1 libglib2.0-0)"
    if ! python -c 'from mmcv.ops import nms' 2> /dev/null; then
        install_mmcv
        # pip keys its cache by the source, not by the torch it was built for.
        python -c 'from mmcv.ops import nms' 2> /dev/null \
            || install_mmcv --no-cache-dir --force-reinstall --no-deps
    fi
    say "mmengine, mmdet, mmseg and small packages"
    python -m pip install -qq --no-build-isolation "$MMENGINE" \
        "${HOST_PACKAGES[@]}" -e "$ROOT[$EXTRAS]" || die "pip could not install the stack"
    reason=$(host_stack_works) \
        || die "the stack is installed in $VENV but does not work: $reason"
}

setup_env() {
    local base=${PYTHON:-python3} light reason
    HOSTS=()
    while [[ $1 != -- ]]; do
        HOSTS+=("$1")
        shift
    done
    shift
    if ! command -v python > /dev/null; then
        reason="there is no python in it"
    elif reason=$(host_stack_works); then
        light=$(missing_light "$@")
        [[ -z $light ]] || die "the active environment lacks: $light" \
            "(pip install $light)"
        say "using the active environment, $(python -c \
            'import sys; print(sys.prefix)')"
        return
    fi
    say "the active environment is not used: $reason"
    VENV=${POLYNL_VENV:-$ROOT/.venv}
    [[ $POLYNL_STACK == official ]] || VENV=$VENV-$POLYNL_STACK
    # activate is what venv writes last.
    if [[ ! -f $VENV/bin/activate ]]; then
        command -v "$base" > /dev/null || die "$base is missing"
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
            || die "torch needs Python 3.10 or newer, $base is $("$base" -V)"
        say "making an environment in $VENV"
        "$base" -m venv "$VENV" || die "$base -m venv failed (Debian:" \
            "apt-get install python3-venv)"
    fi
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
    if host_stack_works > /dev/null && [[ -z $(missing_light "$@") ]]; then
        say "$VENV is complete"
    else
        install_stack
        say "$VENV is complete after $((SECONDS / 60)) min"
    fi
}

setup_env "$@"
