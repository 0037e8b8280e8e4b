_base_ = [
    '../_base_/models/retinaface_r50_p2-p6.py',
    '../_base_/datasets/wider_face.py',
    '../_base_/schedules/wider_face_100e.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/polynl.py',
]
default_hooks = dict(
    _base_.polynl_default_hooks,
    checkpoint=dict(
        type='polynl_mm.CheckpointHook',
        interval=10,
        max_keep_ckpts=3,
        save_best='wider_face/hard',
        rule='greater',
    ),
)
visualizer = dict(type='polynl_mm.FaceVisualizer')
custom_imports = _base_.polynl_imports
custom_hooks = _base_.polynl_hooks
