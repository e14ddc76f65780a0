"""A synthetic world of moving shapes, in the formats of the real data sets: for the demo, tests and ablations.

Scenes are sampled (`scene`), drawn (`render`), described (`language`) and written (`world`). The advantage over
collected data: every trajectory, time and answer is exact, and making a data set takes a minute. The drawback: results
do not show how a model performs on real video.
"""
