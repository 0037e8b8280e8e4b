"""Which class a picture is of, from the files of ImageNet."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from polynl_mm.limits import MB, call_in_child

_NAMED = 'a picture and its class from 0, as "ILSVRC2012_val_00000001.JPEG 65"'
# Longer ones could be no index, and Python refuses to read very long ones.
_INTEGER = re.compile('[0-9]{1,10}')


class Label(NamedTuple):
    """A line of a label file: the class counts from 0."""

    picture: str
    label: int
    line: int


def read_labels(
    path: str | os.PathLike,
    classes: Sequence[str],
    pictures: Sequence[str],
    meta: str | os.PathLike,
) -> list[Label]:
    """Read a label file, whose first line tells which of two it is.

    - ``name index`` in each line, as ``meta/val.txt`` of many toolboxes: the
      index of the class among the sorted folder names, from 0.
    - ``ILSVRC2012_validation_ground_truth.txt`` of the official development
      kit: an ILSVRC2012_ID in each line, of the pictures sorted by their
      names, whatever folders they are in.

    Args:
        path: The file.
        classes: Names of the class folders (WordNet ids), in their order.
        pictures: Paths in the picture folder, for the second form.
        meta: ``meta.mat`` of the development kit, for the second form.

    Raises:
        FileNotFoundError: ``meta`` is needed and not there.
        ValueError: A line is malformed, of a class beyond ``classes``, or of
            a picture that was before; there are not as many lines as
            pictures; ``meta`` can not be read.
    """
    # utf-8-sig and 'replace': a byte order mark is dropped, and a file that
    # is no text is reported by its first line.
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        lines = [
            (number, line.strip())
            for number, line in enumerate(file, 1)
            if line.strip()
        ]
    if not lines:
        raise ValueError(f'{path}: empty, expected {_NAMED} in each line')
    if _INTEGER.fullmatch(lines[0][1]):
        return _devkit_labels(path, lines, classes, pictures, meta)
    labels, seen = [], {}
    for number, line in lines:
        *name, index = line.rsplit(None, 1)
        name = ''.join(name)
        if not (name and _INTEGER.fullmatch(index)) or '\ufffd' in line:
            raise _broken(path, number, line, _NAMED)
        if int(index) >= len(classes):
            raise _broken(
                *(path, number, line),
                f'a class from 0 to {len(classes) - 1}, as there are '
                f'{len(classes)} class folders',
            )
        if name in seen:
            raise ValueError(
                f'{path}, line {number}: {name} was in line {seen[name]} '
                'already: a picture must have one line'
            )
        seen[name] = number
        labels.append(Label(name, int(index), number))
    return labels


def _devkit_labels(path, lines, classes, pictures, meta) -> list[Label]:
    if len(lines) != len(pictures):
        raise ValueError(
            f'{path}: {len(lines)} labels, expected one for each of the '
            f'{len(pictures)} pictures'
        )
    synsets, index = read_synsets(meta), {k: i for i, k in enumerate(classes)}
    labels = []
    pictures = sorted(pictures, key=os.path.basename)
    for (number, line), picture in zip(lines, pictures):
        synset = synsets.get(int(line)) if _INTEGER.fullmatch(line) else None
        if synset is None:
            raise _broken(
                *(path, number, line),
                f'one of the {len(synsets)} ILSVRC2012_IDs of {meta}',
            )
        if synset not in index:
            raise ValueError(
                f'{path}, line {number}: {line} is {synset} in {meta}, of '
                f'which there is no folder among the {len(classes)} classes'
            )
        labels.append(Label(picture, index[synset], number))
    return labels


def _broken(path, number: int, line: str, expected: str) -> ValueError:
    return ValueError(
        f'{path}, line {number}: got {line[:80]!r}, expected {expected}'
    )


def read_synsets(path: str | os.PathLike) -> dict[int, str]:
    """Give the WordNet id of every ILSVRC2012_ID that is a class.

    Args:
        path: ``meta.mat`` of the development kit; it holds groups of
            classes, too, which are left out.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It can not be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'{path}: not there, expected beside the labels, as in the '
            'official development kit (or give a meta/val.txt)'
        )
    # Here, so that no child imports it anew.
    import scipy.io  # noqa: F401

    try:
        return call_in_child(_read_synsets, path, memory=256 * MB, seconds=60)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def _read_synsets(path) -> dict[int, str]:
    from scipy.io import loadmat

    try:
        synsets = loadmat(path, squeeze_me=True)['synsets'].ravel()
        return {
            int(each['ILSVRC2012_ID']): str(each['WNID'])
            for each in synsets
            if int(each['num_children']) == 0
        }
    except MemoryError:
        raise
    except Exception as error:  # scipy raises all kinds on a damaged file
        raise ValueError(
            'expected a MATLAB 5 file with synsets, and of each its '
            f'ILSVRC2012_ID, WNID and num_children ({error!r})'
        ) from error
