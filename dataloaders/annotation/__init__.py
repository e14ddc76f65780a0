"""Videos and event captions to PiTe-143k records, by the steps of PiTe section 3: phrases, masks, tracks, key points.

Each step writes one small file per video, and a step whose file exists is skipped. So a killed run can be resumed, and
you can use another parser, segmenter or tracker: write the files of its step, and this package makes the others.
"""
