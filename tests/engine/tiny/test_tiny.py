"""The tiny models: a tokenizer that behaves like Llama's, and reproducible weights that transformers loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dataloaders.records import Turn
from dataloaders.samples.prompts import SYSTEM
from dataloaders.synthetic.scene import COLOURS, DIRECTIONS, SHAPES, Scene, Thing
from engine.tiny import clip, models, probes
from engine.tiny.__main__ import main
from engine.tiny.batch import CODE_NOISE, PLACE_NOISE, make_batch
from engine.tiny.clip import CHANNELS, PREPROCESSOR, SIZE, code, code_weights, pixel_values
from engine.tiny.code import FIELDS, PRESENCE, SHAPE, SHAPE_SCALE, X, encode, velocities
from engine.tiny.dialogues import KINDS, Dialogue, frame_log, sample_dialogue
from engine.tiny.models import TinyConfig, make_tiny
from engine.tiny.tokenizer import build_tokenizer
from engine.tiny.vicuna import Trainer, build
from tests import SOURCE_PATH
from tests.commands import status_of

CONFIG = TinyConfig(clip_steps=2, vicuna_steps=2, frames=8, seed=1)


@pytest.fixture(scope="module")
def make() -> Iterator[Callable[[Path], Path]]:
    """Makes both models in this process, with short probes: the real ones take far longer than two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "probe_clip", lambda model: {"position R2": clip.probe(model, 0, count=9).position})
        patch.setattr(probes, "probe_grounding", partial(probes.probe_grounding, count=4))
        patch.setattr(probes, "probe_motion", partial(probes.probe_motion, count=4))
        threads = torch.get_num_threads()

        def both(output: Path) -> Path:
            output.mkdir()
            models.make_clip(output / "clip", CONFIG)
            models.make_vicuna(output / "vicuna", CONFIG)
            return output

        yield both
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(make: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny") / "t")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    "text",
    [
        "From 05 to 12, a red circle moves right. From 13 to 31, a blue square moves up.",
        " leading,  double and trailing spaces ",
        "Grüße, 你好, 🚗!\n\ttabs",
        "",
        "GPT-4 scored 97.3% on {json: [1, 2]}",
    ],
)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_of_the_world_and_indices_are_single_tokens(tokenizer):
    for index in range(100):
        assert tokens(tokenizer, f"From {index:02d} to") == ["▁From", f"▁{index:02d}", "▁to"]
    for word in (*COLOURS, *SHAPES, *DIRECTIONS):
        assert tokens(tokenizer, f"a {word}.") == ["▁a", f"▁{word}", "."]
    assert len(tokens(tokenizer, f"{SYSTEM} USER: ")) == 2 + len(("▁USER", ":", "▁"))


def test_spaces_and_special_tokens_behave_as_llamas(tokenizer):
    assert tokens(tokenizer, "From") == ["▁From"]
    assert tokens(tokenizer, " From") == ["▁", "▁From"]
    assert tokens(tokenizer, "\nFrom") == ["▁", "<0x0A>", "From"]
    assert tokens(tokenizer, "to 12.</s>")[-2:] == [".", "</s>"]
    assert tokenizer("From").input_ids[0] == tokenizer.bos_token_id == 1
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2, 0)


def test_offsets_give_the_characters_of_each_token(tokenizer):
    text = "From 05 to 12, a red circle"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert [text[a:b].strip() for a, b in offsets] == ["From", "05", "to", "12", ",", "a", "red", "circle"]


def test_same_seed_gives_the_same_weights(tiny, make, tmp_path):
    second = make(tmp_path / "again")
    for name in ("clip", "vicuna"):
        first, again = (load_file(folder / name / "model.safetensors") for folder in (tiny, second))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_repeating_trains_nothing_and_another_seed_is_refused(tiny, capsys):
    assert make_tiny(tiny, CONFIG) == []
    assert main([str(tiny), "--clip-steps", "2", "--vicuna-steps", "2", "--frames", "8", "--seed", "2"]) == 1
    assert "choose another folder" in capsys.readouterr().err
    assert status_of(main, [str(tiny), "--frames", "101"]) == 2
    assert "--frames must be 2 to 100" in capsys.readouterr().err


