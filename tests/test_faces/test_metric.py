"""WiderFaceMetric: over processes it says what the files say in one.

Run as a script under torchrun, this file is the worker of its own tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.evaluator import Evaluator  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import METRICS, DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from polynl_mm.engine import checks, cli  # noqa: E402
from polynl_mm.faces.ap import evaluate  # noqa: E402
from polynl_mm.faces.files import (  # noqa: E402
    load_wider_face_gt,
    read_predictions,
)

ROOT = Path(__file__).parents[2]
WORLD = 2
# Odd, so that the sampler gives one of them to both processes.
PICTURES = 13


def pictures():
    """Faces and detections, float32 corners, scores of any range."""
    rng = np.random.default_rng(0)
    made = {}
    for i in range(PICTURES):
        xy = rng.integers(0, 500, (i, 2))
        boxes = np.column_stack([xy, rng.integers(9, 60, (i, 2))])
        kept = {
            setting: (1 + np.arange(0, i, step)).tolist()
            for setting, step in (('easy', 3), ('medium', 2), ('hard', 1))
        }
        corners = np.repeat(boxes, 2, 0).astype(float)
        corners[:, 2:] += corners[:, :2]
        corners += rng.normal(0, 3, corners.shape)
        found = dict(
            bboxes=torch.tensor(corners, dtype=torch.float32),
            # By the process that it falls to: normalised there alone they
            # would be on two scales.
            scores=torch.tensor(
                rng.normal(40 * (i % WORLD), 9, len(corners)),
                dtype=torch.float32,
            ),
            labels=torch.zeros(len(corners), dtype=torch.long),
        )
        made[f'{i % 3}--E/{i}'] = boxes, kept, found
    return made


def sample(image, found):
    return DetDataSample(
        metainfo=dict(img_id=image),
        pred_instances=InstanceData(**found),
    )


def detections():
    """What a file says of the detections, the best first."""
    rows = {}
    for image, (_, _, found) in pictures().items():
        boxes = found['bboxes'].double().numpy()
        sides = boxes[:, 2:] - boxes[:, :2]
        score = found['scores'].double().numpy()
        rows[image] = np.column_stack([boxes[:, :2], sides, score])
        rows[image] = rows[image][np.argsort(-score)]
    return rows


def expected(folder):
    """Evaluate the detections without the metric."""
    return evaluate(load_wider_face_gt(folder), detections())


class Detector(BaseModel):
    """Knows the detections of every picture."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.known = pictures()

    def forward(self, image, mode='predict'):
        return [sample(each, self.known[each][2]) for each in image]


class Pictures(torch.utils.data.Dataset):
    images = list(pictures())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return dict(image=self.images[i])


def work(folder):
    from polynl_mm.engine.runner import GlooRunner

    runner = GlooRunner(
        Detector(),
        str(folder / 'work'),
        launcher='pytorch',
        val_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=Pictures(),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        val_cfg=dict(),
        val_evaluator=dict(
            type='polynl_mm.WiderFaceMetric',
            gt_dir=str(folder / 'gt'),
            out_dir=str(folder / 'out'),
            collect_dir=str(folder / 'collected'),
        ),
        cfg=Config(),
        experiment_name='wider_face_metric',
    )
    metrics = runner.val()
    rank = int(os.environ['RANK'])
    (folder / f'{rank}.json').write_text(json.dumps(metrics))


@pytest.fixture(scope='module')
def folder(tmp_path_factory, write):
    folder = tmp_path_factory.mktemp('metric')
    write.gt(folder / 'gt', dict(sorted(pictures().items())))
    return folder


