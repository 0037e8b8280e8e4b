"""Patches of Labeled Faces in the Wild, what is known of each, landmarks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import UserError
from .sources import deal, package_file

# Looked at one by one: faces with a wide open mouth or a grimace, faces
# with a hand or a microphone over them, and parts of faces among the others.
EXAGGERATED = frozenset((0, 16, 19, 29, 45, 51, 53, 59, 79, 91, 96))
COVERED = frozenset((16, 18, 71))
NOT_QUITE_OTHER = frozenset((20, 25, 30, 42, 54, 93, 96))

# Left eye, right eye, nose, left and right corner of the mouth, left and
# right as the viewer sees them, in pixels of a 25 x 25 patch, pixel i
# covering [i, i + 1). LFW is roughly aligned: the template is the mean of the
# patches below.
LANDMARK_TEMPLATE = (
    (6.3, 8.3),
    (15.1, 8.1),
    (10.7, 13.4),
    (7.6, 18.0),
    (14.7, 17.8),
)
# Tenths of a pixel, x and y of each point, that the template is moved by for
# a patch. Put in by eye on contact sheets of 12 pixels per patch pixel,
# contrast stretched, then looked at again with the points drawn in. Meant to
# be good to one patch pixel, 4 % of the side; a second opinion was not taken.
# Patches that are not here were too dark, covered or turned to tell, or not
# looked at for this (72 to 99): their faces get no landmarks.
LANDMARK_CORRECTIONS = {
    0: (23, -2, 12, 0, 11, 6, 16, 13, 6, 8),
    1: (-20, -1, -13, 1, -37, 2, -17, 0, -24, 2),
    2: (-7, 0, -23, -9, -14, 6, -8, 6, 6, -6),
    3: (-4, 2, 12, 1, 4, 4, -2, 3, 6, 5),
    6: (-17, 7, 5, 11, -4, 14, -11, 14, -7, 16),
    7: (0, 2, 0, 3, 4, 12, 9, 15, -1, 16),
    8: (6, 5, 14, 8, 6, 4, -9, -8, 13, -3),
    14: (-18, 6, -16, 1, -15, 2, -5, 6, -10, 5),
    15: (13, -3, 8, -3, 14, 2, 14, -11, 20, -13),
    17: (23, 1, 2, -1, 17, 1, 17, -15, 15, -15),
    19: (-2, -8, -5, -6, 2, -20, 2, -13, 1, -14),
    20: (-21, 2, -2, 0, -12, -6, -10, -6, -3, -4),
    24: (16, -1, 3, -1, 6, 2, -2, 3, 2, -3),
    25: (14, -3, 18, 1, 20, 3, 4, -7, 21, -2),
    26: (-13, -1, -7, -3, -2, -1, -6, 0, 1, -2),
    29: (14, 2, 13, 1, 18, 2, 18, 19, 5, 20),
    31: (-13, 8, -14, -1, -7, 3, -1, 2, 10, -10),
    32: (-11, 2, -13, 2, -11, 6, 5, 3, -7, 4),
    33: (-3, 4, -11, 7, -14, 10, -8, 6, -7, 7),
    35: (-18, -4, -8, 1, -15, -3, -23, 2, -22, 8),
    36: (10, -1, 6, 6, 12, 4, 10, 4, 0, 4),
    37: (11, 17, 2, 9, 17, -11, -2, -8, 23, -18),
    38: (22, -5, 19, 0, 22, -2, 16, -14, 23, -6),
    40: (-6, 3, -13, -1, -5, 6, 2, 14, -24, 16),
    41: (11, 1, -3, 0, 3, 2, -1, -4, 1, -4),
    42: (-2, -1, -8, -13, -14, -8, -6, 2, -6, -4),
    48: (6, -1, -7, 1, -6, -11, 4, -5, -11, -2),
    49: (4, -1, 5, -6, -1, 2, 2, 12, -13, 12),
    50: (-4, 1, 6, 2, 4, -4, -12, -15, 2, -9),
    51: (-5, 0, -10, -7, -7, -6, -1, -2, -16, -4),
    52: (-11, 4, 5, 2, -9, -7, -15, -7, 17, -19),
    53: (14, -10, 16, -1, 23, -18, 14, -12, 11, -13),
    55: (-1, -11, 5, -9, 4, 1, -1, 0, -6, 4),
    56: (2, 1, -8, 3, -9, 0, -13, 1, -9, 3),
    58: (32, 1, 27, 3, 25, 2, 27, 3, 20, 5),
    60: (-1, 2, 4, 3, -4, 4, 2, 8, -1, 9),
    61: (-6, 5, 1, 3, 3, -2, 2, 3, -4, 0),
    62: (-5, 1, -3, 1, -7, 4, -2, 4, -15, 6),
    63: (-25, -5, -15, -7, -35, 4, -9, -6, -14, -4),
    64: (-4, 1, -3, 1, -1, -16, 2, -11, -1, -11),
    66: (2, 0, 6, 2, -4, 6, 2, 0, -13, 1),
}


def patch_landmarks(face_id: int) -> np.ndarray | None:
    """Landmarks of an LFW patch, (5, 2) in patch pixels, None if unknown."""
    if face_id not in LANDMARK_CORRECTIONS:
        return None
    moved = np.array(LANDMARK_CORRECTIONS[face_id]).reshape(5, 2) / 10
    return np.array(LANDMARK_TEMPLATE) + moved


@dataclass(frozen=True)
class Patches:
    """LFW patches of one split, (n, 25, 25) float32 in [0, 1].

    ``face_ids`` holds the index in ``lfw_subset.npy`` of every face.
    """

    faces: np.ndarray
    face_ids: np.ndarray
    others: np.ndarray


def patch_pool() -> np.ndarray:
    """Read all patches, (200, 25, 25) float32 in [0, 1], faces first."""
    file = package_file('skimage', 'data/lfw_subset.npy')
    pool = np.load(file).astype(np.float32)
    if pool.shape != (200, 25, 25):
        raise UserError(
            f'{file}: shape {pool.shape}, (200, 25, 25) was expected'
        )
    return pool


def load_patches(split: str, seed: int) -> Patches:
    """Read the LFW patches and keep those that the seed deals to a split."""
    pool = patch_pool()
    faces, others = pool[:100], pool[100:]
    # A flat patch is no temptation for a detector, and a black corner is
    # what lies outside the photograph that the patch was cut from.
    tempting = [
        i
        for i in range(100)
        if i not in NOT_QUITE_OTHER
        and others[i].std() >= 0.05
        and (others[i] < 0.02).mean() < 0.05
    ]
    rng = np.random.default_rng([seed, 0])
    face_ids = rng.permutation(100)
    other_ids = rng.permutation(tempting)
    ids = deal(face_ids, split)
    return Patches(faces[ids], ids, others[deal(other_ids, split)])
