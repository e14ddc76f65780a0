"""Chat from a video file to an answer and a drawn trajectory, and evaluation, with random weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from tokenizers import AddedToken

from dataloaders.records import Mention, Sample, Turn
from dataloaders.samples.prompts import prompt_ids, tokenize
from dataloaders.store.features import FeatureStore, Manifest
from engine.tiny.tokenizer import build_tokenizer
from pite import checkpoint
from pite.chat.__main__ import main as chat_main
from pite.chat.reply import named_tracks, token_spans
from pite.evaluate.__main__ import main as evaluate
from pite.evaluate.trajectories import predict_trajectories
from pite.generate import Answer, Generator
from pite.mentions import find_phrases
from tests.commands import status_of
from tests.held_out import CHANNELS, FRAMES, make_held_out, save_clip
from tests.odd_media import write_resized
from tests.samples import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_held_out(tmp_path_factory.mktemp("made"))


def run_chat(made: Path, *more: str, video: str = "data/evaluation/videos/e000000.mp4", clip: str = "clip") -> int:
    """Run chat on a video with the random model; returns the exit status."""
    where = ["--model", f"{made}/model", "--video", f"{made}/{video}", "--clip", f"{made}/{clip}"]
    return status_of(chat_main, [*where, "--query", "What happens?", "--max-new-tokens", "12", *more])


def test_an_answer_is_printed_and_is_the_same_each_time(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_chat(made) == 0
    first = capsys.readouterr().out
    assert first.strip()
    assert run_chat(made) == 0
    assert capsys.readouterr().out == first


def test_a_media_tag_and_an_end_mark_around_the_query_change_nothing(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for query in ("What happens?", "<video>\nWhat happens?", " What happens? <video>", "What happens?</s>"):
        assert run_chat(made, "--query", query) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert run_chat(made, "--query", "What <video> happens?") == 1
    assert "a media tag may be at the start or end only" in capsys.readouterr().err


def test_the_named_objects_are_drawn_on_every_frame(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_chat(made) == 0
    word = capsys.readouterr().out.split()[0]
    assert run_chat(made, "--trajectory", f"{tmp_path}/overlay.mp4", "--phrase", word) == 0
    assert word in capsys.readouterr().err
    with av.open(f"{tmp_path}/overlay.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES


def test_an_answer_without_the_phrase_draws_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_chat(made, "--trajectory", f"{tmp_path}/overlay.mp4", "--phrase", "a flying saucer") == 1
    assert "the answer does not contain 'a flying saucer'" in capsys.readouterr().err
    assert not (tmp_path / "overlay.mp4").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video": "data/none.mp4"}, "none.mp4"),
        ({"video": "clip/config.json"}, "config.json"),
        ({"clip": "none"}, "none"),
        ({"clip": "model"}, "preprocessor_config.json"),
    ],
)
def test_unusable_inputs_are_named_in_one_sentence(
    made: Path, changed: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_chat(made, **changed) == 1
    *logged, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("pite.chat: ") and message in line
    assert all(" INFO " in each for each in logged)


def test_another_clip_than_the_models_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_clip(tmp_path, channels=24)
    where = ["--model", f"{made}/model", "--video", f"{made}/data/evaluation/videos/e000000.mp4"]
    assert chat_main([*where, "--query", "What?", "--clip", str(tmp_path)]) == 1
    assert "gives 24 numbers per frame" in capsys.readouterr().err


def answer_of(generator: Generator, text: str) -> Answer:
    return Answer(text, tuple(generator.tokenizer(text, add_special_tokens=False)["input_ids"]))


def predicted(generator: Generator, question: str, text: str, features: np.ndarray) -> np.ndarray:
    """Trajectories (L, P, N, 2) of an answer's tokens, by the packed model of training."""
    config, none = generator.model.config, np.zeros((3, FRAMES, 2), dtype=np.float32)
    sample = Sample("s", "m", (Turn(question, text, (Mention(0, len(text), none),)),))
    shape = {"num_frames": config.num_frames, "num_points": config.num_points}
    return predict_trajectories(generator.model, [tokenize(sample, generator.tokenizer, **shape)], lambda _: features)[
        0
    ]


