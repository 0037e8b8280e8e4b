# Label maps of the test set as the official server takes them: no labels are
# read, and nothing is evaluated.
_base_ = './polynl_r50-d8_4xb2-40k_cityscapes-512x1024.py'
test_pipeline = _base_.test_pipeline
test_pipeline.pop(2)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms.pop(2)
test_dataloader = dict(
    dataset=dict(
        data_prefix=dict(
            img_path='leftImg8bit/test', seg_map_path='gtFine/test'
        ),
        pipeline=test_pipeline,
    )
)
test_evaluator = dict(
    _delete_=True,
    type='CityscapesMetric',
    output_dir='work_dirs/cityscapes_server',
    format_only=True,
    keep_results=True,
)
