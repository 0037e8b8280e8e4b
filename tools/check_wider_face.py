"""Check an unzipped WIDER Face: annotation, landmark labels and pictures.

    python tools/check_wider_face.py data/WIDERFace --decode

ROOT has WIDER_train/images, WIDER_val/images, WIDER_test/images and
wider_face_split, as the official archives are unzipped, and may have landmark
label files as {split}/label*.txt or FOLDER/{split}/label*.txt, such as
retinaface_gt_v1.1/train/label.txt.

Prints counts per split, and everything that is broken: each line of an
annotation or label file that is not as expected, with file and line,
landmarks far from their faces, listed pictures that are not there and, with
--decode, pictures that are truncated or no pictures, boxes outside their
pictures, and boxes that fit as x1 y1 x2 y2 rather than as x y w h. The exit
code is 1 if anything is broken, else 0. A few faces with landmarks or boxes
elsewhere are told, and more than one in a hundred break a file. Pictures that
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

from polynl_mm import stack

stack.end_in_a_line()

import numpy as np
from tqdm import tqdm

from polynl_mm.faces.files import (
    ATTRIBUTES,
    is_picture,
    match_landmarks,
    read_bbx_gt,
    read_file_list,
    read_landmark_labels,
)
from polynl_mm.limits import decode_picture

SPLITS = ('train', 'val', 'test')
# Share of faces at a strange place up to which they are slips of annotators.
SLIPS = 0.01
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


def check_annotation(
    root: Path, split: str, broken: list, told: list
) -> tuple:
    """Read annotation and label files of a split.

    Returns:
        tuple: Faces (n, 10) by the name of the picture, and a row of the
        table for each label file, or one if there is none.
    """
    file = annotation_of(root, split)
    if not file.is_file():
        broken.append(f'{file}: not there')
        return {}, []
    if split == 'test':
        names = read_file_list(file, broken)
        none = np.zeros((0, 4 + len(ATTRIBUTES)), int)
        return dict.fromkeys(names, none), [(split, len(names), *'-----')]
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
        points = np.concatenate([np.zeros((0, 5, 3)), *matched.values()])
        known = int((points[..., 2] > 0).any(1).sum())
        tell(
            labels_file,
            f'of {known} faces with landmarks have one far outside their box',
            far_landmarks(faces[:, :4], points),
            known,
            where(images, faces),
            told,
            broken,
        )
        name = labels_file.relative_to(root).as_posix()
        rows.append((split, *counts, f'{known} ({name})', empty))
    return images, rows or [(split, *counts, '-', empty)]


def where(images: dict, rows) -> list[str]:
    """Say of which picture each row, one per face, is, and what stands there.

    Args:
        images (dict): Faces by the name of the picture.
        rows (ndarray): All of them, in order.
    """
    names = [name for name, faces in images.items() for _ in faces]
    return [f'{name} {row[:4]}' for name, row in zip(names, rows.tolist())]


def tell(
    file: Path,
    what: str,
    strange,
    count: int,
    places: list[str],
    told: list,
    broken: list,
) -> None:
    """Report strange faces: as told where they are few, else as broken.

    Args:
        file (Path): Where they stand.
        what (str): What is strange about them.
        strange (ndarray): Bool, for each face.
        count (int): Of how many.
        places (list[str]): Where each face is.
        told, broken (list): Take the message.
    """
    number = int(strange.sum())
    if number:
        first = places[int(strange.argmax())]
        (broken if number > SLIPS * count else told).append(
            f'{file}: {number} {what}, first {first} (x y w h)'
        )


def far_landmarks(boxes, points):
    """Whether faces have a landmark that is their size or more outside.

    Shape: boxes (n, 4), x y w h; points (n, 5, 3); output (n,) bool.
    """
    low, size = boxes[:, None, :2], boxes[:, None, 2:]
    xy, there = points[..., :2], points[..., 2] > 0
    far = ((xy < low - size) | (xy > low + 2 * size)).any(2)
    return (far & there).any(1)


def check_boxes(
    file: Path, images: dict, sizes: dict, told: list, broken: list
) -> None:
    """Compare boxes with the sizes (height, width) of their pictures."""
    images = {name: images[name] for name in sizes if len(images[name])}
    if not images:
        return
    rows = np.concatenate(list(images.values()))
    ends = np.concatenate(
        [np.tile(sizes[n][::-1], (len(f), 1)) for n, f in images.items()]
    )
    whole = (rows[:, 2:4] > 0).all(1)
    low, second = rows[:, :2], rows[:, 2:4]

    def fit(high) -> int:
        # Annotators and rounding go a pixel too far.
        inside = (low >= -1) & (low < high) & (high <= ends + 1)
        return int((inside.all(1) & whole).sum())

    tell(
        file,
        f'of {whole.sum()} boxes are wholly outside their picture',
        whole & ((low >= ends) | (low + second <= 0)).any(1),
        int(whole.sum()),
        where(images, rows),
        told,
        broken,
    )
    if fit(second) > fit(low + second):
        broken.append(
            f'{file}: as x1 y1 x2 y2, {fit(second)} of {whole.sum()} boxes '
            f'are inside their pictures, as x y w h {fit(low + second)}: '
            'expected x y w h'
        )


def label_files(root: Path, split: str) -> list:
    """Landmark label files of a split."""
    patterns = (f'{split}/label*.txt', f'*/{split}/label*.txt')
    return sorted({file for p in patterns for file in root.glob(p)})


def check_pictures(folder: Path, names: list, decode: bool, broken: list):
    """Compare the pictures of a folder with a list of them.

    Returns:
        tuple[list[str], dict]: Those that are not listed, and sizes, height
        and width, of those that were decoded.
    """
    if not folder.is_dir():
        broken.append(f'{folder}: not there')
        return [], {}
    there = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob('*')
        if file.is_file()
    }
    broken += [f'{folder / n}: not there' for n in names if n not in there]
    sizes = {}
    if decode:
        listed = [name for name in names if name in there]
        files = [folder / name for name in listed]
        for name, size in zip(listed, map_progress(size_of, files)):
            if isinstance(size, str):
                broken.append(size)
            else:
                sizes[name] = size
    return sorted(n for n in there.difference(names) if is_picture(n)), sizes


def size_of(file: Path):
    """Height and width of a picture, or what is wrong with it."""
    try:
        image = decode_picture(file.read_bytes(), file, decoded)
    except (OSError, ValueError) as error:
        return str(error)
    return image.shape[:2]


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
        images, rows = check_annotation(args.root, split, broken, told)
        table += rows
        extra, sizes = check_pictures(
            folder, list(images), args.decode, broken
        )
        check_boxes(file, images, sizes, told, broken)
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
