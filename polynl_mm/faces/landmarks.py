"""The five landmarks of a face.

Wherever they go, they are in this order, which is that of the label files. A
landmark is x and y in pixels and a flag, as in COCO: 0 not annotated (x and y
then mean nothing), 1 annotated but occluded, 2 visible.
"""

# Left and right as the viewer sees them.
LANDMARKS = ('left eye', 'right eye', 'nose', 'left mouth', 'right mouth')
NUM_LANDMARKS = len(LANDMARKS)
# Where each of them comes from in a mirrored picture.
FLIP_INDICES = (1, 0, 2, 4, 3)
