"""Labelled walkers of a real video: how well annotation follows things that move."""
