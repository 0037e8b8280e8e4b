# ResNet-50 of mmdet, to be trained from scratch. That of mmseg takes the same
# keys: model.backbone.type='mmseg.ResNet' (model.backbone.into, where a block
# is inserted).
model = dict(
    type='polynl_mm.Classifier',
    data_preprocessor=dict(
        type='polynl_mm.ClsDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='mmdet.ResNet',
        depth=50,
        out_indices=(3,),
        norm_cfg=dict(type='BN', requires_grad=True),
        # mmdet's default is for backbones that were trained before.
        norm_eval=False,
        # Blocks behind conv3 would begin with zeros.
        zero_init_residual=False,
    ),
    in_channels=2048,
    num_classes=1000,
    label_smoothing=0.1,
    mixup=0.2,
)
