# The lighter pyramid of the public codes: two anchors per position, from 16
# to 512 pixels, and a sixth of the anchors.
_base_ = './retinaface_r50_p2-p6_8xb4-100e_wider-face.py'
neck = _base_.model.neck
neck[0].update(start_level=1, num_outs=3, add_extra_convs=False)
neck[1].update(
    num_scales=3, in_channels=[256, 256, 256], out_channels=[256, 256, 256]
)
model = dict(
    neck=neck,
    bbox_head=dict(
        share_predictors=False,
        anchor_generator=dict(
            _delete_=True,
            type='AnchorGenerator',
            base_sizes=[16, 64, 256],
            scales=[1, 2],
            ratios=[1.0],
            strides=[8, 16, 32],
            centers=[(4, 4), (8, 8), (16, 16)],
        ),
    ),
)
