"""The labelled walkers of vtest.avi."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bench.annotation.labels import HALVES, check_clip, clip, read_walkers


def test_labels_follow_their_rule() -> None:
    walkers, known = read_walkers(), clip()
    assert len(walkers) >= 20
    assert Counter(walker.half for walker in walkers) == dict.fromkeys(HALVES, 13)
    for walker in walkers:
        assert len(walker.states) == 17 and walker.frames[-1] == walker.frame + 80 < known["frames"]
        assert walker.states[0] == "visible" and "absent" not in walker.states[:4]  # In the picture for 2 s.
        seen = np.array([state == "visible" for state in walker.states])
        assert np.isfinite(walker.boxes[seen]).all() and np.isnan(walker.boxes[~seen]).all()
        left, top, right, bottom = walker.boxes[seen].T
        assert (left >= 0).all() and (top >= 0).all()
        assert (right <= known["width"]).all() and (bottom <= known["height"]).all()
        assert (right - left > 8).all() and (bottom - top > 1.2 * (right - left)).all()  # People stand upright.
    places = [(walker.frame, walker.boxes[0, 0]) for walker in walkers]
    assert places == sorted(places)


def test_another_video_is_refused(tmp_path) -> None:
    (tmp_path / "other.avi").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"other\.avi is not the labelled video; it is in Debian opencv-doc"):
        check_clip(tmp_path / "other.avi")
