"""LLaVA-1.5 and published projectors load as the second family's model, and are written as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pite.checkpoint import check_trained, from_pretrained, load_language_model
from pite.config import PiTeConfig
from pite.llava import EDGES, EMBEDDINGS, HEAD, PROJECTOR_FILE, VideoTokenWeights, read_projector, write_projector
from pite.names import head_tensors

REFERENCE = Path(__file__).resolve().parents[1] / "golden" / "pg_reference"


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """The reference's model as a LLaVA-1.5: without the three tokens, and with a vision tower in its weights."""
    weights = load_file(REFERENCE / "model.safetensors")
    for name in (EMBEDDINGS, HEAD):
        weights[name] = weights[name][:-3].clone()
    save_file({**weights, "model.vision_tower.vision_tower.x": torch.zeros(2)}, tmp_path / "model.safetensors")
    config = json.loads((REFERENCE / "config.json").read_text())
    del config["mm_use_vid_start_end"]
    changed = {"model_type": "llava_llama", "vocab_size": config["vocab_size"] - 3}
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    return tmp_path


def test_a_base_gets_three_tokens_and_keeps_its_projector(llava: Path) -> None:
    config = PiTeConfig.load(llava, family="pg-video-llava", num_frames=8, num_places=16)
    assert (config.llm.vocab_size, config.video_tokens, config.num_features) == (623, (621, 622), 24)
    assert config.vision_feature_size == 48
    model, weights = load_language_model(llava, config, dtype=torch.float32), load_file(llava / "model.safetensors")
    mean = weights[EMBEDDINGS].mean(0)
    torch.testing.assert_close(model.decoder.embed_tokens[-3:], mean.expand(3, -1))
    torch.testing.assert_close(model.vid_edges, mean.expand(2, -1))
    assert model.lm_head is not None
    torch.testing.assert_close(model.lm_head[-1], weights[HEAD].mean(0))
    assert torch.equal(head_tensors(model)["model.mm_projector.2.weight"], weights["model.mm_projector.2.weight"])


def test_a_base_is_not_trained_and_a_published_model_is(llava: Path) -> None:
    with pytest.raises(ValueError, match="train it first"):
        check_trained(llava)
    check_trained(REFERENCE)


def test_another_projector_is_refused(llava: Path) -> None:
    config = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
    with pytest.raises(ValueError, match="mm_projector_type is 'linear', and only mlp2x_gelu is supported"):
        PiTeConfig.load(llava, family="pg-video-llava")


def test_a_published_projector_file_is_written_and_read(llava: Path) -> None:
    """A folder with LLaVA-1.5 and the file computes what the published model of both does."""
    published = from_pretrained(REFERENCE)
    write_projector(llava / PROJECTOR_FILE, head_tensors(published), published.decoder.embed_tokens)
    raw = torch.load(llava / PROJECTOR_FILE, weights_only=True)
    whole = load_file(REFERENCE / "model.safetensors")
    assert raw.keys() == {EMBEDDINGS, *(name for name in whole if "mm_projector" in name)}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in raw.items())
    check_trained(llava)
    model = from_pretrained(llava)
    for name, tensor in head_tensors(published).items():
        assert torch.equal(tensor, head_tensors(model)[name]), name


def test_a_projector_that_executes_code_or_lacks_the_projector_is_refused(tmp_path: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.zeros(3, 2)}, tmp_path / PROJECTOR_FILE)
    with pytest.raises(ValueError, match=r"holds no model\.mm_projector\.0\.weight"):
        read_projector(tmp_path / PROJECTOR_FILE)
    torch.save({"model.mm_projector.0.weight": Path("x")}, tmp_path / PROJECTOR_FILE)
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_projector(tmp_path / PROJECTOR_FILE)


def test_names_are_those_of_the_parts() -> None:
    weights = {"model.vision_tower.a": torch.zeros(1), EMBEDDINGS: torch.arange(8.0).view(4, 2)}
    found = VideoTokenWeights(REFERENCE, weights, rows=7)
    assert list(found) == [EMBEDDINGS, EDGES] and len(found) == 2
    assert found[EDGES].tolist() == [[3, 4], [3, 4]]
