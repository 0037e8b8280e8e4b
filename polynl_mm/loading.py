"""Pictures as mmcv loads them, but no part of one passes for a whole."""

from __future__ import annotations

from functools import partial

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile as _LoadImageFromFile
from mmengine import fileio

from .limits import MAX_PIXELS, decode_picture
from .registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadImageFromFile(_LoadImageFromFile):
    """mmcv's, but a file that is no whole picture is an error that names it.

    See :func:`polynl_mm.limits.decode_picture`.

    Args:
        ignore_empty (bool): Give None, which makes the data set take another
            picture, instead of an error.
        max_pixels (int): The most that a picture may have.
        *args: See :class:`mmcv.transforms.LoadImageFromFile`, and so for
            ``**kwargs``; ``file_client_args`` is refused.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, truncated, too large or no picture.
    """

    def __init__(self, *args, max_pixels: int = MAX_PIXELS, **kwargs) -> None:
        """Refuse the outdated argument."""
        super().__init__(*args, **kwargs)
        self.max_pixels = max_pixels
        if self.file_client_args is not None:
            raise ValueError(
                f'file_client_args is outdated, expected backend_args, got '
                f'{self.file_client_args}'
            )

    def transform(self, results: dict) -> dict | None:
        """Add ``img`` (H, W, 3), BGR unless told, and its shapes."""
        path = results['img_path']
        try:
            image = self._decode(path)
        except Exception:
            if self.ignore_empty:
                return None
            raise
        if self.to_float32:
            image = image.astype(np.float32)
        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def _decode(self, path: str) -> np.ndarray:
        return decode_picture(
            fileio.get(path, backend_args=self.backend_args),
            path,
            partial(
                mmcv.imfrombytes,
                flag=self.color_type,
                backend=self.imdecode_backend,
            ),
            self.max_pixels,
        )
