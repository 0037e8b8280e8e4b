"""AP and speed of an exported RetinaFace in INT8, by which part is in it.

    python projects/deployment/quantise.py faces.onnx --data data/mini_wider

Static quantisation by onnxruntime: activations and weights of 8 bits, weights
by channel, ranges from training pictures. What finds the boxes from the
network's outputs (decoding and NMS) stays in float but in the last row, which
quantises whatever onnxruntime can.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import cv2
import numpy as np
import onnx
from benchmarks.timing import machine, ratio, table, take_turns
from detect import detect, load, prepare
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.progress import track

from polynl_mm.faces.ap import evaluate
from polynl_mm.faces.files import load_wider_face_gt

# In the name of a node that the older exporter makes stands its module.
NETWORK = ('/backbone/', '/neck/', '/bbox_head/')


class Pictures(CalibrationDataReader):
    """Pictures for the ranges of activations, one after the other."""

    def __init__(self, files: list[Path], facts: dict) -> None:
        """Take the files."""
        self.inputs = (
            {'input': prepare(cv2.imread(str(file)), facts)} for file in files
        )

    def get_next(self) -> dict | None:
        """Give the next one, None at the end."""
        return next(self.inputs, None)


def parts(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Which nodes are quantised in each row of the table; None for float.

    Raises:
        ValueError: The names of nodes tell no modules.
    """
    names = [node.name for node in graph.node]
    network = [name for name in names if any(k in name for k in NETWORK)]
    block = [name for name in network if '/poly_nl/' in name]
    if not block:
        raise ValueError(
            'no node is of a module poly_nl: export the model with '
            '--exporter older and without --fuse'
        )
    rest = [name for name in network if name not in block]
    return {
        'nothing (float32)': None,
        'the network without blocks': rest,
        'the whole network': network,
        'blocks alone': block,
        'all, decoding and NMS as well': names,
    }


def preprocess(file: str, out: str) -> None:
    """Write the shapes of what is in a model into it."""
    # Inference of symbolic shapes fails at NMS and leaves what it has found
    # in the current folder.
    quant_pre_process(
        file, out, skip_optimization=True, skip_symbolic_shape=True
    )


def quantise(
    file: str, out: str, nodes: list[str], pictures: Pictures
) -> None:
    """Quantise some nodes of a model."""
    quantize_static(
        file,
        out,
        pictures,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=nodes,
        # 255 steps, of which 0 is one, for what has both signs as well.
        reduce_range=False,
    )


def ap(file: str, data: Path, gt) -> dict[str, float]:
    """AP of all settings by the official protocol."""
    session, facts = load(file)
    found = {}
    for image in gt.images:
        picture = cv2.imread(str(data / 'WIDER_val/images' / f'{image}.jpg'))
        dets, _, _ = detect(session, facts, picture)
        sides = dets[:, 2:4] - dets[:, :2]
        found[image] = np.column_stack([dets[:, :2], sides, dets[:, 4]])
    return evaluate(gt, found)


def main() -> None:
    """Quantise each part, and print AP and time."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model', help='from tools/export_onnx.py')
    parser.add_argument('--data', type=Path, default='data/mini_wider')
    parser.add_argument(
        '--pictures', type=int, default=64, help='for the ranges'
    )
    parser.add_argument('--turns', type=int, default=30)
    args = parser.parse_args()
    files = sorted(args.data.glob('WIDER_train/images/*/*.jpg'))
    if not files:
        parser.error(f'--data {args.data}: no WIDER_train/images/*/*.jpg')
    try:
        gt = load_wider_face_gt(str(args.data / 'ground_truth'))
        facts = load(args.model)[1]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    picture = cv2.imread(str(files[0]))
    rows, calls = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        whole = f'{folder}/whole.onnx'
        preprocess(args.model, whole)
        every = parts(onnx.load(whole).graph)
        for number, (name, nodes) in enumerate(
            track(every.items(), 'Quantising')
        ):
            out = args.model
            if nodes is not None:
                out = f'{folder}/{number}.onnx'
                pictures = Pictures(files[: args.pictures], facts)
                quantise(whole, out, nodes, pictures)
            result = ap(out, args.data, gt)
            size = Path(out).stat().st_size / 1e6
            rows[name] = [
                *(f'{v:.4f}' for v in result.values()),
                f'{size:.2f}',
            ]
            session, _ = load(out)
            calls[name] = lambda s=session: detect(s, facts, picture)
        unit = next(iter(calls))
        times = take_turns(lambda i: calls, 'cpu', unit, args.turns)
    for name, row in rows.items():
        middle, spread = ratio(times[name], times[unit])
        row.append(f'{middle:.2f} ± {spread:.2f}')
    height, width = picture.shape[:2]
    print(f'{machine("cpu")}; a picture of {height} x {width}')
    head = ['in INT8', 'easy', 'medium', 'hard', 'MB', 'time']
    print(table(head, [[name, *row] for name, row in rows.items()]))


if __name__ == '__main__':
    main()
