_base_ = [
    '../_base_/models/retinaface_r50_p2-p6.py',
    '../_base_/datasets/wider_face.py',
    '../_base_/schedules/wider_face_100e.py',
    'mmdet::_base_/default_runtime.py',
]
default_hooks = dict(
    checkpoint=dict(
        interval=10,
        max_keep_ckpts=3,
        save_best='wider_face/hard',
        rule='greater',
    )
)
visualizer = dict(type='polynl_mm.FaceVisualizer')
custom_hooks = [dict(type='polynl_mm.PolyNLHook')]
