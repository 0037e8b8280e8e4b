"""Make a small data set of real pixels in the layout of a real data set.

    python tools/make_mini_data.py wider_face --out data/mini_wider --seed 0
    python tools/make_mini_data.py coco --out data/mini_coco --seed 0
    python tools/make_mini_data.py cityscapes --out data/mini_cityscapes
    python tools/make_mini_data.py digits --out data/mini_digits --seed 0
    python tools/make_mini_data.py lfw_patches --out data/mini_lfw --seed 0

Everything comes from files that installed packages ship, so nothing is
downloaded: 100 face and 100 other patches of Labeled Faces in the Wild
(``lfw_subset.npy`` in scikit-image, 25 x 25 pixels, grey), 1797 handwritten
digits (``digits.csv.gz`` in scikit-learn, 8 x 8 pixels, grey) and photographs
of scikit-image and scikit-learn. Faces or digits are blended into crops of
the photographs; the last two data sets are the digits and the patches
themselves, in a folder for each class. What is trained on is never validated
on: patches and digits are dealt out to one split or the other by their index,
and every photograph is cut into a left part for train and a right part for
val. (Pictures are dealt, not persons: several may be of one face or by one
hand.)

The same settings with the same library versions give the same bytes. The
data set is built in a temporary folder beside ``--out`` and renamed when it
is complete; ``mini_data.json`` in it records the settings. A data set with
the same settings is left alone, any other non-empty folder is refused.
"""

from tqdm import tqdm

# Raise it with every change that alters the output.
REVISION = 2
SPLITS = ('train', 'val')


class UserError(Exception):
    """What the user can put right; shown as one line."""


def numbered(count: int, split: str):
    """Give the numbers of the pictures of a split, with a progress bar."""
    # None is quiet where stderr is no terminal.
    return tqdm(range(count), split, unit='picture', leave=False, disable=None)
