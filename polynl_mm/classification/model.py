"""A classifier: any backbone, the mean over its last map, a linear layer."""

from __future__ import annotations

import torch
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn import functional as F

from polynl_mm.registry import MODELS


@MODELS.register_module()
class ClsDataPreprocessor(ImgDataPreprocessor):
    """mmengine's, which would pad pictures of several sizes; here none is.

    The mean over a map would be one over the padding, too.

    Args:
        mean (Sequence[float], optional): See
            :class:`mmengine.model.ImgDataPreprocessor`.
        std (Sequence[float], optional): See there.
        bgr_to_rgb (bool): Whether to turn the channels around before.

    Raises:
        ValueError: Pictures of a batch differ in size.
    """

    def __init__(self, mean=None, std=None, bgr_to_rgb: bool = False) -> None:
        """Keep the numbers."""
        super().__init__(mean, std, bgr_to_rgb=bgr_to_rgb)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise and stack a batch."""
        images, samples = data['inputs'], data.get('data_samples')
        for i, image in enumerate(images):
            if image.shape != images[0].shape:
                path = samples[i].get('img_path') if samples else i
                raise ValueError(
                    f'{path} has shape {tuple(image.shape)} after the '
                    f'pipeline, the first of its batch '
                    f'{tuple(images[0].shape)}: expected one size, as by '
                    "dict(type='CenterCrop', crop_size=224)"
                )
        return super().forward(data, training)


@MODELS.register_module()
class Classifier(BaseModel):
    r"""Softmax over a linear layer on the mean of a backbone's last map.

    .. math::
        p = \operatorname{softmax}(W \bar x + b), \qquad
        \bar x = \tfrac 1N \sum_n x_n

    The loss is the cross-entropy with label smoothing (Szegedy et al., CVPR
    2016, eq. 3: :math:`\varepsilon` of the truth is shared out evenly to all
    classes), after mixup, if it is switched on (Zhang et al., ICLR 2018,
    arXiv:1710.09412): pictures and their targets are mixed with those of the
    same batch in another order, :math:`\lambda x_i + (1 - \lambda) x_j`, with
    one :math:`\lambda \sim \operatorname{Beta}(\alpha, \alpha)` per batch, as
    its authors' code does.

    Args:
        backbone (dict): Any that gives a map (B, C, H, W), or several, of
            which the last counts: ``mmdet.ResNet``, ``mmseg.ResNet``, or
            ``polynl_mm.Insert`` around one.
        in_channels (int): C of that map.
        num_classes (int): K.
        label_smoothing (float): Share of the target for all classes.
        mixup (float): :math:`\alpha`; 0 mixes nothing.
        data_preprocessor (dict, optional): As of
            :class:`mmengine.model.BaseModel`.
        init_cfg (dict, optional): See there.

    Shape:
        - inputs: (B, 3, H, W).
        - scores: (B, K).

    Raises:
        ValueError: An argument is out of its range, or, at a call, the map
            is none or has other channels.
    """

    def __init__(
        self,
        backbone: dict,
        in_channels: int,
        num_classes: int,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        """Build the backbone and the linear layer."""
        super().__init__(data_preprocessor, init_cfg)
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                'label_smoothing must be from 0 to below 1, got '
                f'{label_smoothing}'
            )
        if mixup < 0:
            raise ValueError(f'mixup must be 0 or above, got {mixup}')
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.backbone = MODELS.build(backbone)
        self.fc = nn.Linear(in_channels, num_classes)
        # As in mmpretrain and the ResNets of Goyal et al., arXiv:1706.02677.
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self,
        inputs: Tensor,
        data_samples: list[BaseDataElement] | None = None,
        mode: str = 'tensor',
    ) -> Tensor | dict | list[BaseDataElement]:
        """Compute what a mode asks for.

        Args:
            inputs: (B, 3, H, W).
            data_samples: B, each with ``gt_label`` for the loss.
            mode: 'tensor' gives the scores before the softmax, (B, K);
                'loss' a dict with the loss; 'predict' the samples, with
                ``pred_scores``, (K,), which sum up to 1.
        """
        scores = self._scores
        if mode == 'loss':
            return self._loss(inputs, data_samples)
        if mode == 'tensor':
            return scores(inputs)
        if mode != 'predict':
            raise ValueError(
                f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}"
            )
        # In float32, also where autocast has another.
        found = scores(inputs).float().softmax(1)
        samples = data_samples or [BaseDataElement() for _ in found]
        for sample, each in zip(samples, found):
            # Not a view, which would be saved with all of its batch.
            sample.pred_scores = each.clone()
        return samples

    def _scores(self, inputs: Tensor) -> Tensor:
        x = self.backbone(inputs)
        x = x[-1] if isinstance(x, (tuple, list)) else x
        if x.dim() != 4 or x.shape[1] != self.fc.in_features:
            raise ValueError(
                f'in_channels={self.fc.in_features} of the classifier, but '
                f'the last output of {type(self.backbone).__name__} has shape '
                f'{tuple(x.shape)}, expected (B, {self.fc.in_features}, H, W)'
            )
        return self.fc(x.mean((2, 3)))

    def _loss(self, inputs: Tensor, samples: list[BaseDataElement]) -> dict:
        labels = [sample.gt_label for sample in samples]
        targets = F.one_hot(
            torch.tensor(labels, device=inputs.device), self.fc.out_features
        ).float()
        if self.mixup:
            share = float(
                torch.distributions.Beta(self.mixup, self.mixup).sample()
            )
            order = torch.randperm(len(inputs), device=inputs.device)
            inputs, targets = (
                torch.lerp(each[order], each, share)
                for each in (inputs, targets)
            )
        return dict(
            loss=F.cross_entropy(
                self._scores(inputs),
                targets,
                label_smoothing=self.label_smoothing,
            )
        )
