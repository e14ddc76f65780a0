"""SAM 3 with few, random weights: phrases in a picture to masks, phrases in a clip to masks with identities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Sam3Config, Sam3VideoConfig, Sam3VideoModel
from transformers.models.sam3_video import modeling_sam3_video

from dataloaders.annotation import steps
from dataloaders.annotation.__main__ import main
from dataloaders.annotation.choices import open_detector, open_tracker
from dataloaders.annotation.sam3 import Sam3Detector, Sam3Tracker, _MaskOperations
from dataloaders.annotation.tracking import Moments
from dataloaders.annotation.video_masks import points_in
from dataloaders.decode.video import iter_frames
from dataloaders.records import ABSENT
from tests.dataloaders.annotation.session_memory import check_forgetting
from tests.media import write_video

SIDE, WIDTH, SMALL = 112, 128, 32
"""Pixels of a frame's side, width of the layers, and pixels of a mask's side: four for each patch of 14."""

WORDS = ["[PAD]", "[END]", "a", "red", "blue", "circle", "square"]


def sizes(**others: int) -> dict[str, int]:
    return {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 32, "num_layers": 1, **others}


def config() -> Sam3VideoConfig:
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "pretrain_image_size": SIDE,
        "window_size": 4,
        "global_attn_indexes": [1],
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": WIDTH,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }
    text = {
        "model_type": "clip_text_model",
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 32,
        "projection_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "eos_token_id": 1,
    }
    detector = Sam3Config(
        vision_config=vision,
        text_config=text,
        geometry_encoder_config=sizes(),
        detr_encoder_config=sizes(),
        detr_decoder_config=sizes(num_queries=6),
        mask_decoder_config={"hidden_size": WIDTH, "num_attention_heads": 2},
    )
    tracker = {
        "model_type": "sam3_tracker_video",
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": WIDTH, "image_size": SIDE, "mask_input_channels": 4},
        "mask_decoder_config": {
            "hidden_size": WIDTH,
            "mlp_dim": 64,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": WIDTH,
        },
        "image_size": SIDE,
        "memory_attention_hidden_size": WIDTH,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 64,
        "memory_attention_rope_feat_sizes": [8, 8],
        "memory_encoder_hidden_size": WIDTH,
        "mask_downsampler_embed_dim": WIDTH,
        "memory_fuser_embed_dim": WIDTH,
        "memory_fuser_intermediate_dim": 64,
        "memory_fuser_num_layers": 1,
    }
    return Sam3VideoConfig(
        detector_config=detector,
        tracker_config=tracker,
        low_res_mask_size=SMALL,
        score_threshold_detection=0.0,
        new_det_thresh=0.0,
        hotstart_delay=0,
        fill_hole_area=2,
    )


@pytest.fixture(scope="module")
def sam3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "sam3"
    Sam3VideoModel(config()).half().save_pretrained(directory)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[END]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "v0.mp4"
    write_video(path, 20)
    return path


def test_phrases_of_a_picture_become_masks(sam3, video, tmp_path) -> None:
    image = next(frame for frame in iter_frames(video, {0}) if frame is not None)
    phrases = ["a red circle", "a blue square"]
    detector = open_detector(sam3, None, threshold=0.0)
    assert isinstance(detector, Sam3Detector)
    found = detector.find_all(image, phrases)
    assert [len(each) for each in found] == [6, 6]  # All queries.
    for box, score, mask in found[0]:
        assert box.shape == (4,) and (box >= 0).all() and (box <= (64, 48, 64, 48)).all()
        assert 0 <= score <= 1 and mask.shape == (48, 64) and mask.dtype == bool
    for best, own in zip(detector(image, phrases), found):
        expected = max(own, key=lambda each: each[1])[2]
        assert (best == expected).all() if expected.any() else best is None
    assert detector(image, []) == []
    # The detector in a directory of its own finds the same.
    detector._model.save_pretrained(tmp_path)
    detector._tokenizer.save_pretrained(tmp_path)
    (alone,) = open_detector(tmp_path, None, threshold=0.0).find_all(image, phrases[1:])
    for (_, score, mask), (_, other, same) in zip(found[1], alone, strict=True):
        assert score == other and (mask == same).all()
    assert Sam3Detector(sam3, threshold=1.0)(image, phrases) == [None, None]
    with pytest.raises(ValueError, match="a SAM 3 makes masks itself; leave out --segmenter"):
        open_detector(sam3, sam3)


def test_an_object_of_a_clip_keeps_its_identity(sam3, video) -> None:
    moments = [Moments(np.array([2, 4, 4, 9])), Moments(np.array([4, 12]))]
    frames = {i: frame for i, frame in enumerate(iter_frames(video, {2, 4})) if frame is not None}
    phrases = [
        [steps.Phrase("a red circle", 0), steps.Phrase("a blue square", 20)],
        [steps.Phrase("a red circle", 0), steps.Phrase("a blue square", 20)],
    ]
    detector, tracker = Sam3Detector(sam3, threshold=0.0), open_tracker(sam3)
    assert isinstance(tracker, Sam3Tracker) and tracker._model.detector_model is detector._model  # Loaded once.
    best = detector(frames[2], ["a red circle"])[0]
    assert best is not None and best.any()
    corner = np.zeros((48, 64), bool)
    corner[:9, :9] = True
    masks: steps.Masks = [[best, None], [None, corner]]
    tracks = tracker(video, moments, masks, phrases)
    assert tracks[0, 0].shape[1:] == (4, 2)
    x, y = (tracks[0, 0][:, 0] * (64, 48)).T
    rows, columns = np.nonzero(best)
    assert (x >= columns.min() - 2).all() and (x <= columns.max() + 3).all()
    assert (y >= rows.min() - 2).all() and (y <= rows.max() + 3).all()
    assert (tracks[0, 0][:, 1] == tracks[0, 0][:, 2]).all()  # Two moments of one frame.
    # Nothing that SAM 3 finds is like the corner, so it is in its first moment only.
    assert (tracks[1, 1][:, 0] != ABSENT).all() and (tracks[1, 1][:, 1] == ABSENT).all()
    assert set(tracks) == {(0, 0), (1, 1)}


def test_what_later_frames_do_not_read_is_forgotten(sam3, tmp_path, monkeypatch) -> None:
    tracker = open_tracker(sam3)
    assert isinstance(tracker, Sam3Tracker)
    # Every other frame becomes one with a given mask, of which the memory reads the last four.
    for name, value in {"recondition_every_nth_frame": 2, "high_conf_thresh": 0, "high_iou_thresh": 0}.items():
        monkeypatch.setattr(tracker._model, name, value)
    monkeypatch.setattr(tracker._model, "max_num_objects", 2)
    mask = np.zeros((48, 64), bool)
    mask[10:30, 10:30] = True
    sizes = check_forgetting(tracker, tracker._model.tracker_model, tmp_path, [[mask]], monkeypatch)
    pointer = 4 * WIDTH
    assert set(np.diff(sizes[16:])) == {0, pointer}, "of each frame with a given mask the pointer is kept"
    assert modeling_sam3_video.cv_utils_kernel is None, "what transformers does elsewhere is as before"


def test_an_object_that_was_hidden_is_absent_meanwhile() -> None:
    """The masks that a session carries: here, hidden, elsewhere."""
    here, none, there = (np.zeros((SMALL, SMALL), bool) for _ in range(3))
    here[4:12, 4:12] = there[16:24, 20:28] = True
    tracks = points_in([here, none, there])
    assert tracks is not None and (tracks[:, 1] == ABSENT).all()
    assert (tracks[:, 2, 0] > 20 / SMALL).all() and (tracks[:, 2, 1] > 16 / SMALL).all()


def test_operations_on_masks_are_computed_without_the_hub() -> None:
    ious = torch.tensor([[1, 0.6, 0], [0.6, 1, 0.05], [0, 0.05, 1]])
    kept = _MaskOperations.generic_nms(ious, torch.tensor([0.5, 0.9, 0.3]), 0.1, use_iou_matrix=True)
    assert kept.tolist() == [1, 2]
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    mask[0, 0, :2, :2] = mask[0, 0, 4:, 4:] = mask[0, 0, 3, 3] = 1  # The last two touch at a corner.
    labels, counts = _MaskOperations.cc_2d(mask, get_counts=True)
    assert counts[0, 0, :2, :2].eq(4).all() and counts[0, 0, :2, 2:].eq(0).all()
    assert counts[0, 0, 3, 3] == counts[0, 0, 5, 5] == 5 and labels[0, 0, 3, 3] == labels[0, 0, 5, 5] != 0


def test_the_command_annotates_with_sam_3_alone(sam3, video, tmp_path, capsys) -> None:
    captions = {"v0": {"duration": 2.0, "timestamps": [[0.2, 0.6]], "sentences": ["a red circle."]}}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    phrases = {"sentence": "a red circle.", "phrases": [{"phrase": "a red circle", "start": 0}]}
    steps.write_json(steps.step_path(tmp_path / "out.steps", "phrases", "v0"), {"events": [phrases]})
    flags = ["--captions", tmp_path / "captions.json", "--videos", video.parent, "--output", tmp_path / "out.jsonl"]
    flags += ["--num-frames", 10, "--workers", 0, "--lost", 0, "--sheets", 0, "--threshold", 0]
    flags += ["--detector", sam3, "--tracker", sam3]
    assert main([str(flag) for flag in flags]) == 0
    assert "1 phrases; 1 of them found in their event's first frame, 1 tracked" in capsys.readouterr().out
    (trajectory,) = json.loads((tmp_path / "out.jsonl").read_text())["trajectories"]
    assert np.array(trajectory["points"]).shape[0] == 3
