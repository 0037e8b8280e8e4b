"""Check an unzipped WIDER Face: annotation, landmark labels and pictures.

    python tools/check_wider_face.py data/WIDERFace --decode

ROOT has WIDER_train/images, WIDER_val/images, WIDER_test/images and
wider_face_split, as the official archives are unzipped, and may have landmark
label files as {split}/label*.txt or FOLDER/{split}/label*.txt, such as
retinaface_gt_v1.1/train/label.txt.

Prints counts per split, and everything that is broken: each line of an
annotation or label file that is not as expected, with file and line, listed
pictures that are not there and, with --decode, pictures that are truncated or
no pictures. The exit code is 1 if anything is broken, else 0. Pictures that
are not listed are told, but nobody reads them: they break nothing. A split of
which nothing is there is told, too; name the splits that you have, with
--splits, and its absence is an error.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

import numpy as np
from tqdm import tqdm

from polynl_mm.faces.files import (
    ATTRIBUTES,
    decode_picture,
    is_picture,
    match_landmarks,
    read_bbx_gt,
    read_file_list,
    read_landmark_labels,
)

SPLITS = ('train', 'val', 'test')
COLUMNS = (
    'split',
    'images',
    'faces',
    'invalid',
    'degenerate',
    'with landmarks',
    'images without face',
)


def annotation_of(root: Path, split: str) -> Path:
    """Where the release has the annotation, or the list, of a split."""
    name = 'test_filelist' if split == 'test' else f'{split}_bbx_gt'
    return root / 'wider_face_split' / f'wider_face_{name}.txt'


def check_annotation(root: Path, split: str, broken: list) -> tuple:
    """Read annotation and label files of a split.

    Returns:
        tuple: Names of its pictures, and a row of the table for each label
        file, or one if there is none.
    """
    file = annotation_of(root, split)
    if not file.is_file():
        broken.append(f'{file}: not there')
        return [], []
    if split == 'test':
        names = read_file_list(file, broken)
        return names, [(split, len(names), *'-----')]
    images = read_bbx_gt(file, broken)
    faces = np.concatenate([np.zeros((0, 10), int), *images.values()])
    counts = (
        len(images),
        len(faces),
        int((faces[:, 4 + ATTRIBUTES.index('invalid')] != 0).sum()),
        int((faces[:, 2:4] <= 0).any(1).sum()),
    )
    empty = sum(not len(rows) for rows in images.values())
    rows = []
    for labels_file in label_files(root, split):
        labels = read_landmark_labels(
            labels_file, broken, allow_degenerate=True
        )
        matched = match_landmarks(images, labels, file, labels_file, broken)
        known = sum(
            int((points[..., 2] > 0).any(1).sum())
            for points in matched.values()
        )
        name = labels_file.relative_to(root).as_posix()
        rows.append((split, *counts, f'{known} ({name})', empty))
    return list(images), rows or [(split, *counts, '-', empty)]


def label_files(root: Path, split: str) -> list:
    """Landmark label files of a split."""
    patterns = (f'{split}/label*.txt', f'*/{split}/label*.txt')
    return sorted({file for p in patterns for file in root.glob(p)})


def check_pictures(folder: Path, names: list, decode: bool, broken: list):
    """Compare the pictures of a folder with a list of them.

    Returns:
        list[str]: Those that are not listed.
    """
    if not folder.is_dir():
        broken.append(f'{folder}: not there')
        return []
    there = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob('*')
        if file.is_file()
    }
    broken += [f'{folder / n}: not there' for n in names if n not in there]
    if decode:
        files = [folder / name for name in names if name in there]
        broken += [error for error in map_progress(unreadable, files) if error]
    return sorted(n for n in there.difference(names) if is_picture(n))


def unreadable(file: Path):
    """What is wrong with a picture, or None."""
    try:
        decode_picture(file.read_bytes(), file, decoded)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def decoded(content: bytes):
    """Give the pixels of a picture as training does, or None."""
    # Only --decode needs it.
    import cv2

    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def map_progress(function, items: list):
    """Call a function in threads, with a progress bar on a terminal."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = threads.map(function, items)
        # None is quiet where stderr is no terminal.
        yield from tqdm(
            results,
            total=len(items),
            unit='picture',
            leave=False,
            disable=None,
        )


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('root', type=Path, metavar='ROOT')
    parser.add_argument(
        '--splits',
        nargs='+',
        choices=SPLITS,
        help='what must be there (default: what there is anything of)',
    )
    parser.add_argument(
        '--decode', action='store_true', help='read every picture, too'
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Check what the command line asks for; 1 if anything is broken."""
    args = parse_args(argv)
    table, broken, told = [COLUMNS], [], []
    for split in SPLITS:
        folder = args.root / f'WIDER_{split}' / 'images'
        file = annotation_of(args.root, split)
        if args.splits and split not in args.splits:
            continue
        if not (args.splits or folder.exists() or file.exists()):
            told.append(f'{split}: nothing of it is there, not checked')
            continue
        names, rows = check_annotation(args.root, split, broken)
        table += rows
        extra = check_pictures(folder, names, args.decode, broken)
        told += [f'{folder / name}: not listed in {file}' for name in extra]
    if len(table) == 1 and not broken:
        broken.append(f'{args.root}: nothing of WIDER Face is there')
    widths = [max(len(str(row[i])) for row in table) for i in range(7)]
    for row in table:
        print('  '.join(str(v).ljust(w) for v, w in zip(row, widths)).strip())
    for message in told:
        print(f'note: {message}')
    for message in broken:
        print(f'broken: {message}')
    print(f'{len(broken)} broken' if broken else 'nothing is broken')
    return int(bool(broken))


if __name__ == '__main__':
    sys.exit(main())
