"""A damaged checkpoint is refused, or a training goes on from it.

FUZZ=100000 python -m pytest --basetemp=/dev/shm/fuzz \
    tests/reliability/test_fuzz_checkpoints.py
"""

import io
import warnings
import zipfile

import pytest
from fuzzing import COUNT, Stumbled, fuzz, mutate

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

from mmengine.logging import MessageHub  # noqa: E402
from mmengine.optim import MultiStepLR, OptimWrapper  # noqa: E402
from mmengine.runner import IterBasedTrainLoop  # noqa: E402
from mmengine.utils import apply_to  # noqa: E402
from torch import nn  # noqa: E402

from polynl_mm.engine import safe_load, training_state  # noqa: E402


def training():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    wrapper = OptimWrapper(optimizer)
    schedule = MultiStepLR(wrapper, milestones=[3], by_epoch=False)
    return model, wrapper, schedule


def step(model, wrapper, schedule):
    wrapper.update_params(model(torch.ones(4, 3)).square().sum())
    schedule.step()


def checkpoint():
    model, wrapper, schedule = training()
    step(model, wrapper, schedule)
    hub = MessageHub('fuzz')
    hub.update_scalar('train/loss', 1.5)
    hub.update_info('keep_ckpt_ids', [1])
    return dict(
        meta=dict(epoch=0, iter=1, seed=3, cfg='model = 1'),
        state_dict=model.state_dict(),
        message_hub=hub.state_dict(),
        optimizer=wrapper.state_dict(),
        param_schedulers=[schedule.state_dict()],
    )


def go_on(file):
    """Do what tools/train.py does with a checkpoint, in small."""
    state = torch.load(file, weights_only=True)
    apply_to(state, lambda value: False, None)
    model, wrapper, schedule = training()
    hub = MessageHub('fuzz_again')
    loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    loop._max_iters = 4
    for key in ('meta', 'message_hub', 'optimizer'):
        state[key]
    model.load_state_dict(state['state_dict'])
    training_state._check_counts(state['meta'], loop)
    training_state._check_hub(state['message_hub'], 'folder')
    training_state._check_schedulers(
        state.get('param_schedulers', []), [schedule]
    )
    hub.load_state_dict(state['message_hub'])
    wrapper.load_state_dict(state['optimizer'])
    schedule.load_state_dict(state['param_schedulers'][0])
    training_state._check_optimizer(wrapper.optimizer)
    try:
        step(model, wrapper, schedule)
        for buffer in hub.log_scalars.values():
            buffer.update(1.0)
        for part in (hub.state_dict(), wrapper.state_dict()):
            apply_to(part, lambda x: hasattr(x, 'cpu'), lambda x: x.cpu())
        torch.save(schedule.state_dict(), io.BytesIO())
    except Exception as error:
        raise Stumbled(f'taken, but then {error!r}') from error


def saved(zipped):
    file = io.BytesIO()
    torch.save(checkpoint(), file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def any_bytes(zipped):
    whole = saved(zipped)
    return lambda rng: mutate(whole, rng)


def the_pickle():
    """Only in what is unpickled; the archive around it is whole."""
    with zipfile.ZipFile(io.BytesIO(saved(True))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith('/data.pkl'))

    def make(rng):
        result = io.BytesIO()
        with zipfile.ZipFile(result, 'w') as archive:
            for each, content in members.items():
                if each == name:
                    content = mutate(content, rng)
                archive.writestr(each, content)
        return result.getvalue()

    return make


KINDS = {
    'archive': lambda: any_bytes(True),
    'old format': lambda: any_bytes(False),
    'pickle': the_pickle,
}


def test_the_whole_one_is_read(tmp_path):
    for zipped in (True, False):
        (tmp_path / 'whole.pth').write_bytes(saved(zipped))
        go_on(tmp_path / 'whole.pth')


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_checkpoints(kind, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = fuzz(
            KINDS[kind](),
            go_on,
            tmp_path / 'damaged.pth',
            lambda file: safe_load.read_checkpoint(str(file)),
        )
    with capsys.disabled():
        print(f' {kind}: {dict(found)}', end='')
    assert found['refused'] > COUNT // 4
    assert sum(found.values()) == COUNT