def test_token_spans_cover_the_answer(made: Path) -> None:
    generator = Generator.from_pretrained(made / "model")
    text = "From 04 to 20, a red circle moves right. A zebrafish too."
    answer = answer_of(generator, text)
    spans = token_spans(generator.tokenizer, answer)
    assert spans[0, 0] == 0
    assert spans[-1, 1] == len(text)
    np.testing.assert_array_equal(spans[1:, 0], spans[:-1, 1])
    pieces = [text[start:end] for start, end in spans]
    assert "".join(pieces) == text
    assert " circle" in pieces


def test_a_phrase_is_drawn_from_its_own_tokens_during_its_own_sentence(made: Path) -> None:
    generator = Generator.from_pretrained(made / "model")
    text = "From 02 to 05, a red circle moves right. A blue square moves up."
    answer = answer_of(generator, text)
    features = np.random.default_rng(0).standard_normal((FRAMES, CHANNELS)).astype(np.float16)
    every = predicted(generator, "What happens?", text, features)
    circle, square = named_tracks(answer, every, generator.tokenizer)
    assert (circle.label, circle.span) == ("a red circle", (2, 5))
    assert (square.label, square.span) == ("A blue square", None)
    tokens = [generator.tokenizer.decode([token]).strip() for token in answer.token_ids]
    where = tokens.index("red")
    np.testing.assert_allclose(circle.predicted, every[where - 1 : where + 2].mean(0), rtol=1e-5)
    assert circle.predicted.shape == (3, FRAMES, 2)
    assert [phrase.text for phrase in find_phrases(text, FRAMES)] == ["a red circle", "A blue square"]


def set_config(made: Path, tmp_path: Path, **fields: object) -> Path:
    """The random model in a folder of its own, with some fields of its config.json replaced."""
    (tmp_path / "held").mkdir()
    for name in ("data", "clip", "store"):
        (tmp_path / "held" / name).symlink_to(made / name)
    shutil.copytree(made / "model", tmp_path / "held" / "model")
    path = tmp_path / "held" / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return tmp_path / "held"


