"""Checkpoints that no kill and no full disk can lose, and the newest of them.

mmengine deletes the old checkpoint before it writes the new one, writes in
place, and remembers files by the folder that the training began in.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from glob import escape, glob
from zipfile import ZipFile, is_zipfile

import torch
from mmengine import hooks
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.runner import Runner
from mmengine.utils import digit_version

from polynl_mm.registry import HOOKS

from . import safe_load

# The end of the name of a file that is being written.
_PART = '.part'
# Of the disk, and of what a user may have on it.
FULL = (errno.ENOSPC, errno.EDQUOT)


class WholeFiles(LocalBackend):
    """A local disk on which a file is either as it was, or new and whole."""

    def put(self, obj: bytes, filepath: str) -> None:
        """Write aside, wait until it is on the disk, rename."""
        folder = os.path.dirname(os.path.abspath(filepath))
        os.makedirs(folder, exist_ok=True)
        part = f'{filepath}{_PART}'
        try:
            with open(part, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.remove(part)
            # Python does not say of which file it is.
            raise OSError(error.errno, error.strerror, filepath) from error
        os.replace(part, filepath)
        # Of the new name the folder tells, which is written by itself.
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


register_backend('polynl_mm.whole', WholeFiles, force=True)


@HOOKS.register_module()
class CheckpointHook(hooks.CheckpointHook):
    """mmengine's, which loses nothing; the arguments are all its own.

    On a local disk every file is written aside, synced and renamed, and only
    then is deleted what it supersedes: there must be room for one checkpoint
    more than are kept. A folder that was copied or moved stands for itself;
    where it came from is left alone.
    """

    def before_train(self, runner: Runner) -> None:
        """Choose the disk for whole files, and paths in this folder."""
        place = self.out_dir or runner.work_dir
        if self.file_client_args is None and (
            type(get_file_backend(place, backend_args=self.backend_args))
            is LocalBackend
        ):
            self.backend_args = dict(backend='polynl_mm.whole')
        super().before_train(runner)
        info = runner.message_hub.runtime_info
        for key, path in {**self._best(), 'last_ckpt': None}.items():
            path = path or info.get(key)
            if path:
                path = os.path.join(self.out_dir, os.path.basename(path))
                self._set(key, path)
                runner.message_hub.update_info(key, path)
        if is_main_process():
            for part in glob(f'{escape(self.out_dir)}/*.pth{_PART}'):
                os.remove(part)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the best, and then delete the one that was."""
        before = self._best()
        # mmengine deletes what it knows of, before it saves.
        for key in before:
            self._set(key, None)
        super().after_val_epoch(runner, metrics)
        for key, path in before.items():
            best = self._best()[key]
            if best is None:
                self._set(key, path)
            elif path and path != best:
                self._delete(path)

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict
    ) -> None:
        """Save, then say which is the last, then delete the oldest.

        In mmengine the last comes first.
        """
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        oldest = None
        if self.max_keep_ckpts > 0:
            if step not in self.keep_ckpt_ids:
                if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                    oldest = self.keep_ckpt_ids.popleft()
                self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info(
                'keep_ckpt_ids', list(self.keep_ckpt_ids)
            )
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            WholeFiles().put(
                self.last_ckpt.encode(),
                os.path.join(runner.work_dir, 'last_checkpoint'),
            )
        if oldest is not None:
            self._delete(
                self.file_backend.join_path(
                    self.out_dir, self.filename_tmpl.format(oldest)
                )
            )

    def _delete(self, path: str) -> None:
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)

    def _best(self) -> dict[str, str | None]:
        """Give paths by their keys in the message hub."""
        if not self.save_best:
            return {}
        if len(self.key_indicators) == 1:
            return {'best_ckpt': self.best_ckpt_path}
        return {
            f'best_ckpt_{metric}': self.best_ckpt_path_dict[metric]
            for metric in self.key_indicators
        }

    def _set(self, key: str, path: str | None) -> None:
        if key == 'last_ckpt':
            self.last_ckpt = path
        elif key == 'best_ckpt':
            self.best_ckpt_path = path
        else:
            self.best_ckpt_path_dict[key[len('best_ckpt_') :]] = path


def read_state(path: str) -> dict | None:
    """Give a checkpoint that a training can go on from, or None.

    Its tensors are read when they are used, where torch can.

    Raises:
        Exception: Of any kind, as torch does if the file is not whole.
    """
    # Before 2.6, torch.load refuses mmengine's where it is restricted. Files
    # of the format before torch 1.6 are no archives, and are read at once.
    new = digit_version(torch.__version__) >= digit_version('2.6.0')
    options = dict(mmap=True) if new and is_zipfile(path) else {}
    found = torch.load(path, map_location='cpu', **options)
    if not isinstance(found, dict) or not isinstance(found.get('meta'), dict):
        return None
    return found if {'message_hub', 'optimizer'} <= set(found) else None


def _age(path: str) -> tuple[str, int] | None:
    """Give the time it was written, and after how many iterations."""
    state = read_state(path)
    if state is None:
        return None
    # As mmengine writes them; of a checkpoint by others, none.
    time, done = state['meta'].get('time', ''), state['meta'].get('iter')
    return str(time), done if type(done) is int else 0


def newest(folder: str, tell=lambda message: None) -> str | None:
    """Give the newest whole checkpoint of a training, or None.

    By what is in them, not by the names, by the times that a copy of them
    has, or by ``last_checkpoint``, which names the folder it was written in.

    Args:
        folder (str): Looked through, without what is below it.
        tell (Callable): Is given a line about each file that is not whole.

    Raises:
        ValueError: There are files that can not be read, and none that can:
            a training may be lost that starts anew. Those with weights alone,
            and the first that a kill left unfinished, count as neither.
    """
    states, lost = [], []
    for path in sorted(glob(f'{escape(folder)}/*.pth')):
        try:
            age = safe_load.call_on_checkpoint(_age, path)
        except ValueError as error:
            reason = safe_load.reason(error)
            tell(f'{path} can not be read ({reason}): passed over')
            lost.append(path)
            continue
        if age is not None:
            states.append((*age, path))
    for part in sorted(glob(f'{escape(folder)}/*.pth{_PART}')):
        tell(f'{part} was never finished: passed over')
    for _, _, path in sorted(states, reverse=True):
        # Of what was not read yet, the sums say whether it is right.
        if not is_zipfile(path):
            return path
        with suppress(Exception), ZipFile(path) as file:
            if file.testzip() is None:
                return path
        tell(f'{path} is damaged: passed over')
        lost.append(path)
    if lost:
        raise ValueError(
            f'there is no whole checkpoint in {folder}, but '
            + ', '.join(sorted(lost))
        )
    return None


def last_good(runner: Runner) -> str:
    """Say which checkpoint a training can go on from."""
    folder = runner.work_dir
    for hook in runner.hooks:
        if isinstance(hook, hooks.CheckpointHook):
            folder = hook.out_dir or folder
    path = None
    with suppress(ValueError):
        path = newest(folder)
    if path is None:
        return f'there is no whole checkpoint in {folder}'
    return f'the last good checkpoint is {path}'