def test_transformers_loads_both_and_preprocesses_as_they_were_trained(tiny):
    vision = CLIPVisionModelWithProjection.from_pretrained(tiny / "clip")
    assert vision.visual_projection.weight.shape == (64, 96)
    image = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    processed = CLIPImageProcessor.from_pretrained(tiny / "clip")(Image.fromarray(image[0]), return_tensors="pt")
    torch.testing.assert_close(processed["pixel_values"], pixel_values(image))
    assert PREPROCESSOR["crop_size"]["height"] == vision.config.image_size
    language = LlamaForCausalLM.from_pretrained(tiny / "vicuna")
    saved = AutoTokenizer.from_pretrained(tiny / "vicuna")
    assert saved.is_fast
    assert len(saved) == language.config.vocab_size
    assert language.config.rope_parameters["rope_theta"] == 100_000


def test_a_batch_has_answers_as_labels_and_the_log_as_frames(tokenizer):
    rng = np.random.default_rng(0)
    dialogues = [sample_dialogue(rng, 32) for _ in range(24)]
    batch = make_batch(dialogues, tokenizer, rng)
    exact = np.concatenate([dialogue.log for dialogue in dialogues])
    error = np.abs(batch.codes.numpy() - exact)
    shown = exact[..., PRESENCE] > 0
    assert error[shown][:, X:SHAPE].mean() == pytest.approx(PLACE_NOISE * (2 / np.pi) ** 0.5, rel=0.1)
    assert error[~shown].mean() == pytest.approx(CODE_NOISE * (2 / np.pi) ** 0.5, rel=0.1)
    assert not batch.ids[batch.rows, batch.columns].any()
    assert tokenizer.decode(batch.numbers[batch.rows == 0]).split()[:3] == ["00", "01", "02"][: len(dialogues[0].log)]
    for row, dialogue in enumerate(dialogues):
        learned = tokenizer.decode(batch.labels[row][batch.labels[row] != -100]).split("</s>")
        assert learned.pop() == ""
        assert [answer.strip() for answer in learned] == [turn.answer for turn in dialogue.turns]


def test_the_row_before_each_token_of_a_phrase_has_its_things_path(tokenizer):
    rng = np.random.default_rng(0)
    video, still = (sample_dialogue(rng, 8, [kind == wanted for kind in KINDS]) for wanted in ("description", "still"))
    batch = make_batch([video, still], tokenizer, rng)
    assert batch.paths.points.shape[1:] == (8, 2) and batch.places.points.shape[1:] == (1, 2)
    assert set(batch.paths.rows.tolist()) == {0} and set(batch.places.rows.tolist()) == {1}
    places = batch.places
    colours = {"<c>": None}
    for column, point in zip(places.columns.tolist(), places.points[:, 0]):
        word = tokenizer.decode(batch.ids[1, column + 1])
        if word in COLOURS:
            colours[word] = 4 * (point.numpy() - 0.5)
    del colours["<c>"]
    index = [list(COLOURS).index(colour) for colour in colours]
    assert sorted(index) == np.flatnonzero(still.log[0, :, PRESENCE]).tolist()
    # The mouse circles around the centre.
    np.testing.assert_allclose(list(colours.values()), still.log[0, index, X:SHAPE], atol=4 * 0.05)
    for row in ("paths", "places"):
        found = getattr(batch, row)
        assert (batch.labels[found.rows, found.columns + 1] != -100).all()


def test_first_layer_target_is_the_last_colour_mentioned(tokenizer):
    turns = (
        Turn("When is the red circle there?", "From 00 to 01, before a blue square."),
        Turn("And the circle?", "There is no circle."),
    )
    log = encode(still(("green", "square", (0.5, 0.5))), np.zeros(1, int))
    batch = make_batch([Dialogue(log, turns)], tokenizer, np.random.default_rng(0))
    targets = {"": [], "red": [], "blue": [], "green": []}
    for token, colour in zip(batch.ids[0].tolist(), batch.colours[0].tolist()):
        targets["" if colour == -100 else tokenizer.decode(colour)].append(tokenizer.decode(token))
    assert targets["green"] == []
    assert "circle" not in targets[""]
    assert targets["red"][:2] == ["red", "circle"]
    assert targets["red"][-2:] == ["before", "a"]
    assert targets["blue"][:2] == ["blue", "square"]
    assert targets["blue"][-3:] == ["circle", ".", "</s>"]


