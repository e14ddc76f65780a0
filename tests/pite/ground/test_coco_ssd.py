"""The graph of a coco-ssd in small: four anchors, one for each quarter of the picture. The right half of it is bright."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pite.ground import models
from pite.ground.coco_ssd import CocoSsd, _convolution, _decoded
from pite.ground.detectors import CocoThings
from pite.ground.flags import GroundFlags

HALF = 150
CAR, DOG = 3, 18
"""COCO's numbers."""


def write_ssd(folder: Path) -> Path:
    """A car's score is the brightness of a quarter; all other scores are 0. A box is its quarter, moved right by a tenth."""
    kernel = np.zeros((HALF, HALF, 3, 91), np.float32)
    kernel[..., CAR] = 1 / (HALF * HALF)
    bias = np.full(91, -20, np.float32)
    bias[CAR] = 0
    corners = np.array([[y, x, y + 0.5, x + 0.5] for y in (0, 0.5) for x in (0, 0.5)], np.float32)
    weights = {
        "scores/weights": kernel,
        "scores/bias": bias,
        "boxes/weights": np.zeros((HALF, HALF, 3, 4), np.float32),
        # A tenth of the picture is two tenths of an anchor's width; the encoding is ten times that.
        "boxes/bias": np.array([0, 2, 0, 0], np.float32),
        "Postprocessor/ExpandDims": corners[None],
        "boxes/shape": np.array([1, 4, 1, 4], np.int32),
        "scores/shape": np.array([1, 4, 91], np.int32),
    }

    def node(name: str, op: str, *inputs: str, **attr: Any) -> dict[str, Any]:
        return {"name": name, "op": op, "input": list(inputs), "attr": attr}

    strides = {"strides": {"list": {"i": ["1", str(HALF), str(HALF), "1"]}}, "padding": {"s": [*b"SAME"]}}
    nodes = [node(name, "Const") for name in weights]
    for name, end in (("boxes", "Squeeze"), ("scores", "Postprocessor/convert_scores")):
        nodes += [
            node(f"{name}/conv", "Conv2D", "Preprocessor/sub", f"{name}/weights", **strides),
            node(f"{name}/add", "BiasAdd", f"{name}/conv", f"{name}/bias"),
            node(f"{name}/reshape", "Reshape", f"{name}/add", f"{name}/shape"),
            node(end, "Squeeze" if name == "boxes" else "Sigmoid", f"{name}/reshape"),
        ]
    entries = [{"name": n, "shape": w.shape, "dtype": w.dtype.name} for n, w in weights.items()]
    content = b"".join(weight.tobytes() for weight in weights.values())
    (folder / "shard1").write_bytes(content[:1000])
    (folder / "shard2").write_bytes(content[1000:])
    manifest = [{"paths": ["shard1", "shard2"], "weights": entries}]
    (folder / "model.json").write_text(json.dumps({"modelTopology": {"node": nodes}, "weightsManifest": manifest}))
    return folder


@pytest.fixture
def picture() -> np.ndarray:
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 40:] = 255
    return image


def test_boxes_and_scores_are_those_of_the_anchors(tmp_path: Path, picture: np.ndarray) -> None:
    boxes, scores = CocoSsd(write_ssd(tmp_path))(picture)
    np.testing.assert_allclose(boxes, [[8, 0, 48, 30], [48, 0, 80, 30], [8, 30, 48, 60], [48, 30, 80, 60]], atol=1e-4)
    bright, dark = 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(3))
    np.testing.assert_allclose(scores[:, CAR], [dark, bright, dark, bright], atol=2e-3)
    assert scores[:, DOG].max() < 1e-6


def test_things_are_found_by_their_kind(tmp_path: Path, picture: np.ndarray) -> None:
    things = CocoThings(write_ssd(tmp_path), "cpu", 0.35)
    assert things.tags(["The red cars", "a cyclist", "two sofas"]) == ["person", "car", "couch"]
    found = things(picture, ["person", "car"])
    assert [(each.tag, each.box.round().tolist()) for each in found] == [
        ("car", [48, 0, 80, 30]), ("car", [48, 30, 80, 60])
    ]  # fmt: skip


def test_padding_is_tensorflows_same() -> None:
    """An odd column and row are added at the end only."""
    attr = {"strides": {"list": {"i": ["1", "2", "2", "1"]}}}
    pixels, weight = torch.ones(1, 4, 4, 2), torch.ones(3, 3, 2, 1)
    assert _convolution(attr, pixels, weight).squeeze().tolist() == [[18, 12], [12, 8]]
    assert _convolution(attr, pixels, weight, depthwise=True)[0, ..., 1].tolist() == [[9, 6], [6, 4]]
    odd = _convolution(attr, torch.ones(1, 5, 5, 2), weight)
    assert odd.squeeze().tolist() == [[8, 12, 8], [12, 18, 12], [8, 12, 8]]


def test_sides_are_exponents() -> None:
    anchors = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    encodings = torch.tensor([[1.0, 0.0, 0.0, 5 * float(np.log(2))]])
    np.testing.assert_allclose(_decoded(encodings, anchors), [[0.1, 0.42, 0.9, 0.62]], atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"Sigmoid"', '"Softmax"', "operations that are not computed here: Softmax; give"),
        ("[83, 65, 77, 69]", "[86, 65, 76, 73, 68]", "not computed here: Conv2D with padding VALID; give"),
        ("[83, 65, 77, 69]", '"VkFMSUQ="', "not computed here: Conv2D with padding VALID; give"),
        ('"Squeeze", "op"', '"Other", "op"', r"no coco-ssd of TensorFlow\.js: its graph has no Squeeze"),
        ('"float32"', '"float99"', r"no coco-ssd of TensorFlow\.js \(KeyError"),
        ('"modelTopology"', '"model"', r"no coco-ssd of TensorFlow\.js \(KeyError"),
    ],
)
def test_another_graph_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = write_ssd(tmp_path) / "model.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        CocoSsd(tmp_path)


def test_cut_off_weights_are_refused(tmp_path: Path) -> None:
    (write_ssd(tmp_path) / "shard2").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no coco-ssd of TensorFlow\.js"):
        CocoSsd(tmp_path)


def test_strings_of_the_graph_may_be_base64(tmp_path: Path, picture: np.ndarray) -> None:
    boxes, scores = CocoSsd(write_ssd(tmp_path))(picture)
    file = tmp_path / "model.json"
    file.write_text(file.read_text().replace("[83, 65, 77, 69]", '"U0FNRQ=="'))
    same_boxes, same_scores = CocoSsd(tmp_path)(picture)
    assert (boxes == same_boxes).all() and (scores == same_scores).all()


def test_the_folder_decides_on_the_detector(tmp_path: Path) -> None:
    flags = GroundFlags(video=(Path("a.mp4"),), output=tmp_path, answer="A car.", detector=write_ssd(tmp_path))
    assert isinstance(models.detector_of(flags, "cpu"), CocoThings)
    with pytest.raises(
        ValueError, match=r"--segmenter needs the boxes of a GroundingDINO, and --detector .* is a coco-ssd"
    ):
        models.detector_of(replace(flags, segmenter=tmp_path), "cpu")
