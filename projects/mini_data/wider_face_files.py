"""Annotation files of WIDER Face, to the byte as the releases have them."""

from __future__ import annotations

import io
from dataclasses import astuple
from pathlib import Path

import numpy as np
from scipy.io import savemat

# Least height in pixels of the faces that a setting counts. The real
# pictures are 1024 pixels wide and the settings start at about 50, 30 and 10
# pixels there; these pictures are 256 wide and their faces are relatively
# larger. A face that is flagged invalid is in no setting.
WIDER_SETTINGS = {'easy': 36, 'medium': 22, 'hard': 10}
WIDER_ATTRIBUTES = (
    'blur',
    'expression',
    'illumination',
    'invalid',
    'occlusion',
    'pose',
)


def write_bbx_gt(file: Path, events: dict) -> None:
    """Write the text annotation: events → stems → faces."""
    lines = []
    for event, stems in events.items():
        for stem, faces in stems.items():
            lines += [f'{event}/{stem}.jpg', str(len(faces))]
            # The official files follow a count of 0 with a line of zeros,
            # and end every face in a blank.
            rows = [astuple(face)[:10] for face in faces] or [(0,) * 10]
            lines += [''.join(f'{value} ' for value in row) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(f'{line}\n' for line in lines), newline='\n')


def write_labels(file: Path, events: dict, with_landmarks: bool) -> None:
    """Write RetinaFace's label file: events → stems → faces.

    A face is x y w h, and with landmarks five times x y flag, all of them -1
    where they are not known, and the quality of the picture of the face,
    which falls with its blur.
    """
    lines = []
    for event, stems in events.items():
        for stem, faces in stems.items():
            lines.append(f'# {event}/{stem}.jpg')
            for face in faces:
                words = [str(v) for v in (face.x, face.y, face.w, face.h)]
                if with_landmarks:
                    for x, y, flag in face.landmarks or ((-1, -1, -1),) * 5:
                        words += [f'{x:.3f}', f'{y:.3f}', f'{flag:.1f}']
                    words.append(f'{1 - 0.4 * face.blur:.1f}')
                lines.append(' '.join(words))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(f'{line}\n' for line in lines), newline='\n')


def write_wider_mats(folder: Path, events: dict) -> None:
    """Write ``wider_face_val.mat`` and one file per setting.

    Keys, nesting and dtypes are those of the official evaluation: cell
    arrays by event and by picture, boxes int32, attributes uint8, indices
    from 1 as uint8, or uint16 where they need it. A picture without a face
    has one box of zeros.
    """
    by_event = [list(stems.values()) for stems in events.values()]

    def per_picture(make) -> np.ndarray:
        return cells([cells([make(f) for f in fs]) for fs in by_event])

    def column(field: str):
        return lambda faces: np.array(
            [[getattr(face, field)] for face in faces] or [[0]], np.uint8
        )

    common = {
        'event_list': cells(list(events)),
        'file_list': cells([cells(list(s)) for s in events.values()]),
        'face_bbx_list': per_picture(
            lambda faces: np.array(
                [(f.x, f.y, f.w, f.h) for f in faces] or [(0,) * 4], np.int32
            )
        ),
    }
    for attribute in WIDER_ATTRIBUTES:
        common[f'{attribute}_label_list'] = per_picture(column(attribute))
    folder.mkdir(parents=True, exist_ok=True)
    write_mat(folder / 'wider_face_val.mat', common)
    for setting, least in WIDER_SETTINGS.items():
        kept = per_picture(lambda faces, least=least: kept_of(faces, least))
        write_mat(
            folder / f'wider_{setting}_val.mat', {**common, 'gt_list': kept}
        )


def kept_of(faces: list, least: int) -> np.ndarray:
    """Indices from 1 of the faces that a setting counts, (k, 1)."""
    kept = [
        [i]
        for i, face in enumerate(faces, 1)
        if not face.invalid and face.h >= least
    ]
    dtype = np.uint16 if len(faces) > 255 else np.uint8
    return np.array(kept, dtype).reshape(-1, 1)


def cells(items: list) -> np.ndarray:
    """Column of MATLAB cells, (n, 1) object."""
    column = np.empty((len(items), 1), object)
    column[:, 0] = items
    return column


def write_mat(file: Path, variables: dict) -> None:
    """Write a MATLAB 5 file whose header carries no date."""
    buffer = io.BytesIO()
    savemat(buffer, dict(sorted(variables.items())), do_compression=True)
    data = bytearray(buffer.getvalue())
    data[:116] = b'MATLAB 5.0 MAT-file, mini WIDER Face'.ljust(116)
    file.write_bytes(data)
