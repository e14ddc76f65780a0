"""Videos and event captions to PiTe-143k records, by the steps of PiTe section 3: phrases, masks, tracks, key points.

Each step writes one small file per video, and a step whose file is there is done. So a killed run goes on where it was,
and whoever has a better parser, segmenter or tracker writes that step's files and leaves the others to us.
"""
