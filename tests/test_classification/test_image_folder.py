"""Pictures in folders: samples, classes, and what is wrong by name."""

import shutil

import pytest

pytest.importorskip('mmcv')

from mmengine.config import ConfigDict  # noqa: E402
from mmengine.registry import DATASETS  # noqa: E402
from test_label_files import save_meta  # noqa: E402

from polynl_mm.classification.dataset import (  # noqa: E402
    check_classes,
    check_image_folders,
)


def settings(root, split='train', **kwargs):
    prefix = dict(img_path=split)
    return dict(
        type='polynl_mm.ImageFolder',
        data_root=str(root),
        data_prefix=prefix,
        **kwargs,
    )


def samples(root, *args, **kwargs):
    data = DATASETS.build(settings(root, *args, **kwargs))
    found = [data.get_data_info(i) for i in range(len(data))]
    return [
        (each['img_path'].rpartition('/')[2], each['gt_label'])
        for each in found
    ]


def error(root, *args, **kwargs):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        samples(root, *args, **kwargs)
    return str(caught.value)


def test_folders_are_the_classes(folders):
    # At any depth; hidden ones and other files are none.
    (folders / 'train/b/deeper').mkdir()
    (folders / 'train/b/b1.png').rename(folders / 'train/b/deeper/b1.PNG')
    for hidden in ('train/.hidden', 'train/a/.ipynb_checkpoints'):
        (folders / hidden).mkdir()
        shutil.copy(folders / 'train/a/a0.png', folders / hidden)
    (folders / 'train/a/notes.txt').write_text('none')
    data = DATASETS.build(settings(folders))
    assert data.metainfo['classes'] == ('a', 'b', 'c')
    assert samples(folders) == [
        *(('a0.png', 0), ('a1.png', 0), ('b0.png', 1), ('b1.PNG', 1)),
        *(('c0.png', 2), ('c1.png', 2)),
    ]


def test_classes_of_another_folder_keep_their_numbers(folders):
    """val lacks the first class."""
    for path in (folders / 'val/a').iterdir():
        path.unlink()
    (folders / 'val/a').rmdir()
    expected = [('b0.png', 1), ('b1.png', 1), ('b2.png', 1)]
    found = samples(folders, 'val', class_folder='train', test_mode=True)
    assert found[:3] == expected
    named = dict(classes=['a', 'b', 'c'])
    found = samples(folders, 'val', metainfo=named, test_mode=True)
    assert found[:3] == expected


def test_a_list_of_labels(flat):
    text = ''.join(f'v{i}.png {k}\n' for i, k in enumerate((2, 0, 1)))
    (flat / 'meta/val.txt').write_text(text)
    kwargs = dict(class_folder='train', ann_file='meta/val.txt')
    expected = [('v0.png', 2), ('v1.png', 0), ('v2.png', 1)]
    assert samples(flat, 'val', **kwargs) == expected


def test_labels_of_the_development_kit(flat):
    save_meta(flat / 'meta/meta.mat', ((1, 'c'), (2, 'a'), (3, 'b')))
    truth = flat / 'meta/ILSVRC2012_validation_ground_truth.txt'
    truth.write_text('1\n1\n2\n3\n3\n2\n1\n')
    kwargs = dict(class_folder='train', ann_file=f'meta/{truth.name}')
    labels = [label for _, label in samples(flat, 'val', **kwargs)]
    assert labels == [2, 2, 0, 1, 1, 0, 2]
    (flat / 'meta/meta.mat').rename(flat / 'other.mat')
    assert 'meta/meta.mat: not there' in error(flat, 'val', **kwargs)
    assert labels == [
        label for _, label in samples(flat, 'val', **kwargs,
                                      meta_file='other.mat')
    ]  # fmt: skip


def test_labels_of_the_development_kit_are_by_name(folders):
    """Where val was sorted into folders, whose order is another."""
    for old, new in (('a/a0', 'a/v2'), ('b/b0', 'b/v0'), ('c/c0', 'c/v1')):
        (folders / f'val/{old}.png').rename(folders / f'val/{new}.png')
    for rest in ('a/a1', 'b/b1', 'b/b2', 'c/c1'):
        (folders / f'val/{rest}.png').unlink()
    save_meta(folders / 'meta.mat', ((1, 'c'), (2, 'a'), (3, 'b')))
    (folders / 'truth.txt').write_text('3\n1\n2\n')
    kwargs = dict(class_folder='train', ann_file='truth.txt')
    assert sorted(samples(folders, 'val', **kwargs)) == [
        *(('v0.png', 1), ('v1.png', 2), ('v2.png', 0)),
    ]


