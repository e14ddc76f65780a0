"""A small world of moving shapes in the form of the real data sets: for the demo, the tests and ablations.

`scene` samples scenes, `render` draws them, `language` describes them, `world` writes the data folder. A drawn world does
not show how a model performs on real video. In exchange every trajectory, time and answer is exact, and a data set takes
a minute to make.
"""
