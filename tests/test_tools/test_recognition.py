"""The tools on a classifier: two processes and one, and what is refused."""

import pickle
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402

from polynl_mm.engine import cli  # noqa: E402

TOOLS = Path(__file__).parents[2] / 'tools'

CLS = f"""
_base_ = '{TOOLS.parent}/configs/mini/resnet18-polynl_mini-digits.py'
model = dict(
    backbone=dict(base_channels=4, stem_channels=4),
    in_channels=8, num_classes=3, mixup=0.2)
train_dataloader = dict(
    batch_size=2, dataset=dict(data_root='data'))
val_dataloader = dict(batch_size=2, dataset=dict(data_root='data'))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, 2))
test_evaluator = val_evaluator
train_cfg = dict(max_iters=3, val_interval=3)
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=3, save_best=None))
"""
NAME = 'cls.py'


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a config, and pictures of three classes."""
    (tmp_path / NAME).write_text(CLS)
    rng = np.random.default_rng(0)
    for split, count in (('train', 2), ('val', 3)):
        for name in 'abc':
            folder = tmp_path / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(count - (split == 'val' and name == 'a')):
                picture = rng.integers(0, 255, (9, 9, 3), np.uint8)
                cv2.imwrite(str(folder / f'{i}.png'), picture)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(here, monkeypatch, capfd):
    """Run a tool in this process; give exit code, output, error lines."""

    def call(tool, *args):
        argv = [f'{tool}.py', *map(str, args)]
        monkeypatch.setattr(sys, 'argv', argv)
        monkeypatch.setattr(sys, 'path', sys.path[:])
        code = 0
        try:
            cli.run(runpy.run_path(str(TOOLS / f'{tool}.py'))['main'])
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return call


@pytest.fixture
def checkpoint(here):
    """Of a model that has learnt nothing."""
    cfg = Config.fromfile(NAME)
    with DefaultScope.overwrite_default_scope('polynl_mm'):
        torch.manual_seed(0)
        state = MODELS.build(cfg.model).state_dict()
    meta = dict(dataset_meta=dict(classes=('ant', 'bee', 'cat')))
    torch.save(dict(state_dict=state, meta=meta), 'some.pth')
    return 'some.pth'


@pytest.mark.long
def test_two_processes_evaluate_as_one(here, start, finish, free_port, call):
    """Eight pictures of val, in batches of two: four for each process."""
    for path in (here / 'data/val/a').iterdir():
        # Seven: one process has the first once more.
        path.unlink()
        break
    done = finish(
        start(
            *('dist_train.sh', here / NAME, 2, '--work-dir', here / 'two'),
            '--cfg-options',
            *(f'{k}_dataloader.dataset.data_root={here}/data'
              for k in ('train', 'val')),
            PORT=free_port(),
        )
    )  # fmt: skip
    assert done.code == 0, done.err[-3000:]
    code, out, _ = call('test', NAME, 'two/iter_3.pth', '--out', 'out.pkl')
    assert code == 0
    for k in (1, 2):
        (two,) = {word for word in numbers(done.out + done.err, k)}
        assert numbers(out, k) == [two]
    assert len(pickle.loads((here / 'out.pkl').read_bytes())) == 7


def numbers(log, k):
    words = log.split()
    key = f'accuracy/top{k}:'
    return [b for a, b in zip(words, words[1:]) if a == key]


def test_scores_are_saved(checkpoint, call, here):
    saved = here / 'work_dirs/cls/cls.py'
    saved.parent.mkdir(parents=True)
    saved.write_text('# of the training')
    code, out, _ = call('test', NAME, checkpoint, '--out', 'out.pkl')
    assert code == 0
    saved = pickle.loads((here / 'out.pkl').read_bytes())
    names = [each['img_path'].split('data/')[1] for each in saved]
    assert names[:3] == ['val/a/0.png', 'val/a/1.png', 'val/b/0.png']
    assert len(names) == 8
    best = [int(each['pred_scores'].argmax()) for each in saved]
    hits = sum(k == each['gt_label'] for k, each in zip(best, saved))
    assert numbers(out, 1) == [f'{100 * hits / 8:.4f}']
    # A config that names the checkpoint as a start is not what was trained.
    assert (here / 'work_dirs/cls/cls.py').read_text() == '# of the training'
    (ran,) = (here / 'work_dirs/cls').glob('2*/cls.py')
    assert Config.fromfile(ran).load_from == checkpoint


@pytest.mark.parametrize(
    'options, line',
    [
        (['--tile', '64'], '--tile is for mmdet: a classifier sees whole'),
        (['--tta'], '--tta is for mmdet and mmseg, not for classification'),
        (['--show-dir', 'x'], 'not for classification: tools/demo.py draws'),
        (['--out', 'x.json'], 'saved to one .pkl or .pickle file'),
    ],
)
def test_options_for_others(checkpoint, call, options, line):
    code, _, lines = call('test', NAME, checkpoint, *options)
    assert code == 2 and line in lines[-1]


def test_classes_of_a_checkpoint(checkpoint, call, here):
    """As many in another order are an error, other names a warning."""
    code, out, lines = call('test', NAME, checkpoint)
    told = "class 0 is 'ant' in some.pth, but 'a' in the data set of test_da"
    assert code == 0 and told in out + '\n'.join(lines)
    content = torch.load(checkpoint)
    content['meta']['dataset_meta']['classes'] = ('a', 'c', 'b')
    torch.save(content, checkpoint)
    code, _, lines = call('test', NAME, checkpoint)
    assert code == 2
    assert lines[-1] == (
        "test.py: error: class 1 is 'c' in some.pth, but 'b' in the data set "
        'of test_dataloader: expected the classes in the order of training'
    )
    content['meta']['dataset_meta']['classes'] = ('a', 'b', 'c')
    torch.save(content, checkpoint)
    code, out, lines = call('test', NAME, checkpoint)
    assert code == 0 and "class 0 is 'a'" not in out + '\n'.join(lines)


def test_more_classes_asked_for_than_there_are(checkpoint, call):
    options = ('--cfg-options', 'test_evaluator.topk=(1,5)')
    code, _, lines = call('test', NAME, checkpoint, *options)
    assert code == 2
    assert lines[-1] == (
        f'test.py: error: config {NAME}: topk=(1, 5), but there are only 3 '
        'classes'
    )


def test_bad_data_is_one_line(here, call):
    (here / 'data/train/b/0.png').write_text('')
    code, _, lines = call('train', NAME)
    assert code == 2
    assert lines[-1] == (
        f'train.py: error: config {NAME}: train_dataloader: '
        'data/train/b/0.png: no picture, expected one that OpenCV reads, got '
        '0 bytes'
    )
    options = ('--cfg-options', 'model.num_classes=4')
    code, _, lines = call('train', NAME, *options)
    assert code == 2 and 'model.num_classes=4, but the data set' in lines[-1]
    options = ('--cfg-options', 'val_dataloader.dataset.ann_file=val.txt')
    (here / 'data/val.txt').write_text('a/0.png 3\n')
    (here / 'data/train/b/0.png').unlink()
    code, _, lines = call('train', NAME, *options)
    assert code == 2
    assert lines[-1].endswith(
        "data/val.txt, line 1: got 'a/0.png 3', expected a class from 0 to 2, "
        'as there are 3 class folders'
    )
    options = ('--cfg-options', 'val_dataloader.dataset.class_folder=gone')
    code, _, lines = call('train', NAME, *options)
    assert code == 2 and 'data/gone: not there, expected a fold' in lines[-1]
    assert not (here / 'work_dirs').exists()


def test_a_picture_that_is_cut_off(here, call, checkpoint):
    path = here / 'data/val/a/0.jpg'
    picture = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    cv2.imwrite(str(path), picture)
    (here / 'data/val/a/0.png').unlink()
    path.write_bytes(path.read_bytes()[:-9])
    code, _, lines = call('test', NAME, checkpoint)
    assert code == 2
    assert 'test.py: error: data/val/a/0.jpg: truncated, ' in lines[-1]


def test_the_best_classes_are_drawn(here, call, checkpoint):
    cv2.imwrite('some.png', np.full((30, 20, 3), 60, np.uint8))
    code, out, _ = call('demo', 'some.png', NAME, checkpoint, '--out', 'out')
    assert code == 0 and '1 pictures in out/vis' in out
    drawn = cv2.imread('out/vis/some.png')
    # Enlarged, so that text is readable.
    assert drawn.shape == (576, 384, 3)
    # White text on black in the corner, nothing below it.
    assert drawn[:120, :200].max() > 240 and (drawn[300:] == 60).all()


def test_the_names_that_are_drawn(here, checkpoint):
    from polynl_mm.classification.inferencer import ClsInferencer

    cv2.imwrite('some.png', np.full((30, 20, 3), 60, np.uint8))
    with DefaultScope.overwrite_default_scope('polynl_mm'):
        infer = ClsInferencer(Config.fromfile(NAME), checkpoint, 'cpu')
        (best,) = infer('some.png')['predictions']
    assert set(best) == {'ant', 'bee', 'cat'}
    assert sum(best.values()) == pytest.approx(1)
    assert sorted(best.values(), reverse=True) == [*best.values()]
