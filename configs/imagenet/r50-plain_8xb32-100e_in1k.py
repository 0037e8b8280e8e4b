# Without a block: what the others are compared with.
_base_ = [
    '../_base_/models/resnet50_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_100e.py',
    '../_base_/classification_runtime.py',
]
