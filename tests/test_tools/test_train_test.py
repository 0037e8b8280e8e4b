"""Train, resume and evaluate both hosts' models, each in fresh processes."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from mmengine.config import Config  # noqa: E402

ROOT = Path(__file__).parents[2]


def scalars(folder):
    """Metrics that the latest run in a work directory has written."""
    latest = max(folder.glob('2*'))
    (file,) = [*latest.glob('2*.json')] or [*latest.glob('*/scalars.json')]
    lines = map(json.loads, file.read_text().splitlines())
    return {
        key: value
        for line in lines
        for key, value in line.items()
        if key.startswith('coco/') or key in ('mIoU', 'aAcc')
    }


def ran(work_dir):
    """The config of a test: not in the place of that of a training."""
    (saved,) = work_dir.glob('2*/*.py')
    assert not list(work_dir.glob('*.py'))
    return Config.fromfile(saved)


@pytest.fixture(scope='module')
def det_train(place, start, finish, free_port):
    return finish(
        start(
            *('dist_train.sh', 'det.py', 2, '--work-dir', 'det'),
            PORT=free_port(),
        )
    )


@pytest.fixture(scope='module')
def det_resume(det_train, start, finish, free_port):
    return finish(
        start(
            *('dist_train.sh', 'det.py', 2, '--work-dir', 'det', '--resume'),
            *('--cfg-options', 'train_cfg.max_epochs=2'),
            PORT=free_port(),
        )
    )


@pytest.fixture(scope='module')
def seg_train(place, start, finish, free_port):
    """One process on each of two nodes."""
    port = free_port()
    nodes = [
        start(
            *('dist_train.sh', 'seg.py', 1, '--work-dir', 'seg'),
            NNODES='2',
            NODE_RANK=str(rank),
            MASTER_ADDR='localhost',
            PORT=port,
        )
        for rank in (1, 0)
    ]
    return [finish(node) for node in nodes][::-1]


@pytest.fixture(scope='module')
def seg_resume(seg_train, start, finish, free_port):
    return finish(
        start(
            *('dist_train.sh', 'seg.py', 2, '--work-dir', 'seg'),
            *('--resume', 'seg/iter_2.pth'),
            *('--cfg-options', 'train_cfg.max_iters=4'),
            PORT=free_port(),
        )
    )


@pytest.fixture(scope='module')
def det_tests(det_resume, start, finish):
    """In one process each, side by side."""
    import mmdet

    tool = Path(mmdet.__file__).parent / '.mim/tools/test.py'
    checkpoint = 'det/epoch_2.pth'
    runs = dict(
        theirs=start(
            *(tool, 'det.py', checkpoint, '--work-dir', 'det_theirs'),
            PYTHONPATH=str(ROOT),
        ),
        tta=start(
            *('test.py', 'det.py', checkpoint, '--work-dir', 'det_tta'),
            *('--tta', '--show-dir', 'pictures'),
        ),
        tiles=start(
            *('test.py', 'det.py', checkpoint, '--work-dir', 'det_tiles'),
            *('--tile', '32', '--overlap', '16', '--fuse', '--tta'),
        ),
        demo=start(
            *('demo.py', 'data/det/img', 'det.py', checkpoint),
            *('--out', 'det_demo', '--score-thr', '0'),
        ),
    )
    return {name: finish(run) for name, run in runs.items()}


@pytest.fixture(scope='module')
def seg_tests(seg_resume, start, finish):
    """In one process each, side by side."""
    checkpoint = 'seg/iter_4.pth'
    runs = dict(
        out=start(
            *('test.py', 'seg.py', checkpoint, '--work-dir', 'seg_test'),
            *('--out', 'out/labels', '--show-dir', 'seg_pictures'),
        ),
        tta=start(
            *('test.py', 'seg.py', checkpoint, '--work-dir', 'seg_tta'),
            '--tta',
        ),
        demo=start(
            *('demo.py', 'data/seg/img/3.png', 'seg.py', checkpoint),
            *('--out', 'seg_demo'),
        ),
    )
    return {name: finish(run) for name, run in runs.items()}


def test_det_trains_on_gloo_and_says_so_once(place, det_train):
    assert det_train.code == 0, det_train.err
    everything = det_train.out + det_train.err
    for act in (
        'process group of 2 over gloo',
        '53 SyncBN layers became BatchNorm',
        'MMDistributedDataParallel without device ids',
        'stopped, or whose machine is gone, ends the others after 0:30:00',
    ):
        assert everything.count(act) == 1, act
    assert (place / 'det/epoch_1.pth').is_file()
    # What is saved beside it is for machines with GPUs, too.
    assert 'GlooRunner' not in (place / 'det/det.py').read_text()
    # And lets the hosts' inferencers read them, though det.py does not.
    assert 'polynl_mm.engine.safe_load' in (place / 'det/det.py').read_text()


def test_det_resumes_optimizer_and_count(place, det_resume):
    import torch

    import polynl_mm.engine.safe_load  # noqa: F401

    assert det_resume.code == 0, det_resume.err
    assert 'resumed epoch: 1, iter: 2' in det_resume.out
    saved = torch.load(place / 'det/epoch_2.pth')
    assert saved['meta']['iter'] == 4
    steps = {s['step'].item() for s in saved['optimizer']['state'].values()}
    assert steps == {4.0}
    history = saved['message_hub']['log_scalars']['train/loss']
    assert len(history.data[0]) == 4


def test_det_metrics_and_pickle(place, det_resume, start, finish, free_port):
    in_training = scalars(place / 'det')
    assert in_training['coco/bbox_mAP_50'] > 0
    done = finish(
        start(
            *('dist_test.sh', 'det.py', 'det/epoch_2.pth', 2),
            *('--work-dir', 'det_test', '--out', 'out/predictions.pkl'),
            PORT=free_port(),
        )
    )
    assert done.code == 0, done.err
    assert scalars(place / 'det_test') == in_training
    saved = pickle.loads((place / 'out/predictions.pkl').read_bytes())
    assert sorted(sample['img_id'] for sample in saved) == list(range(8))
    for sample in saved:
        assert sample['pred_instances']['bboxes'].shape[1:] == (4,)
        assert 'gt_instances' not in sample


def test_det_under_the_tool_of_mmdet(place, det_tests):
    """polynl_mm.* in the config is enough to have the checkpoint read."""
    assert det_tests['theirs'].code == 0, det_tests['theirs'].err
    assert scalars(place / 'det_theirs') == scalars(place / 'det')


def test_det_tta_and_pictures(place, det_tests):
    assert det_tests['tta'].code == 0, det_tests['tta'].err
    (folder,) = (place / 'det_tta').glob('*/pictures')
    assert sorted(p.name for p in folder.iterdir()) == [
        f'{i}.png' for i in range(8)
    ]
    assert ran(place / 'det_tta').model.type == 'DetTTAModel'
    # Boxes of the mirror images were merged in.
    assert scalars(place / 'det_tta') != scalars(place / 'det_theirs')


def test_det_tiles(place, det_tests):
    assert det_tests['tiles'].code == 0, det_tests['tiles'].err
    cfg = ran(place / 'det_tiles')
    assert cfg.model.module.type == 'polynl_mm.Tiled'
    assert cfg.model.module.detector == 'RetinaNet'
    steps = [step.type for step in cfg.tta_pipeline]
    assert steps[:2] == ['LoadImageFromFile', 'polynl_mm.Resize']
    found = scalars(place / 'det_tiles')
    assert set(found) == set(scalars(place / 'det_tta'))
    assert found != scalars(place / 'det_tta')


def test_det_demo(place, det_tests):
    assert det_tests['demo'].code == 0, det_tests['demo'].err
    assert '8 pictures in det_demo' in det_tests['demo'].out
    drawn = sorted((place / 'det_demo/vis').iterdir())
    assert [file.name for file in drawn] == [f'{i}.png' for i in range(8)]
    plain = cv2.imread(str(place / 'data/det/img/0.png'))
    assert (cv2.imread(str(drawn[0])) != plain).any()


def test_seg_trains_on_two_nodes(place, seg_train):
    for node in seg_train:
        assert node.code == 0, node.err
    told = [
        (node.out + node.err).count('process group of 2 over gloo')
        for node in seg_train
    ]
    assert told == [1, 0]
    assert (place / 'seg/iter_2.pth').is_file()


def test_seg_resumes(place, seg_resume):
    assert seg_resume.code == 0, seg_resume.err
    assert 'iter: 2' in seg_resume.out
    assert 'Iter(train) [3/4]' in seg_resume.out
    assert 'Iter(train) [2/4]' not in seg_resume.out


def test_seg_metrics_and_label_maps(place, seg_tests):
    assert seg_tests['out'].code == 0, seg_tests['out'].err
    assert scalars(place / 'seg_test') == scalars(place / 'seg')
    names = {f'{i}.png' for i in range(8)}
    assert {p.name for p in (place / 'out/labels').iterdir()} == names
    right = [
        cv2.imread(str(place / 'out/labels' / name), 0)
        == cv2.imread(str(place / 'data/seg/ann' / name), 0)
        for name in names
    ]
    accuracy = scalars(place / 'seg_test')['aAcc']
    assert 100 * np.mean(right) == pytest.approx(accuracy, abs=0.01)
    assert len([*(place / 'seg_pictures').rglob('*.png')]) == 8


def test_seg_demo(place, seg_tests):
    assert seg_tests['demo'].code == 0, seg_tests['demo'].err
    (drawn,) = (place / 'seg_demo/vis').iterdir()
    plain = cv2.imread(str(place / 'data/seg/img/3.png'))
    assert drawn.name == '3.png' and (cv2.imread(str(drawn)) != plain).any()
    (labels,) = (place / 'seg_demo/pred').iterdir()
    assert cv2.imread(str(labels), cv2.IMREAD_GRAYSCALE).shape == (64, 64)


def test_seg_tta(place, seg_tests):
    assert seg_tests['tta'].code == 0, seg_tests['tta'].err
    assert ran(place / 'seg_tta').model.type == 'SegTTAModel'
    assert set(scalars(place / 'seg_tta')) == {'aAcc', 'mIoU'}


def test_seg_trains_on_bands(place, start, finish, free_port):
    """Of 32 rows in each process, with those of the other as halo."""
    done = finish(
        start(
            *('dist_train.sh', 'seg.py', 2, '--work-dir', 'bands'),
            *('--cfg-options', 'train_cfg.type=polynl_mm.IterBasedTrainLoop'),
            *('train_cfg.ranks_per_image=2', 'train_cfg.halo=32'),
            # Without a GPU, SyncBN becomes BatchNorm, which is refused.
            'model.backbone.norm_eval=True',
            'model.decode_head.norm_cfg=None',
            PORT=free_port(),
        )
    )
    assert done.code == 0, done.err
    assert (place / 'bands/iter_2.pth').is_file()
    assert set(scalars(place / 'bands')) >= {'aAcc', 'mIoU'}
