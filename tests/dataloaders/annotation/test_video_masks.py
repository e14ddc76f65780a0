"""A video segmenter with few, random weights carries masks through an event."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    Sam2HieraDetConfig,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VisionConfig,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoModel,
    Sam3VisionConfig,
)
from transformers.models.sam2_video.configuration_sam2_video import (
    Sam2VideoMaskDecoderConfig,
    Sam2VideoPromptEncoderConfig,
)
from transformers.models.sam3.configuration_sam3 import Sam3ViTConfig

from dataloaders.annotation import steps
from dataloaders.annotation.__main__ import main
from dataloaders.annotation.boxes import box_ious
from dataloaders.annotation.choices import open_tracker
from dataloaders.annotation.tracking import Moments
from dataloaders.annotation.video_masks import VideoSegmenter, points_in
from dataloaders.records import ABSENT
from pite.ground.grounding import Grounder
from tests.dataloaders.annotation.session_memory import check_forgetting
from tests.media import write_video
from tests.pite.ground.squares import Colours, parse, place, write_squares

SIZE, WIDTH = 128, 128
DECODER = {"hidden_size": WIDTH, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": WIDTH}


def hiera() -> Sam2VisionConfig:
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[SIZE, SIZE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )
    return Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        fpn_hidden_size=WIDTH,
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
    )


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    prompt = Sam2VideoPromptEncoderConfig(hidden_size=WIDTH, image_size=SIZE, mask_input_channels=4)
    decoder = Sam2VideoMaskDecoderConfig(
        hidden_size=WIDTH, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=WIDTH
    )
    config = Sam2VideoConfig(
        vision_config=hiera(),
        prompt_encoder_config=prompt,
        mask_decoder_config=decoder,
        image_size=SIZE,
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=WIDTH,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=64,
        memory_fuser_num_layers=1,
    )
    directory = tmp_path_factory.mktemp("models") / "sam2"
    Sam2VideoModel(config).half().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def edgetam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With SAM 2's image tower, the default of transformers, because the published RepViT needs timm."""
    torch.manual_seed(0)
    config = EdgeTamVideoConfig(
        vision_config=hiera(),
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIZE, "mask_input_channels": 4},
        mask_decoder_config=DECODER,
        image_size=SIZE,
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=1,
        memory_attention_mlp_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_attention_rope_k_sizes=[4, 4],
        perceiver_resampler_num_latents=16,
        perceiver_resampler_num_latents_2d=16,
        perceiver_resampler_mlp_intermediate_size=32,
        memory_encoder_hidden_size=WIDTH,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=64,
        memory_fuser_num_layers=1,
    )
    directory = tmp_path_factory.mktemp("models") / "edgetam"
    EdgeTamVideoModel(config).half().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sam3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    side = 112
    backbone = Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        pretrain_image_size=side,
        window_size=4,
        global_attn_indexes=[1],
    )
    config = Sam3TrackerVideoConfig(
        vision_config=Sam3VisionConfig(
            backbone_config=backbone, fpn_hidden_size=WIDTH, backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]]
        ),
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": side, "mask_input_channels": 4},
        mask_decoder_config=DECODER,
        image_size=side,
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=WIDTH,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=64,
        memory_fuser_num_layers=1,
    )
    directory = tmp_path_factory.mktemp("models") / "sam3"
    Sam3TrackerVideoModel(config).save_pretrained(directory)
    return directory


def phrases_of(masks: steps.Masks) -> steps.Phrases:
    return [[steps.Phrase("a circle", 0) for _ in event] for event in masks]