def test_a_frame_binds_place_and_shape_to_the_colour(tokenizer):
    torch.manual_seed(0)
    trainer = Trainer(build(len(tokenizer)), tokenizer, 8)
    things = [("red", "circle", (0.25, 0.5)), ("blue", "square", (0.75, 0.5))]
    swaps = [things, [(c, s, p) for (c, s, _), (_, _, p) in zip(things, things[::-1])]]
    swaps.append([(c, s, p) for (c, _, p), (_, s, _) in zip(things, things[::-1])])
    codes = [encode(still(*scene), np.zeros(1, int)) for scene in (*swaps, [])]
    with torch.no_grad():
        rows = trainer.frames(torch.from_numpy(np.concatenate(codes)))
        table = trainer.model.model.embed_tokens.weight
    assert torch.equal(rows[3], table[trainer.nothing])
    for other in rows[1:3]:
        assert (rows[0] - other).abs().mean() > 0.3
    words = tokenizer.encode("nothing red circle blue square", add_special_tokens=False)
    bound = trainer.bound.detach()[[0, 2]]
    parts = bound[:, PRESENCE] + bound[:, X] * torch.tensor([[-1.0], [1.0]])
    parts += SHAPE_SCALE * torch.stack((bound[0, SHAPE], bound[1, SHAPE + 1]))
    torch.testing.assert_close(rows[0], table[words].sum(0) + parts.sum(0))


def still(*things: tuple[str, str, tuple[float, float]]) -> Scene:
    return Scene(1, 30, tuple(Thing(c, s, "", 0, 0, np.array([p])) for c, s, p in things))


def test_a_log_holds_only_visible_things_and_their_velocity():
    path = np.stack((np.linspace(0.1, 0.55, 10), np.full(10, 0.5)), -1)
    log = frame_log(Scene(40, 30, (Thing("red", "circle", "right", 10, 19, path),)), 40)
    assert log.shape == (40, len(COLOURS), FIELDS)
    assert not log[:10].any() and not log[20:].any() and not log[:, 1:].any()
    np.testing.assert_allclose(log[10, 0], [1, -1.6, 0, 0.5, 0, 0], atol=1e-6)
    speeds = velocities(log)
    assert np.isnan(speeds[:12]).all() and np.isnan(speeds[20:]).all() and np.isnan(speeds[:, 1:]).all()
    np.testing.assert_allclose(speeds[12:20, 0], np.tile([0.05, 0.0], (8, 1)), atol=1e-6)


def test_code_of_a_still():
    codes = code([still(("red", "square", (0.5, 0.25)), ("cyan", "circle", (1.0, 0.75))), still()])
    assert codes.shape == (2, CHANNELS) == (2, len(code_weights()))
    assert codes[0, :6].tolist() == [1, 0, -1, 0, 0.5, 0]
    assert codes[0, 30:36].tolist() == [1, 2, 1, 0.5, 0, 0]
    assert codes[0].count_nonzero() == 3 + 4
    assert codes[1].count_nonzero() == 0


def test_the_command_trains_the_missing_model_in_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "vicuna", tmp_path / "models" / "vicuna")
    steps = [f"--{name}-steps=2" for name in ("clip", "vicuna")]
    done = subprocess.run(
        [sys.executable, "-m", "engine.tiny", str(tmp_path / "models"), *steps, "--frames=8", "--seed=1"],
        env={**os.environ, "PYTHONPATH": SOURCE_PATH},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"clip", "vicuna"}
    assert "INFO    clip step 1/2: loss " in done.stderr and "vicuna step" not in done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["clip", f"{tmp_path}/models"]
