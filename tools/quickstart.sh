#!/usr/bin/env bash
# The main job, small: set up, make mini-WIDER, train a detector with Poly-NL
# blocks in two distributed processes, evaluate its checkpoint, draw what it
# finds. Everything goes to work_dirs/quickstart/, made anew at every run.
set -euo pipefail
# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" \
    mmdet -- skimage sklearn scipy
cd "$ROOT"

CONFIG=configs/mini/retinaface_r50-polynl_mini-wider.py
DATA=data/mini_wider # where the config looks for it
OUT=work_dirs/quickstart
started=$SECONDS

say() { echo "[quickstart] $*"; }

processes=$(python -c \
    'import torch; print(min(2, torch.cuda.device_count()) or 2)')

say "mini-WIDER in $DATA: real faces and photographs, put together"
python tools/make_mini_data.py wider_face --out "$DATA" --seed 0

say "training $CONFIG in $processes processes; log in $OUT/train.log"
rm -rf "$OUT"
mkdir -p "$OUT"
set +e
# The learning rate is for two processes; on one GPU it is halved.
bash tools/dist_train.sh "$CONFIG" "$processes" --work-dir "$OUT/train" \
    --auto-scale-lr 2>&1 | tee "$OUT/train.log" | sed -unE \
    -e 's/.*(Epoch\(train\) +\[[0-9]+\])\[20\/.*( loss: [0-9.]+).*/\1\2/p' \
    -e 's/.*(Epoch\(val\) +\[[0-9]+\]).*wider_face\/(easy: [0-9.]+).*wider_face\/(medium: [0-9.]+).*wider_face\/(hard: [0-9.]+).*/\1 \2 \3 \4/p' \
    -e '/[Ee]rror:/p'
status=${PIPESTATUS[0]}
set -e
if ((status != 0)) || [[ ! -s $OUT/train/last_checkpoint ]]; then
    die "training failed (exit code $status), see $OUT/train.log:" \
        "$(grep -E '[Ee]rror:' "$OUT/train.log" | tail -n 1)"
fi

checkpoint=$(< "$OUT/train/last_checkpoint")
say "evaluating $checkpoint and drawing what it finds"
python tools/test.py "$CONFIG" "$checkpoint" --work-dir "$OUT/test" \
    --show-dir pictures > "$OUT/test.log" 2>&1 \
    || die "evaluation failed, see $OUT/test.log: $(tail -n 1 "$OUT/test.log")"

python - "$OUT" "$CONFIG" "$checkpoint" << 'PY'
import json
import re
import sys
from pathlib import Path

out, config, checkpoint = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
log = (out / 'train.log').read_text()
# Both as the runner found them, not as they were asked for.
gloo = re.search(r'process group of (\d+) over (gloo)', log)
gpus = re.search(r'GPU number: (\d+)', log)
world_size, backend = gloo.groups() if gloo else (gpus.group(1), 'nccl')
(scalars,) = out.glob('train/*/vis_data/scalars.json')
records = map(json.loads, scalars.read_text().splitlines())
settings = ('easy', 'medium', 'hard')
keys = [f'wider_face/{setting}' for setting in settings]
by_epoch = [[r[key] for key in keys] for r in records if keys[0] in r]
(metrics,) = out.glob('test/*/*.json')
pictures = sorted(out.glob('test/*/pictures/*'))
result = json.loads(metrics.read_text())
result = [result[key] for key in keys]
summary = dict(
    world_size=int(world_size),
    backend=backend,
    config=config,
    # Of the setting that keeps all faces.
    ap_first_epoch=by_epoch[0][-1],
    ap=result[-1],
    ap_by_setting=dict(zip(settings, result)),
    checkpoint=str(checkpoint),
    pictures=[str(p) for p in pictures],
)
(out / 'summary.json').write_text(json.dumps(summary, indent=1) + '\n')
print(f"""
AP on val pictures, whose faces were never seen in training:
                                 easy    medium  hard
  after the first epoch          {'   '.join(f'{ap:.3f}' for ap in by_epoch[0])}
  at the end, by tools/test.py   {'   '.join(f'{ap:.3f}' for ap in result)}
This is WIDER Face's AP at IoU 0.5, by its official protocol: of faces of at
least 36, 22 and 10 pixels here; 1 is perfect. It tells that the whole chain
learns, and nothing about the real WIDER Face.
Pictures, ground truth left and detections right ({len(pictures)} of them):""")
for picture in pictures[:3]:
    print(f'  {picture}')
print(f'All figures: {out}/summary.json')
PY
say "done, $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s" \
    "after set-up"
