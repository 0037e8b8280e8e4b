# For real time: MobileNetV2, and 64 channels from the pyramid on.
_base_ = './retinaface_r50_p3-p5_8xb4-100e_wider-face.py'
neck = _base_.model.neck
neck[0].update(in_channels=[24, 32, 96, 320], out_channels=64)
neck[1].update(in_channels=[64, 64, 64], out_channels=[64, 64, 64])
# Its last convolution runs, and nobody takes what it gives.
find_unused_parameters = True
model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 6),
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(
            type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2'
        ),
    ),
    neck=neck,
    bbox_head=dict(in_channels=64),
)
