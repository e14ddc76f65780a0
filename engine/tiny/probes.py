"""What the tiny Vicuna can read from logs that it was not trained on."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dataloaders.synthetic.scene import sample_video
from engine.tiny.batch import index_ids, make_batch
from engine.tiny.dialogues import Dialogue, description_turns, frame_log, grounding_turn
from engine.tiny.vicuna import Trainer
from pite.evaluate.metrics import static_oracle_l1, trajectory_l1


@torch.no_grad()
def probe_grounding(
    trainer: Trainer, tokenizer: PreTrainedTokenizerFast, num_frames: int, seed: int = 0, count: int = 256
) -> float:
    """Share of grounding questions about logs of two and three things whose first frame is right to within one frame.

    A question-blind model, which answers with any of the events, reaches about 0.4.
    """
    rng = np.random.default_rng([seed, 21])
    indices = index_ids(tokenizer)
    dialogues: list[Dialogue] = []
    while len(dialogues) < count:
        video = sample_video(rng)
        if len(video.things) > 1:
            turn = grounding_turn(video, int(rng.integers(len(video.things))), num_frames)
            dialogues.append(Dialogue(frame_log(video, num_frames), (turn,)))
    batch = make_batch(dialogues, tokenizer, rng)
    is_index = torch.isin(batch.labels, torch.tensor(indices))
    rows, columns = torch.arange(len(dialogues)), is_index.int().argmax(1)
    predicted = trainer.model.lm_head(trainer.hidden_states(batch)[-1][rows, columns - 1])[:, list(indices)].argmax(1)
    true = torch.tensor([indices.index(token) for token in batch.labels[rows, columns].tolist()])
    return float(((predicted - true).abs() <= 1).float().mean())


@torch.no_grad()
def probe_motion(
    trainer: Trainer, tokenizer: PreTrainedTokenizerFast, num_frames: int, seed: int = 0, count: int = 256
) -> dict[str, float]:
    """Trajectory L1 of descriptions of logs, and that of the static oracle."""
    rng = np.random.default_rng([seed, 22])
    dialogues = []
    for _ in range(count):
        video = sample_video(rng)
        dialogues.append(Dialogue(frame_log(video, num_frames), description_turns(video, num_frames, rng)))
    batch = make_batch(dialogues, tokenizer, rng)
    states = trainer.hidden_states(batch)[-1].float()
    predicted = trainer.path(states[batch.paths.rows, batch.paths.columns]).view_as(batch.paths.points)
    paths = predicted.numpy()[:, None], batch.paths.points.numpy()[:, None]
    return {"trajectory_l1": trajectory_l1(*paths), "static_oracle_l1": static_oracle_l1(paths[1])}