@pytest.mark.parametrize(
    "fields",
    [
        {"pad_token_id": len(build_tokenizer())},
        {"pad_token_id": -1},
        {"sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": 0},
    ],
)
def test_config_fields_without_effect_change_no_answer(
    made: Path, tmp_path: Path, fields: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """A padding token beyond the vocabulary, a disabled window: the same answers and the same scores."""
    changed = set_config(made, tmp_path, **fields)
    printed = []
    for folder in (made, changed):
        assert run_chat(folder) == 0
        assert evaluated(folder, "grounding") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_prompt_or_sample_beyond_the_context_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = set_config(made, tmp_path, max_position_embeddings=16)
    prompt = (
        r"the prompt of the question '.*' has \d+ tokens, 8 of them frames, and leaves no room for an answer in the 16"
    )
    sample = r"pite_143k.jsonl: 'e0.*': a sequence of \d+ tokens is longer than the 16 positions"
    for command, message in (
        (lambda: run_chat(short), prompt),
        (lambda: evaluated(short, "grounding"), prompt),
        (lambda: evaluated(short, "trajectories"), sample),
    ):
        assert command() == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("pite.") and re.search(message, error)


def test_an_answer_ends_where_the_context_does(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Each answer of a batch is cut at its own room, so it is the same as alone, and the warning comes once."""
    generator = Generator.from_pretrained(made / "model")
    questions, features = ["What?", "What happens in the video?"], [np.ones((FRAMES, CHANNELS), np.float16)] * 2
    lengths = [len(prompt_ids(question, generator.tokenizer, FRAMES)[0]) for question in questions]
    whole = generator.answer(questions, features, max_new_tokens=20)
    assert [len(answer.token_ids) for answer in whole] == [20, 20], "the random model does not end an answer by itself"
    short = Generator.from_pretrained(set_config(made, tmp_path, max_position_embeddings=max(lengths) + 3) / "model")
    for _ in range(2):
        answers = short.answer(questions, features, max_new_tokens=20)
        room = [3 + max(lengths) - length for length in lengths]
        assert [len(answer.token_ids) for answer in answers] == [min(each, 20) for each in room]
        assert [answer.token_ids == full.token_ids[:n] for answer, full, n in zip(answers, whole, room)] == [True, True]
    (warning,) = [record.getMessage() for record in caplog.records if "answers are limited" in record.getMessage()]
    assert "instead of 20 tokens" in warning and "(max_position_embeddings)" in warning


def test_a_token_that_the_model_lacks_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown = set_config(made, tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("ircle", normalized=False)])
    tokenizer.save_pretrained(str(grown / "model"))
    size = len(tokenizer)
    wanted = f"holds token {size - 1} ('ircle'): the tokenizer has {size:,} tokens and the language model an embedding"
    assert run_chat(grown) == 0
    assert run_chat(grown, "--query", "Where is the circle?") == 1
    assert wanted in capsys.readouterr().err
    for task in ("grounding", "trajectories"):
        assert evaluated(grown, task) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("pite.evaluate: ") and wanted in error


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_named(made: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cloned = set_config(made, tmp_path)
    (cloned / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    assert run_chat(cloned) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error
        == f"pite.chat: {cloned}/model/{name} is a git-lfs pointer, not the file itself: run git lfs pull in its folder"
    )


def test_a_query_with_invalid_text_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes in another encoding on the command line."""
    assert run_chat(made, "--query", "Caf\udce9?") == 1
    assert r"the question 'Caf\udce9?' holds half of a character" in capsys.readouterr().err


def evaluated(made: Path, *more: str) -> int:
    where = ["--model", f"{made}/model", "--data", f"{made}/data", "--store", f"{made}/store"]
    return status_of(evaluate, [*more, *where, "--device", "cpu"])


def test_a_models_answers_are_scored_as_its_prediction_file_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(made, "grounding", "--predictions", f"{tmp_path}/p.jsonl", "--batch-size", "3") == 0
    printed = capsys.readouterr().out
    truth = f"{made}/data/evaluation/activitynet_captions.json"
    files = ["--predictions", f"{tmp_path}/p.jsonl", "--ground-truth", truth]
    assert evaluate(["grounding", *files]) == 0
    assert capsys.readouterr().out == printed
    assert evaluated(made, "grounding", "--predictions", f"{tmp_path}/one.jsonl", "--batch-size", "1") == 0
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "p.jsonl").read_text()


def test_trajectories_are_measured_on_held_out_answers(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(made, "trajectories", "--metrics", f"{tmp_path}/scores.json") == 0
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:3])
    scores = json.loads((tmp_path / "scores.json").read_text())["trajectories"]
    keys = {"L1": "L1", "best constant": "constant", "static oracle": "unmoved"}
    assert {name: f"{scores[key]:.4f}" for name, key in keys.items()} == lines
    assert scores["L1"] > scores["constant"] > scores["unmoved"] > 0
    assert float(lines["L1"]) > float(lines["best constant"]) > float(lines["static oracle"]) > 0