def test_what_is_wrong_has_a_name(folders):
    (folders / 'val/d').mkdir()
    assert error(folders, 'val', class_folder='train', test_mode=True) == (
        f'{folders}/val/d: expected one of the 3 classes of {folders}/train'
    )
    (folders / 'train/d').mkdir()
    assert f'{folders}/train/d: a class without pictures' in error(folders)
    (folders / 'empty').mkdir()
    assert f'{folders}/empty: no class folders in it' in error(
        folders, 'empty'
    )
    assert f'{folders}/gone: not there' in error(folders, 'gone')
    (folders / 'val.txt').write_text('a0.png 0\n')
    assert (
        f'{folders}/val/a/a/a0.png: not there, expected by {folders}/val.txt, '
        'line 2; missing are 1 of 2 pictures'
    ) == error(folders, 'val/a', class_folder='train', ann_file=_two(folders))


def _two(folders):
    (folders / 'val.txt').write_text('a0.png 0\na/a0.png 1\n')
    return 'val.txt'


# ------------------------------------------------------- before the start


def test_files_that_are_no_pictures(folders):
    told = []
    check_image_folders([settings(folders)], told.append)
    assert told == []
    bad = folders / 'train/c/c1.png'
    bad.write_text('<html>not found</html>')
    with pytest.raises(ValueError) as caught:
        check_image_folders([settings(folders)], told.append)
    assert str(caught.value) == (
        f'{bad}: no picture, expected one that OpenCV reads, got 22 bytes'
    )
    # That is of another process's share.
    check_image_folders([settings(folders)], told.append, slice(0, None, 2))
    bad.write_bytes(b'')
    with pytest.raises(ValueError, match='c1.png: no picture, .* 0 bytes'):
        check_image_folders([settings(folders)], told.append)


def test_what_may_be_wrong_is_told(folders):
    (folders / 'val/a/Thumbs.db').write_text('')
    for path in (folders / 'val/c').iterdir():
        path.unlink()
    told = []
    val = settings(folders, 'val', class_folder='train', test_mode=True)
    check_image_folders([val, dict(type='Nobody')], told.append)
    assert told == [
        f'warning: {folders}/val has 1 files that have not the suffix of a '
        'picture, such as a/Thumbs.db: passed over',
        f'warning: of 3 classes, 1 have no picture in {folders}/val, such as '
        'c',
    ]


def test_pictures_without_a_label_are_told(flat):
    (flat / 'meta/val.txt').write_text('v0.png\t2\nv1.png 0\nv2.png 1\n')
    told, kwargs = [], dict(class_folder='train', ann_file='meta/val.txt')
    check_image_folders([settings(flat, 'val', **kwargs)], told.append)
    assert told == [
        f'warning: {flat}/val has 7 pictures, of which {flat}/meta/val.txt '
        'names 3: the others are passed over'
    ]


def test_the_same_classes_as_in_training(folders):
    def check(cfg):
        check_classes(cfg, ('train', 'val'))

    def cfg(count, topk=(1,), **val):
        train = dict(dataset=settings(folders))
        val = dict(dataset=settings(folders, 'val', test_mode=True, **val))
        model = dict(num_classes=count)
        metric = dict(type='polynl_mm.Accuracy', topk=topk)
        return ConfigDict(
            model=model,
            train_dataloader=train,
            val_dataloader=val,
            val_evaluator=metric,
        )

    check(cfg(3))
    with pytest.raises(ValueError, match=r'topk=\(1, 5\), but .* only 3 '):
        check(cfg(3, topk=(1, 5)))
    message = 'class 0 is a in training, but b in .* val_dataloader, .*/val;'
    with pytest.raises(ValueError, match=message):
        check(cfg(3, metainfo=dict(classes=['b', 'a', 'c'])))
    with pytest.raises(ValueError) as caught:
        check(cfg(2))
    assert (
        'model.num_classes=2, but the data set in train_dataloader, '
        f'{folders}/train, has 3 classes'
    ) in str(caught.value)
    for path in (folders / 'val/a').iterdir():
        path.unlink()
    (folders / 'val/a').rmdir()
    check(cfg(3, class_folder='train'))
    with pytest.raises(ValueError, match='val_dataloader, .* has 2 classes'):
        check(cfg(3))
