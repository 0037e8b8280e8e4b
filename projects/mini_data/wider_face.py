"""Mini WIDER Face: faces on photographs, and what else looks like them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from . import SPLITS, numbered
from .lfw import COVERED, EXAGGERATED, load_patches, patch_landmarks
from .pictures import background, free_place, stamp, write_picture
from .sources import PHOTOS, load_photo
from .wider_face_files import write_bbx_gt, write_labels, write_wider_mats


@dataclass(frozen=True)
class Face:
    """One line of ``wider_face_*_bbx_gt.txt``, the fields in its order.

    Behind them what the landmark label file has: five times (x, y, flag),
    flag 0 for visible and 1 for occluded, or None where they are not known.
    """

    x: int
    y: int
    w: int
    h: int
    blur: int
    expression: int
    illumination: int
    invalid: int
    occlusion: int
    pose: int
    landmarks: tuple | None = None


WIDER_WIDTH = 256
WIDER_HEIGHTS = (160, 192)
# One picture in so many has no face, beginning with the second.
WIDER_FACELESS_EVERY = 16
# Reflectance of skin in blue, green and red, relative to the mean.
SKIN = np.array((0.80, 0.96, 1.24), np.float32)


def wider_face_pixels(rng, patches, canvas, centre, size):
    """Choose a face and dress it for its place.

    Returns:
        tuple: (n, n, 3) float32 pixels and the attributes that come with
        them: blur, expression, illumination, the patch's own occlusion, and
        the landmarks, (5, 2) as shares of the patch's side, or None.
    """
    k = int(rng.integers(len(patches.faces)))
    face_id = int(patches.face_ids[k])
    grey = patches.faces[k]
    points = patch_landmarks(face_id)
    if points is not None:
        points = points / len(grey)
    if rng.random() < 0.5:
        grey = grey[:, ::-1]
        if points is not None:
            # What was right is left now.
            points = np.array((1, 0)) + points[[1, 0, 2, 4, 3]] * (-1, 1)
    grey = np.ascontiguousarray(grey)
    soft = float(rng.choice((0.0, 0.0, 0.0, 0.6, 0.9)))
    if soft:
        grey = cv2.GaussianBlur(grey, (0, 0), soft)
    pixels = tinted(rng, grey, look_around(canvas, centre, size))
    extreme = rng.random() < 0.06
    if extreme:
        pixels = pixels * (0.35 if rng.random() < 0.6 else 1.7)
    # Width of the blur in pixels of the picture; a patch of 25 pixels is
    # itself sharp to about half a pixel.
    spread = (0.5 + soft) * size / len(grey)
    blur = int(spread > 0.8) + int(spread > 1.5)
    return (
        np.clip(pixels, 0, 1),
        blur,
        int(face_id in EXAGGERATED),
        int(extreme),
        int(face_id in COVERED),
        points,
    )


def wider_distractor(rng, patches, photo, canvas, centre, size):
    """Pixels (n, n, 3) that are no face, to be stamped just like a face.

    Without them the soft oval alone would give a face away.
    """
    if rng.random() < 0.4:
        grey = patches.others[int(rng.integers(len(patches.others)))]
        return np.clip(
            tinted(rng, grey, look_around(canvas, centre, size)), 0, 1
        )
    n = int(rng.integers(24, 80))
    y = int(rng.integers(photo.shape[0] - n))
    x = int(rng.integers(photo.shape[1] - n))
    return photo[y : y + n, x : x + n].astype(np.float32) / 255


def wider_scene(rng, photo, patches, with_faces):
    """Compose one picture.

    Returns:
        tuple: (H, W, 3) uint8 BGR and the list of its :class:`Face`.
    """
    height = int(rng.integers(WIDER_HEIGHTS[0], WIDER_HEIGHTS[1] + 1))
    width = WIDER_WIDTH
    canvas = background(rng, photo, height, width)
    wanted = ['other'] * int(rng.integers(1, 4))
    if with_faces:
        wanted += ['face'] * int(rng.integers(3, 9))
    stamps, looks = [], []
    for kind in rng.permutation(wanted):
        if kind == 'face' and rng.random() < 0.04:
            size = rng.uniform(6, 10)
        else:
            size = math.exp(rng.uniform(math.log(16), math.log(80)))
        tilted = rng.random() < 0.05
        roll = rng.uniform(0.65, 0.95) if tilted else abs(rng.normal(0, 0.12))
        roll = min(roll, 0.95) * (1 if rng.random() < 0.5 else -1)
        crowded = rng.random() < 0.15
        centre = free_place(rng, stamps, height, width, size, crowded)
        if centre is None:
            continue
        if kind == 'face':
            pixels, *look = wider_face_pixels(
                rng, patches, canvas, centre, size
            )
            look.append(int(abs(roll) > math.radians(30)))
        else:
            pixels = wider_distractor(
                rng, patches, photo, canvas, centre, size
            )
            look = None
        stamps.append(stamp(canvas, pixels, centre, size, roll))
        looks.append(look)
    canvas += rng.normal(0, rng.uniform(0.004, 0.012), canvas.shape)
    image = np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return image, wider_faces(stamps, looks, height, width)


def tinted(rng, grey, around) -> np.ndarray:
    """Give a grey patch (n, n) the light and the colour of its place.

    ``around`` are the pixels (h, w, 3) that it will cover. On a grey
    photograph it stays grey.
    """
    mean = around.reshape(-1, 3).mean(0) + 1e-3
    cast = mean / mean.mean()
    colourful = float(around.std(2).mean()) > 0.01
    share = rng.uniform(0.5, 0.9) if colourful else 0.0
    tint = (1 - share) * np.clip(cast, 0.6, 1.5) + share * SKIN
    level = grey.mean() + rng.uniform(0.1, 0.5) * (mean.mean() - grey.mean())
    gain = np.clip(level / (grey.mean() + 1e-3), 0.5, 1.6)
    return (grey * gain)[..., None] * tint.astype(np.float32)


def look_around(canvas, centre, size) -> np.ndarray:
    """Pixels of the canvas in the square around a centre, cut at its edge."""
    height, width = canvas.shape[:2]
    x = min(max(int(centre[0] - size / 2), 0), width - 2)
    y = min(max(int(centre[1] - size / 2), 0), height - 2)
    return canvas[y : y + max(int(size), 2), x : x + max(int(size), 2)]


def wider_faces(stamps, looks, height, width) -> list:
    """Labels of a scene, from what is really to be seen in the picture.

    A box is cut at the edge of the picture. Occlusion counts the part that
    later stamps cover or that lies outside: none up to 1 %, partial up to
    30 %, heavy above. Below half visible, or lower than 9 pixels, a face
    is flagged invalid.
    """
    faces = []
    for i, (place, look) in enumerate(zip(stamps, looks)):
        if look is None:
            continue
        seen = place.opaque.copy()
        for later in stamps[i + 1 :]:
            seen &= ~later.opaque
        hidden = 1 - seen.sum() / place.area
        x1, y1, x2, y2 = (round(float(c)) for c in place.box)
        x1, y1 = max(x1, 0), max(y1, 0)
        x2, y2 = min(x2, width), min(y2, height)
        blur, expression, illumination, covered, points, pose = look
        invalid = int(hidden > 0.5 or y2 - y1 < 9)
        faces.append(
            Face(
                x=x1,
                y=y1,
                w=x2 - x1,
                h=y2 - y1,
                blur=blur,
                expression=expression,
                illumination=illumination,
                invalid=invalid,
                occlusion=max(covered, int(hidden > 0.01)) + int(hidden > 0.3),
                pose=pose,
                landmarks=None
                if invalid or points is None
                else wider_landmarks(place, stamps[i + 1 :], points),
            )
        )
    return faces


def wider_landmarks(place, later, points) -> tuple:
    """Landmarks on the canvas: five times (x, y, flag).

    The flag is 1, occluded, for one that a later stamp covers or that lies
    outside the picture.
    """
    height, width = place.opaque.shape
    landmarks = []
    for x, y in place.to_canvas(points).tolist():
        col, row = math.floor(x), math.floor(y)
        outside = not (0 <= col < width and 0 <= row < height)
        hidden = outside or any(s.opaque[row, col] for s in later)
        landmarks.append((x, y, int(hidden)))
    return tuple(landmarks)


def wider_face(out: Path, seed: int, sizes: dict) -> None:
    """Write mini WIDER Face.

    ``WIDER_{split}/images/<event>/<name>.jpg`` and
    ``wider_face_split/wider_face_{split}_bbx_gt.txt`` as in the official
    release, an event being a photograph; ``ground_truth/*.mat`` as in the
    official evaluation tools, made for val;
    ``retinaface_gt_v1.1/{split}/label.txt`` as RetinaFace's labels, landmarks
    for train and boxes alone for val. At least one picture of each split has
    no face.
    """
    for number, split in enumerate(SPLITS):
        patches = load_patches(split, seed)
        photos = {name: load_photo(name, split) for name in PHOTOS}
        events = {}
        for index in numbered(sizes[split], split):
            # An own generator per picture: more pictures change none.
            rng = np.random.default_rng([seed, 1 + number, index])
            name = list(PHOTOS)[int(rng.integers(len(PHOTOS)))]
            with_faces = index % WIDER_FACELESS_EVERY != 1
            image, faces = wider_scene(rng, photos[name], patches, with_faces)
            event = f'{list(PHOTOS).index(name)}--{name}'
            stem = f'{event.replace("--", "_")}_mini_{split}_{index}'
            write_picture(
                out / f'WIDER_{split}' / 'images' / event / f'{stem}.jpg',
                image,
            )
            events.setdefault(event, {})[stem] = faces
        events = dict(sorted(events.items()))
        write_bbx_gt(
            out / 'wider_face_split' / f'wider_face_{split}_bbx_gt.txt',
            events,
        )
        write_labels(
            out / 'retinaface_gt_v1.1' / split / 'label.txt',
            events,
            with_landmarks=split == 'train',
        )
        if split == 'val':
            write_wider_mats(out / 'ground_truth', events)
