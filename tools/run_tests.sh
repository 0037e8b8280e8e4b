#!/usr/bin/env bash
# Set up and run the whole suite; arguments go to pytest.
set -euo pipefail
# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" \
    mmdet mmseg -- skimage sklearn scipy cityscapesscripts pytest hypothesis ruff \
    onnx onnxruntime onnxscript
cd "$ROOT"
python -m ruff check .
python -m ruff format --check .
exec python -m pytest "$@"