@pytest.fixture(scope='module')
def two_processes(folder):
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone']
        + [f'--nproc-per-node={WORLD}', __file__, str(folder)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def test_two_processes_say_what_one_evaluation_says(folder, two_processes):
    ap = {f'wider_face/{k}': v for k, v in expected(folder / 'gt').items()}
    for rank in range(WORLD):
        metrics = json.loads((folder / f'{rank}.json').read_text())
        assert {k: metrics[k] for k in ap} == ap
    assert 0 < ap['wider_face/hard'] < 1
    assert f'wider_face/easy: {ap["wider_face/easy"]:.4f}' in two_processes


def test_written_files_say_exactly_what_was_evaluated(folder, two_processes):
    files = read_predictions(folder / 'out', detections())
    for image, rows in detections().items():
        np.testing.assert_array_equal(files[image], rows)
    assert len(list((folder / 'out').glob('*/*.txt'))) == PICTURES


@pytest.fixture
def run(folder):
    """Give a function that evaluates samples in this process."""

    def run(samples, size=None, **settings):
        metric = {
            'type': 'polynl_mm.WiderFaceMetric',
            'gt_dir': str(folder / 'gt'),
            **settings,
        }
        with DefaultScope.overwrite_default_scope('mmdet'):
            evaluator = Evaluator([metric])
        for each in samples:
            evaluator.process([each])
        return evaluator.evaluate(size or len(samples))

    return run


def samples(change=None, **instances):
    """All data samples; one with other fields in its predictions."""
    made = []
    for image, (_, _, found) in pictures().items():
        if image == change:
            found = {**found, **instances}
        made.append(sample(image, found))
    return made


def test_one_process(folder, run):
    ap = expected(folder / 'gt')
    assert run(samples()) == {f'wider_face/{k}': v for k, v in ap.items()}
    named = run(samples(), prefix='val')
    assert named == {f'val/{k}': v for k, v in ap.items()}


def test_precisions_and_arrays(folder, run):
    half = samples(
        '1--E/1',
        bboxes=torch.ones(1, 4, dtype=torch.bfloat16),
        scores=torch.ones(1, dtype=torch.float16),
        labels=torch.zeros(1, dtype=torch.long),
    )
    double = samples(
        '1--E/1',
        bboxes=np.ones((1, 4)),
        scores=np.ones(1),
        labels=np.zeros(1, int),
    )
    assert run(half) == run(double)


def test_part_of_the_pictures(folder, run, tmp_path):
    part = samples()[:-3]
    with pytest.raises(ValueError, match='missing are 3 of 13 pictures'):
        run(part, out_dir=str(tmp_path / 'out'))
    # What was computed is not lost.
    assert len(list((tmp_path / 'out').glob('*/*.txt'))) == PICTURES - 3
    empty = [
        sample(s.img_id, dict(bboxes=torch.empty(0, 4), scores=torch.empty(0)))
        for s in samples()[-3:]
    ]
    assert run(part, missing_as_empty=True) == run(part + empty)


def test_without_ground_truth_it_only_writes(run, tmp_path):
    unknown = sample('9--Test/1', pictures()['1--E/1'][2])
    out = str(tmp_path / 'out')
    assert run([unknown], gt_dir=None, out_dir=out) == {}
    written = read_predictions(out, ['9--Test/1'])['9--Test/1']
    assert np.array_equal(written, detections()['1--E/1'])
    with pytest.raises(ValueError, match='got neither'):
        run([unknown], gt_dir=None)


def test_the_same_picture_again(run):
    again = samples()
    with pytest.raises(ValueError, match='14 pictures .* 13 different'):
        run(again + again[:1])
    # As the sampler pads, beyond the size of the data set, it is no harm.
    assert run(again + again[:1], size=PICTURES) == run(again)


@pytest.mark.parametrize('image', ('0--E/99', 7, '0', None))
def test_unknown_picture(run, image):
    bad = samples()
    bad[2].set_metainfo(dict(img_id=image))
    with pytest.raises(ValueError, match=f'img_id={image!r}, expected') as e:
        run(bad)
    assert 'gt' in str(e.value) and "'0--E/0'" in str(e.value)


def test_pipeline_without_img_id(run):
    bad = [DetDataSample(pred_instances=samples()[0].pred_instances)]
    with pytest.raises(ValueError, match='meta_keys'):
        run(bad)


def test_detector_of_several_classes(run):
    labels = torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r'1--E/1: .*\[0\.0, 3\.0\]'):
        run(samples('1--E/1', labels=labels))


@pytest.mark.parametrize('field', ('scores', 'bboxes'))
def test_detector_gone_wrong(run, field):
    (found,) = (f for i, (*_, f) in pictures().items() if i == '1--E/1')
    broken = found[field].clone()
    broken[1] = float('nan')
    with pytest.raises(ValueError, match='of 1--E/1, row 1: got'):
        run(samples('1--E/1', **{field: broken}))


def test_wrong_folder_shows_before_anything_runs(tmp_path):
    cfg = dict(type='polynl_mm.WiderFaceMetric', gt_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match='wider_face_val.mat'):
        METRICS.build(cfg)


def test_tools_look_for_the_folder_first(tmp_path):
    gone = str(tmp_path / 'gone')
    cfg = Config(dict(val_evaluator=dict(type='any', gt_dir=gone)))
    with pytest.raises(cli.StartError, match=f'val_evaluator: gt_dir.*{gone}'):
        checks.check_data(cfg, 'val')


if __name__ == '__main__':
    cli.run(lambda: work(Path(sys.argv[1])))


@pytest.mark.parametrize('image', ('../escaped', '/abs/x'))
def test_a_picture_that_leads_elsewhere_ends_it_at_once(tmp_path, image):
    """Not after the last of thousands."""
    metric = METRICS.build(
        dict(type='polynl_mm.WiderFaceMetric', gt_dir=None, out_dir=tmp_path)
    )
    found = next(iter(pictures().values()))[2]
    with pytest.raises(ValueError, match=f'{image!r} would be written to'):
        metric.process({}, [sample(image, found).to_dict()])


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / 'file').touch()
    metric = dict(type='polynl_mm.WiderFaceMetric', gt_dir=None)
    for out_dir in (tmp_path / 'file', tmp_path / 'file/below'):
        with pytest.raises(OSError, match=f'{out_dir} can not be written: '):
            METRICS.build(dict(metric, out_dir=out_dir))
