"""A release of WIDER Face in small: the text of its files."""

# An official file in small: trailing blanks, a picture without faces and its
# line of zeros, an invalid face, degenerate boxes, a box over the edge.
OFFICIAL = """\
0--Parade/0_Parade_a_1.jpg
3
449 330 122 149 0 0 0 0 0 0 
10 20 8 30 2 1 1 0 2 1 
5 6 40 50 1 0 0 1 0 0 
0--Parade/0_Parade_a_2.jpg
0
0 0 0 0 0 0 0 0 0 0 
61--Street_Battle/61_Street_b_1.jpg
3
7 8 0 30 0 0 0 0 0 0 
9 9 -2 12 0 0 0 0 0 0 
-3 -4 20 21 0 0 0 0 1 0 
61--Street_Battle/61_Street_b_2.jpg
1
5 6 40 50 1 0 0 1 0 0 
"""  # noqa: W291
NAMES = [line for line in OFFICIAL.splitlines() if line.endswith('.jpg')]
IDS = [name[: -len('.jpg')] for name in NAMES]

# Landmark label files. The faces are those of OFFICIAL, degenerate ones
# included; the second of the first picture has no landmarks.
POINTS = '470 380 0.0 520.5 380 0.0 500 410 1.0 480 440 0.0 515 441 1.0'
ABSENT = ' '.join(['-1.0'] * 15)
KEYPOINTS = [
    [470, 380, 2],
    [520.5, 380, 2],
    [500, 410, 1],
    [480, 440, 2],
    [515, 441, 1],
]
RETINAFACE = f"""\
# {NAMES[0]}
449 330 122 149 {POINTS} 0.82
10 20 8 30 {ABSENT} 0.2
# {NAMES[1]}
# {NAMES[2]}
7 8 0 30 {ABSENT} -1.0
-3 -4 20 21 {ABSENT} 0.4
# {NAMES[3]}
5 6 40 50 {ABSENT} 0.4
"""
SCRFD = f"""\
# {NAMES[0]} 1024 768
449.00000 330.00000 571.00000 479.00000 {POINTS}
10 20 18 50 1
# {NAMES[1]} 1024 800
# {NAMES[2]} 1024 801
-3 -4 17 17 0
# {NAMES[3]} 1024 801
5 6 45 56
"""
