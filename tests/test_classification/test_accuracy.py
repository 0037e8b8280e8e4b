"""Top-k accuracy by counting, in one process and over two."""

import multiprocessing
import socket

import pytest
import torch

pytest.importorskip('mmengine')

from mmengine.registry import METRICS  # noqa: E402

from polynl_mm.classification.accuracy import place  # noqa: E402


def metric(classes=None, **kwargs):
    found = METRICS.build(dict(type='polynl_mm.Accuracy', **kwargs))
    found.dataset_meta = dict(classes=classes) if classes else None
    return found


def samples(count=11, classes=7, seed=0):
    """Scores on a coarse grid: many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (count, classes), generator=generator) / 4
    labels = torch.randint(0, classes, (count,), generator=generator)
    return [
        dict(img_path=f'{i}.png', pred_scores=s, gt_label=int(k))
        for i, (s, k) in enumerate(zip(scores, labels))
    ]


def test_counted_by_hand():
    """Of equal scores the lower class is first."""
    data = samples()
    hits = {1: 0, 2: 0, 5: 0}
    for each in data:
        scores = each['pred_scores'].tolist()
        order = sorted(range(7), key=lambda k: (-scores[k], k))
        assert place(each['pred_scores'], each['gt_label']) == order.index(
            each['gt_label']
        )
        for k in hits:
            hits[k] += each['gt_label'] in order[:k]
    assert 0 < hits[1] < hits[2] < hits[5] < 11
    found = metric(topk=(1, 2, 5))
    found.process({}, data)
    assert found.evaluate(11) == {
        f'accuracy/top{k}': 100 * n / 11 for k, n in hits.items()
    }


def _part(rank, port, folder, shares, queue):
    torch.distributed.init_process_group(
        *('gloo', f'tcp://127.0.0.1:{port}'), rank=rank, world_size=2
    )
    found = metric(topk=(1, 2), collect_dir=folder)
    found.process({}, [samples()[i] for i in shares[rank]])
    queue.put(found.evaluate(11))
    torch.distributed.barrier()


@pytest.mark.parametrize(
    'shares',
    [
        # As the sampler deals, the first once more at the end; and uneven.
        (range(0, 12, 2), [1, 3, 5, 7, 9, 0]),
        (range(0, 11, 2), range(1, 11, 2)),
        (range(9), range(9, 11)),
    ],
    ids=['padded', 'uneven', 'very uneven'],
)
def test_two_processes_give_the_same(shares, tmp_path):
    alone = metric(topk=(1, 2))
    alone.process({}, samples())
    expected = alone.evaluate(11)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    args = (port, str(tmp_path / 'parts'), shares, queue)
    processes = [
        context.Process(target=_part, args=(rank, *args)) for rank in (0, 1)
    ]
    for each in processes:
        each.start()
    found = [queue.get(timeout=60) for _ in processes]
    for each in processes:
        each.join()
    assert found == [expected, expected]


@pytest.mark.parametrize(
    'change, kwargs, message',
    [
        (dict(gt_label=7), {}, '3.png: class 7 of 7 in the data set, but'),
        (dict(gt_label=None), {}, '3.png: class None of 7'),
        ({}, dict(classes='abc'), 'of 3 in the data set, but the model has 7'),
        ({}, dict(topk=(1, 8)), r'topk=\(1, 8\), but there are only 7'),
        (
            dict(pred_scores=torch.full((7,), float('nan'))),
            *({}, '3.png: a score is not finite'),
        ),
    ],
)
def test_a_sample_that_is_wrong(change, kwargs, message):
    with pytest.raises(ValueError, match=message):
        metric(**kwargs).process({}, [dict(samples()[3], **change)])


@pytest.mark.parametrize('topk', [(), (0, 1)])
def test_topk_that_is_none(topk):
    with pytest.raises(ValueError, match='topk must be numbers from 1'):
        metric(topk=topk)