@pytest.fixture(scope="module")
def stages(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of stages 1, 2 and 3 in order, and of a stage 3 without a stage 2 before it."""
    root = tmp_path_factory.mktemp("stages")
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    for name, stage, merged in (("1", 1, ()), ("2", 2, ("1",)), ("3", 3, ("1", "2")), ("3-alone", 3, ("1",))):
        (root / name).mkdir()
        tokenizer.save_pretrained(str(root / name))
        lineage = {"stage": stage, "language_model": f"{made}/model", "merged": [f"{root}/{m}" for m in merged]}
        checkpoint.save_stage(model, root / name, lineage)
    return root


@pytest.mark.parametrize(
    ("stage", "warning"),
    [
        ("1", "is of stage 1 without a stage 2, so its trajectory head is untrained"),
        ("2", None),
        ("3", "is of stage 3, which changed the hidden states after its trajectory head was trained in stage 2"),
        ("3-alone", "is of stage 3 without a stage 2, so its trajectory head is untrained"),
    ],
)
def test_stale_or_untrained_trajectory_head_is_warned_about(
    made: Path, stages: Path, tmp_path: Path, stage: str, warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", f"{stages}/{stage}", "--device", "cpu"]
    assert evaluate(["trajectories", *where, "--data", f"{made}/data", "--store", f"{made}/store"]) == 0
    about = ["--video", f"{made}/data/evaluation/videos/e000000.mp4", "--clip", f"{made}/clip", "--query", "What?"]
    assert chat_main([*where, *about, "--max-new-tokens", "4", "--trajectory", f"{tmp_path}/overlay.mp4"]) == 0
    *lines, last = [line for line in capsys.readouterr().err.splitlines() if " WARNING " in line]
    assert "written without points" in last, "the answer of random weights names no object"
    assert len(lines) == (2 if warning else 0)
    assert all(f"WARNING {stages}/{stage} {warning}" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grounding"], "grounding needs --predictions and --ground-truth"),
        (["grounding", "--model", "m"], "--model needs --data and --store"),
        (["trajectories", "--model", "m"], "--data and --store must be given"),
        (["grounding", "--model", "{made}/model", "--data", "{made}/data", "--store", "{made}"], "is no feature store"),
        (
            ["trajectories", "--model", "{made}/model", "--data", "{made}/data", "--store", "{made}"],
            "is no feature store",
        ),
        (["grounding", "--model", "m", "--data", "{made}/data", "--store", "{made}/store"], "--model m is neither"),
        (["grounding", "--model", "{made}/model", "--data", "{made}", "--store", "{made}/store"], "json: no such file"),
    ],
)
def test_missing_flags_and_paths_are_named(
    made: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_flag = "needs" in message or "must be given" in message
    assert status_of(evaluate, [each.replace("{made}", str(made)) for each in arguments]) == (2 if wrong_flag else 1)
    assert message in capsys.readouterr().err


def test_a_question_without_a_place_for_the_sentence_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(made, "grounding", "--question", "When?") == 2
    assert "--question must hold {} once" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["grounding", "trajectories"])
@pytest.mark.parametrize(("tokens", "channels"), [(FRAMES, CHANNELS + 8), (FRAMES + 1, CHANNELS)])
def test_features_of_another_shape_are_refused_before_the_weights_are_read(
    made: Path, tmp_path: Path, command: str, tokens: int, channels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    other = set_config(made, tmp_path)
    (other / "store").unlink()
    FeatureStore.create_or_open(other / "store/videos", Manifest("e", tokens, "none", "none", tokens, channels))
    (other / "model/model.safetensors").unlink()
    assert evaluated(other, command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"store/videos holds {channels} numbers for each of {tokens} frames, but {other}/model takes" in error


def test_predictions_that_cannot_be_written_are_refused_before_the_weights_are_read(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = set_config(made, tmp_path)
    (broken / "model/model.safetensors").unlink()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "p.jsonl"):
        assert evaluated(broken, "grounding", "--predictions", str(path)) == 1
        assert capsys.readouterr().err.startswith(f"pite.evaluate: --predictions {path}")


def test_the_log_level_is_a_flag(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for level, logged in (("info", True), ("warning", False)):
        assert run_chat(made, "--log-level", level) == 0
        assert (" INFO    device " in capsys.readouterr().err) == logged


def test_a_video_whose_frames_change_size(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_resized(made / "resized.ts")
    assert run_chat(made, video="resized.ts") == 0
    word = capsys.readouterr().out.split()[0]
    assert run_chat(made, "--trajectory", f"{tmp_path}/overlay.mp4", "--phrase", word, video="resized.ts") == 0
    with av.open(f"{tmp_path}/overlay.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