def mask_of(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((48, 64), bool)
    mask[rows, columns] = True
    return mask


@pytest.mark.parametrize("kind", ["segmenter", "edgetam"])
def test_masks_are_carried_through_overlapping_events(kind, request, tmp_path) -> None:
    write_video(tmp_path / "v.mp4", 20)
    moments = [Moments(np.array([2, 4, 4, 9])), Moments(np.array([4, 12]))]
    masks: steps.Masks = [[mask_of(slice(10, 30), slice(10, 30)), None], [mask_of(slice(5, 40), slice(30, 60))]]
    model = VideoSegmenter(request.getfixturevalue(kind))
    tracks = model(tmp_path / "v.mp4", moments, masks, phrases_of(masks))
    assert set(tracks) == {(0, 0), (1, 0)}
    for (event, phrase), track in tracks.items():
        assert track.dtype == np.float32 and track.shape[1:] == (len(moments[event].frames), 2)
        rows, columns = np.nonzero(masks[event][phrase])
        x, y = track[:, 0].T
        assert (x >= columns.min() / 64 - 0.05).all() and (x <= (columns.max() + 1) / 64 + 0.05).all()
        assert (y >= rows.min() / 48 - 0.05).all() and (y <= (rows.max() + 1) / 48 + 0.05).all()
    assert (tracks[0, 0][:, 1] == tracks[0, 0][:, 2]).all()  # Two moments of one frame.
    alone = model(tmp_path / "v.mp4", moments[1:], masks[1:], phrases_of(masks[1:]))
    assert (alone[0, 0] == tracks[1, 0]).all()
    nothing: steps.Masks = [[None, None], [None]]
    assert model(tmp_path / "v.mp4", moments, nothing, phrases_of(nothing)) == {}


@pytest.mark.parametrize("kind", ["segmenter", "edgetam"])
def test_what_later_frames_do_not_read_is_forgotten(kind, request, tmp_path, monkeypatch) -> None:
    model = VideoSegmenter(request.getfixturevalue(kind))
    masks: steps.Masks = [[mask_of(slice(10, 30), slice(10, 30))]]
    sizes = check_forgetting(model, model._model, tmp_path, masks, monkeypatch)
    assert len(set(sizes[model._model.config.max_object_pointers_in_encoder :])) == 1


@pytest.mark.parametrize("kind", ["segmenter", "edgetam", "sam3"])
def test_events_share_the_encoded_frame(kind, request, tmp_path) -> None:
    write_video(tmp_path / "v.mp4", 4)
    model = VideoSegmenter(request.getfixturevalue(kind))
    moments = [Moments(np.arange(start, 4)) for start in (0, 1, 1)]
    masks: steps.Masks = [[mask_of(slice(10, 30), slice(10 + i, 30))] for i in range(3)]
    encoded: list[int] = []
    logits: list[torch.Tensor] = []
    model._model.vision_encoder.register_forward_hook(lambda *_: encoded.append(1))
    model._model.register_forward_hook(lambda _, given, output: logits.append(output.pred_masks.clone()))

    def logits_of(events: slice) -> list[torch.Tensor]:
        logits.clear()
        model.carry(tmp_path / "v.mp4", moments[events], masks[events], phrases_of(masks[events]))
        return list(logits)

    together = logits_of(slice(3))
    assert len(encoded) == 4
    alone = [logits_of(slice(i, i + 1)) for i in range(3)]
    assert len(encoded) == 4 + 4 + 3 + 3
    expected = [alone[i].pop(0) for frame in range(4) for i in range(3) if frame in moments[i].frames]
    assert all(torch.equal(*pair) for pair in zip(together, expected, strict=True))


def test_it_carries_what_an_answer_names(segmenter: Path, tmp_path: Path) -> None:
    video = write_squares(tmp_path / "v.mp4", "red")
    (red,) = Grounder(parse, Colours(), every=0.4, tracker=open_tracker(segmenter))(video, "a red square").objects
    assert box_ious(red.found[0].box[None], place("red", 0))[0] > 0.7
    assert red.found.keys() | set(red.hidden) == {0, 4, 8, 12, 16, 19}


def test_an_edgetam_without_its_image_tower_names_timm(tmp_path) -> None:
    if find_spec("timm") is not None:
        pytest.skip("timm is installed")
    tower = {"model_type": "edgetam_vision_model", "backbone_config": {"model_type": "timm_wrapper"}}
    config = {"model_type": "edgetam_video", "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*timm"):
        open_tracker(tmp_path)


def test_sam_3_carries_masks_like_sam_2(sam3, tmp_path) -> None:
    write_video(tmp_path / "v.mp4", 8)
    masks: steps.Masks = [[mask_of(slice(10, 30), slice(10, 30))]]
    tracks = VideoSegmenter(sam3)(tmp_path / "v.mp4", [Moments(np.array([1, 3, 5]))], masks, phrases_of(masks))
    assert tracks[0, 0].shape[1:] == (3, 2)
    x, y = tracks[0, 0][:, 0].T
    assert (x >= 9 / 64).all() and (x <= 31 / 64).all() and (y >= 9 / 48).all() and (y <= 31 / 48).all()


def test_points_keep_their_places_in_the_mask_and_are_absent_without_one() -> None:
    first, second, none = (np.zeros((40, 60), bool) for _ in range(3))
    first[10:20, 5:15] = True
    second[20:40, 30:50] = True
    second[20:30, 30:40] = False
    tracks = points_in([first, second, none])
    assert tracks is not None and tracks.shape == (64, 3, 2)
    assert (tracks[:, 2] == ABSENT).all()
    for k, mask in enumerate((first, second)):
        x, y = (tracks[:, k] * (60, 40)).astype(int).T
        assert mask[y, x].all()
    right = tracks[:, 0, 0] > 12 / 60
    assert (tracks[right, 1, 0] > 40 / 60).all()  # The right side stays the right side.
    assert points_in([none, first]) is None


def test_the_command_tracks_with_it_and_refuses_other_models(segmenter, tmp_path, capsys) -> None:
    write_video(tmp_path / "v0.mp4", 20)
    captions = {"v0": {"duration": 2.0, "timestamps": [[0.5, 1.5]], "sentences": ["A red circle."]}}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    work = tmp_path / "out.steps"
    phrases = {"sentence": "A red circle.", "phrases": [{"phrase": "A red circle", "start": 0}]}
    steps.write_json(steps.step_path(work, "phrases", "v0"), {"events": [phrases]})
    steps.write_masks(steps.step_path(work, "masks", "v0"), [[mask_of(slice(10, 30), slice(10, 30))]])
    flags = ["--captions", tmp_path / "captions.json", "--videos", tmp_path, "--output", tmp_path / "out.jsonl"]
    command = [str(flag) for flag in [*flags, "--workers", 0, "--lost", 0, "--tracker"]]
    assert main([*command, str(tmp_path)]) == 1
    assert "holds no config.json" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "sam"}')
    assert main([*command, str(other)]) == 1
    assert (
        "a sam, where one of sam3_video, sam2_video, sam3_tracker_video, edgetam_video is needed"
        in capsys.readouterr().err
    )
    assert main([*command, str(segmenter)]) == 0
    settings = json.loads((work / "settings.json").read_text())
    assert settings["tracks"] == {"num_frames": 100, "tracker": str(segmenter.resolve())}
    (trajectory,) = json.loads((tmp_path / "out.jsonl").read_text())["trajectories"]
    assert np.array(trajectory["points"]).shape[0] == 3
