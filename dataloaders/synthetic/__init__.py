"""A small world of moving shapes, written as the real data sets are: the demo, the tests' corpus, the laboratory.

Scenes are sampled (`scene`), drawn (`render`), told (`language`) and written (`world`). The price of drawing instead
of collecting is that nothing here says how a model fares on real video; what it buys is that every trajectory, time
and answer is exact, and that a data set costs a minute.
"""

from dataloaders.synthetic.world import WorldConfig, make_world

__all__ = ["WorldConfig", "make_world"]
