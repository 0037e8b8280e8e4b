"""Detect faces with onnxruntime and numpy alone; OpenCV reads and draws.

    python projects/deployment/detect.py faces.onnx picture.jpg drawn.png

``faces.onnx`` is what ``tools/export_onnx.py`` makes of a RetinaFace. Nothing
of torch, of a host or of this package is imported: copy the file and use it.
"""

from __future__ import annotations

import argparse
import json
import os

import cv2
import numpy as np
import onnxruntime

OUTPUTS = ['dets', 'labels', 'keypoints']
# By the names that a Resize has for them.
HOW = dict(
    nearest=cv2.INTER_NEAREST,
    bilinear=cv2.INTER_LINEAR,
    bicubic=cv2.INTER_CUBIC,
    area=cv2.INTER_AREA,
    lanczos=cv2.INTER_LANCZOS4,
)


def load(file: str) -> tuple[onnxruntime.InferenceSession, dict]:
    """Give the network, and what its file says of it.

    Raises:
        ValueError: The file is none of a detector with landmarks.
    """
    options = onnxruntime.SessionOptions()
    # Errors alone.
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            file, options, providers=['CPUExecutionProvider']
        )
    except Exception as error:  # onnxruntime raises all kinds
        line = ' '.join(str(error).split())
        raise ValueError(
            f'{file}: onnxruntime does not read it: {line}'
        ) from error
    outputs = [each.name for each in session.get_outputs()]
    if outputs != OUTPUTS:
        raise ValueError(
            f'{file}: its outputs are {", ".join(outputs)}; expected are '
            f'{", ".join(OUTPUTS)}, of a detector of faces with landmarks'
        )
    facts = session.get_modelmeta().custom_metadata_map
    missing = {'mean', 'pad_size_divisor'} - facts.keys()
    if missing:
        raise ValueError(
            f'{file}: its metadata lacks {", ".join(sorted(missing))}; '
            'expected is a file by tools/export_onnx.py'
        )
    keys = ('mean', 'std', 'bgr_to_rgb', 'pad_size_divisor', 'classes')
    found = {key: json.loads(facts[key]) for key in keys}
    found['pad_value'] = json.loads(facts.get('pad_value', '0'))
    return session, found | {'resize': json.loads(facts.get('resize', '{}'))}


def new_size(
    width: int,
    height: int,
    scale=None,
    scale_factor=1.0,
    keep_ratio: bool = False,
    max_side: int | None = None,
    interpolation: str = 'bilinear',
) -> tuple[int, int]:
    """Width and height after the Resize of a test pipeline, as there."""
    if scale is None:
        if isinstance(scale_factor, (int, float)):
            scale_factor = (scale_factor, scale_factor)
        scale = _scaled(width, height, *scale_factor)
    elif isinstance(scale, int):
        scale = (scale, scale)
    if max_side is not None and max(scale) > max_side:
        scale = [max(round(v * max_side / max(scale)), 1) for v in scale]
    if not keep_ratio:
        return tuple(scale)
    ratio = min(
        max(scale) / max(width, height), min(scale) / min(width, height)
    )
    return _scaled(width, height, ratio, ratio)


def _scaled(width: int, height: int, x: float, y: float) -> tuple[int, int]:
    return int(width * x + 0.5), int(height * y + 0.5)


def prepare(picture: np.ndarray, facts: dict) -> np.ndarray:
    """Resize a picture (h, w, 3) of uint8, BGR, normalise and pad it.

    Returns:
        ndarray: (1, 3, H, W), float32.
    """
    height, width = picture.shape[:2]
    size = new_size(width, height, **facts['resize'])
    if size != (width, height):
        how = facts['resize'].get('interpolation', 'bilinear')
        picture = cv2.resize(picture, size, interpolation=HOW[how])
    if facts['bgr_to_rgb']:
        picture = picture[..., ::-1]
    x = (picture - np.float32(facts['mean'])) / np.float32(facts['std'])
    divisor = facts['pad_size_divisor']
    bottom, right = (-side % divisor for side in picture.shape[:2])
    x = np.pad(
        *(x, ((0, bottom), (0, right), (0, 0))),
        constant_values=facts['pad_value'],
    )
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])


def detect(session, facts: dict, picture: np.ndarray) -> tuple:
    """Find faces in a picture (h, w, 3) of uint8, BGR.

    Returns:
        tuple: ``dets`` (n, 5), x1, y1, x2, y2 in pixels and the score, best
        first; ``labels`` (n,); ``keypoints`` (n, 5, 2), x, y of eyes, nose
        and corners of the mouth.
    """
    found = session.run(OUTPUTS, {'input': prepare(picture, facts)})
    dets, labels, keypoints = (each[0] for each in found)
    height, width = picture.shape[:2]
    size = new_size(width, height, **facts['resize'])
    scale = np.float32([width / size[0], height / size[1]])
    dets[:, :4] *= np.tile(scale, 2)
    # The network has clipped them to the padded picture.
    dets[:, :4] = dets[:, :4].clip(0, [width, height, width, height])
    return dets, labels, keypoints * scale


def draw(picture: np.ndarray, dets, keypoints) -> np.ndarray:
    """Draw boxes, scores and landmarks into a copy of a picture."""
    picture = picture.copy()
    for (*box, score), points in zip(dets, keypoints):
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(picture, (x1, y1), (x2, y2), (0, 255, 0), 1)
        cv2.putText(
            *(picture, f'{score:.2f}', (x1, y1 - 2)),
            *(cv2.FONT_HERSHEY_SIMPLEX, 0.3, (0, 255, 0)),
        )
        for x, y in points:
            centre = round(float(x)), round(float(y))
            cv2.circle(picture, centre, 1, (0, 0, 255), -1)
    return picture


def main() -> None:
    """Detect and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model', help='the .onnx file')
    parser.add_argument('picture')
    parser.add_argument('out', help='where the drawing goes')
    parser.add_argument('--score-thr', type=float, default=0.5)
    args = parser.parse_args()
    picture = cv2.imread(args.picture)
    if picture is None:
        parser.error(f'{args.picture} is no picture that OpenCV reads')
    if not cv2.haveImageWriter(args.out):
        parser.error(
            f'{args.out}: OpenCV writes no such file; expected is an ending '
            'such as .png'
        )
    if os.path.exists(args.out) and os.path.samefile(args.out, args.picture):
        parser.error(f'{args.out} is the picture itself: give another file')
    folder = os.path.dirname(os.path.abspath(args.out))
    if not os.path.isdir(folder):
        parser.error(f'{args.out}: there is no folder {folder}')
    try:
        session, facts = load(args.model)
    except ValueError as error:
        parser.error(str(error))
    dets, _, keypoints = detect(session, facts, picture)
    kept = dets[:, 4] > args.score_thr
    for *box, score in dets[kept].tolist():
        print(f'{score:.3f}: ' + ', '.join(f'{v:.1f}' for v in box))
    if not cv2.imwrite(args.out, draw(picture, dets[kept], keypoints[kept])):
        parser.error(f'{args.out} can not be written')


if __name__ == '__main__':
    main()
