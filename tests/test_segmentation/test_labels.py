"""Labels that can't be right, and those that may be."""

import cv2
import numpy as np
import pytest

pytest.importorskip('mmseg')

from PIL import Image

from polynl_mm.segmentation.labels import check_seg_data

CLASSES = ('wall', 'door', 'lamp')
HALVES = np.repeat([[0] * 8, [1] * 8], 3, 0).astype(np.uint8)


@pytest.fixture
def check(tmp_path):
    """Write labels, and check them; give what was said."""

    def write(labels, folder, suffix, **kwargs):
        for name in ('img', 'ann'):
            (folder / name).mkdir(exist_ok=True, parents=True)
        for number, label in enumerate(labels):
            image = np.zeros((*label.shape, 3), np.uint8)
            path = folder / f'img/{number}{suffix}'
            Image.fromarray(image).save(path, **kwargs)
            cv2.imwrite(str(folder / f'ann/{number}.png'), label)
        return dict(
            type='BaseSegDataset',
            data_root=str(folder),
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            img_suffix=suffix,
            metainfo=dict(classes=CLASSES),
            pipeline=[dict(type='LoadAnnotations')],
        )

    def run(
        *labels,
        part=slice(None),
        training=True,
        beside=(),
        suffix='.png',
        **kwargs,
    ):
        datasets = [write(labels, tmp_path, suffix, **kwargs)]
        if beside:
            datasets += [write(beside, tmp_path / 'beside', '.png')]
        said = []
        check_seg_data(datasets, said.append, part, training)
        return said

    return run


def test_masks_of_0_and_255_teach_nothing(check):
    with pytest.raises(ValueError) as caught:
        check(HALVES * 255, HALVES * 255)
    message = str(caught.value)
    assert 'the 2 labels in ' in message
    assert '0 (wall) alone, beside the ignored 255' in message
    with pytest.raises(ValueError, match='of 3 classes, none alone'):
        check(HALVES * 0 + 255, HALVES * 0 + 255)


def test_one_class_alone_is_told_where_it_may_be_meant(check):
    """To test with, or in one of several data sets to train with."""
    background = HALVES * 0
    (said,) = check(background, background * 255, training=False)
    assert said.startswith('warning: none of the 2 labels read of 2 in ')
    assert said.endswith('holds class 1 (door), 2 (lamp)')
    first, second = check(background, beside=[HALVES])
    assert first.endswith('holds class 1 (door), 2 (lamp)')
    assert second.endswith('holds class 2 (lamp)')
    # Where another process's part has it.
    check(background, beside=[HALVES], part=slice(1, None, 2))
    with pytest.raises(
        ValueError, match=r'the 3 labels in \S+/ann, \S+/beside/ann'
    ):
        check(background, beside=[background])


def test_a_part_with_one_class_reads_on(check):
    """Another process's labels hold the second one."""
    labels = [HALVES * 0, HALVES, HALVES * 0]
    (said,) = check(*labels, part=slice(0, None, 2))
    assert said.startswith('warning: none of the 2 labels read of 3 in ')
    with pytest.raises(ValueError, match='the 3 labels'):
        check(*(label * 0 for label in labels), part=slice(1, None, 3))


def test_a_class_that_no_label_holds_is_told(check):
    (said,) = check(HALVES, HALVES)
    assert 'none of the 2 labels read of 2 in ' in said
    assert said.endswith('holds class 2 (lamp)')
    assert check(HALVES, HALVES * 2) == []


def test_ids_that_a_byte_does_not_hold(check):
    """mmseg takes 256 for 0 and 257 for 1."""
    wide = HALVES.astype(np.uint16)
    assert len(check(wide)) == 1
    with pytest.raises(ValueError, match=r'0.png has the ids \[256, 257\]'):
        check(wide + 256)
    # What it takes for 255 is ignored.
    wide[:, 4:] = 65535
    wide[:, 7:] = 511
    assert len(check(wide)) == 1
    wide[:, 7:] = 65534
    with pytest.raises(ValueError, match=r'has the ids \[65534\], expected'):
        check(wide)


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp'])
def test_a_picture_that_was_turned(check, tmp_path, suffix):
    """The size is that which OpenCV gives, whatever the format."""
    turned = Image.Exif()
    turned[0x0112] = 6
    label = HALVES
    try:
        check(label, suffix=suffix, exif=turned)
        turns = False
    except ValueError as error:
        assert '8 x 6 pixels, but its image' in str(error)
        assert str(error).endswith('is 6 x 8')
        turns = True
    shape = cv2.imread(str(tmp_path / f'img/0{suffix}')).shape[:2]
    assert shape == (label.shape[::-1] if turns else label.shape)
    assert turns or suffix != '.jpg'
