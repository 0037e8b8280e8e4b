"""Whatever a kill or a full disk interrupts, a whole checkpoint is left."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmcv')

from mmengine.fileio import LocalBackend  # noqa: E402
from mmengine.logging import MessageHub, MMLogger  # noqa: E402
from mmengine.runner import save_checkpoint  # noqa: E402

from polynl_mm.engine.checkpoints import (  # noqa: E402
    CheckpointHook,
    WholeFiles,
    last_good,
    newest,
    read_state,
)


class Killed(BaseException):
    pass


class Training:
    """What the hook needs of a Runner; a checkpoint holds the epoch."""

    def __init__(self, folder, info=(), epoch=0):
        self.work_dir = str(folder)
        self.message_hub = MessageHub(f'hub of {folder}')
        for key, value in dict(info).items():
            self.message_hub.update_info(key, value)
        self.logger = MMLogger.get_instance('test', log_level='ERROR')
        self.epoch, self.hook = (
            epoch,
            CheckpointHook(
                max_keep_ckpts=1, save_best='score', rule='greater'
            ),
        )
        self.hook.before_train(self)

    @property
    def iter(self):
        return 10 * self.epoch

    def save_checkpoint(
        self, out_dir, filename, *args, backend_args, save_optimizer, **kwargs
    ):
        info = dict(self.message_hub.runtime_info)
        state = dict(
            # All in the same second.
            meta=dict(iter=kwargs['meta']['iter'], time='20260102_030405'),
            state_dict=torch.full((50,), float(self.epoch)),
            message_hub=info,
        )
        if save_optimizer:
            state['optimizer'] = {}
        path = os.path.join(out_dir, filename)
        save_checkpoint(state, path, backend_args=backend_args)

    def run_epoch(self, score):
        """Save, then evaluate, as mmengine does."""
        meta = dict(epoch=self.epoch + 1, iter=self.iter + 10)
        self.hook._save_checkpoint_with_step(self, self.epoch + 1, meta)
        self.epoch += 1
        self.hook.after_val_epoch(self, dict(score=score))


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_replaced_and_not_written_over(tmp_path):
    """Whoever has the old one open, reads the old one to its end."""
    WholeFiles().put(b'old', str(tmp_path / 'file'))
    with open(tmp_path / 'file', 'rb') as old:
        WholeFiles().put(b'newer', str(tmp_path / 'file'))
        assert old.read() == b'old'
    assert (tmp_path / 'file').read_bytes() == b'newer'
    assert names(tmp_path) == ['file']


@pytest.fixture
def kill_at(monkeypatch):
    """Give a function that has the n-th act on the disk be the last."""
    left = [-1]

    def killing(act):
        def act_or_die(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return act(*args, **kwargs)

        return act_or_die

    for name in ('fsync', 'replace', 'remove'):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    remove = killing(LocalBackend.remove)
    monkeypatch.setattr(LocalBackend, 'remove', remove)

    def kill_at(number):
        left[0] = number

    return kill_at


def test_a_kill_loses_nothing(tmp_path, kill_at):
    """At every act of three epochs; each betters the score, one is kept."""
    number, acts = 0, 0
    while acts == number:
        number += 1
        folder = tmp_path / str(number)
        training = Training(folder)
        kill_at(number)
        try:
            for score in (1, 2, 3):
                training.run_epoch(score)
        except Killed:
            acts += 1
        kill_at(-1)
        # Before the first is renamed, there is none.
        if training.epoch == 0 and newest(str(folder)) is None:
            assert number <= 2
            continue
        saved = read_state(newest(str(folder)))
        assert saved['meta']['iter'] >= 10 * max(training.epoch, 1)
        best = [*folder.glob('best_score_epoch_*.pth')]
        if training.epoch > 1:
            assert any(
                torch.load(file)['state_dict'][0] >= training.epoch - 1
                for file in best
            )
        record = folder / 'last_checkpoint'
        assert not record.exists() or os.path.isfile(record.read_text())
    # Saves: 3 of epochs, 3 of the best, 3 again; 2 deleted of each kind.
    assert acts > 30
    assert names(folder) == [
        'best_score_epoch_3.pth',
        'epoch_3.pth',
        'last_checkpoint',
    ]


def test_what_a_kill_has_left_unfinished_is_cleared(tmp_path):
    (tmp_path / 'epoch_3.pth.part').write_bytes(b'PK')
    told = []
    assert newest(str(tmp_path), told.append) is None
    (line,) = told
    assert 'epoch_3.pth.part was never finished' in line
    Training(tmp_path)
    assert names(tmp_path) == []


def test_a_full_disk_leaves_what_was(tmp_path, monkeypatch):
    path = str(tmp_path / 'a.pth')
    WholeFiles().put(b'old', path)

    def full(number):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left .*a.pth') as error:
        WholeFiles().put(b'new', path)
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ['a.pth']
    assert (tmp_path / 'a.pth').read_bytes() == b'old'


def test_the_newest_is_whole_and_not_the_best(tmp_path):
    training = Training(tmp_path)
    training.hook.max_keep_ckpts = -1
    for score in (3, 2, 1):
        training.run_epoch(score)
    one, two, three = (tmp_path / f'epoch_{i}.pth' for i in (1, 2, 3))
    # A copy may give them any time, and may come without the record.
    os.utime(one)
    (tmp_path / 'last_checkpoint').write_text('')
    assert newest(str(tmp_path)) == str(three)
    three.write_bytes(three.read_bytes()[:-100])
    damaged = bytearray(two.read_bytes())
    place = damaged.index(torch.full((50,), 1.0).numpy().tobytes())
    damaged[place] ^= 1
    two.write_bytes(damaged)
    told = []
    assert newest(str(tmp_path), told.append) == str(one)
    cut, changed = told
    assert cut.startswith(f'{three} can not be read (PytorchStreamReader ')
    assert cut.endswith('): passed over')
    assert changed == f'{two} is damaged: passed over'
    # Weights, which are there, are no training.
    torch.save({}, one)
    for path in tmp_path.glob('best_*'):
        path.unlink()
    with pytest.raises(ValueError) as caught:
        newest(str(tmp_path))
    assert str(caught.value) == (
        f'there is no whole checkpoint in {tmp_path}, but {two}, {three}'
    )
    runner = SimpleNamespace(work_dir=str(tmp_path), hooks=[])
    assert last_good(runner) == f'there is no whole checkpoint in {tmp_path}'


def test_a_file_of_the_old_format(tmp_path):
    """Its tensors can not be left on the disk until they are used."""
    training = Training(tmp_path)
    training.run_epoch(1)
    path = tmp_path / 'epoch_1.pth'
    state = read_state(str(path))
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert newest(str(tmp_path)) == str(path)
    assert read_state(str(path))['message_hub'] == state['message_hub']


def test_a_copy_stands_for_itself(tmp_path):
    old, new = tmp_path / 'old', tmp_path / 'new'
    training = Training(old)
    training.run_epoch(1)
    shutil.copytree(old, new)
    path = newest(str(new))
    assert path == str(new / 'epoch_1.pth')
    before = names(old)
    copy = Training(new, read_state(path)['message_hub'], epoch=1)
    copy.run_epoch(2)
    assert names(old) == before
    assert names(new) == [name.replace('_1', '_2') for name in before]


def test_a_resumed_run_saves_its_newest_again_with_the_best(tmp_path):
    """If the validation comes before any other save."""
    training = Training(tmp_path)
    training.hook.after_val_epoch = lambda *args: None
    training.run_epoch(1)
    info = read_state(newest(str(tmp_path)))['message_hub']
    assert 'best_score' not in info
    resumed = Training(tmp_path, info, epoch=1)
    resumed.hook.after_val_epoch(resumed, dict(score=1))
    info = read_state(newest(str(tmp_path)))['message_hub']
    assert info['best_score'] == 1
