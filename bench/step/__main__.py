"""The training step and its peers: `python -m bench.step --model 7b` on a GPU, `pytest bench/test_step.py` on a CPU.

Every implementation trains the same LoRA and trajectory head with the same weights, samples and AdamW. They are timed
in turn, and only after their loss agrees with ours. Sample tokens are those of the
samples, not padding; ours computes the rows that samples share once, so it computes fewer.

  pite             packed: forward, backward, clipping and update as in engine.train
  pite loop        engine.loop.train: also with collation, copies to the device and the check for finite numbers; timed
                   before the others, not in turn with them
  pite unshared    `pite`, computing what samples have in common for each of them; `--only` selects it
  pite compiled    `pite` with --compile
  pite fp8         `pite` with --frozen-dtype fp8 (sm_89 and newer)
  hf padded        transformers + peft as in earlier work (VTimeLLM's recipe): right-padded micro-batches of eight
                   samples in order, activation checkpointing, full logits, the head on every position
  hf padded, kept  the same without activation checkpointing
  hf packed        transformers + peft on the packed row, with liger-kernel on CUDA; attention is flash-attn if it is
                   installed, else ours
  unsloth          `hf padded` with unsloth's Llama and its activation checkpointing. It patches transformers for the
                   whole process, so it is not timed with the others; `--only unsloth` times it together with ours
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.measure import environment
from bench.step.implementations import NAMES, TOGETHER, peer_bytes
from bench.step.problem import RECIPE, make_problem, paper_shape, tiny_shape
from bench.step.rows import describe, measure
from dataloaders.files import write_atomically
from engine.distributed.world import grow_segments

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("tiny", "7b", "13b"), default="tiny", help="shape; the weights are random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--token-budget", type=int, help="tokens per packed micro-batch; default: what fits")
    parser.add_argument("--memory", type=float, help="memory for the layout in GB; default: the device's")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(TOGETHER), help="implementations")
    parser.add_argument("--output", type=Path, help="result file; default: bench/results/step_<device>.json")
    options = parser.parse_args(arguments)
    grow_segments()  # as engine.train does
    device = torch.device(options.device)
    tiny = options.model == "tiny"
    shape = tiny_shape() if tiny else paper_shape(options.model)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    capacity = None
    if options.memory:
        capacity = options.memory * 1e9
    elif device.type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory - peer_bytes(shape.config, options.only)
    rank = 16 if tiny else RECIPE.lora_rank
    try:
        problem = make_problem(shape, device, dtype, rank, options.token_budget, capacity)
    except ValueError as error:
        print(f"bench.step: {error}, or measure fewer at once (--only)", file=sys.stderr)
        return 1
    rows = measure(options.model, problem, options.rounds, options.only)
    print(f"{options.model}: {len(problem.samples)} samples, {problem.tokens:,} tokens, {problem.rows:,} computed rows")
    print("\n".join(map(describe, rows)))
    described = environment(device)
    path = options.output or RESULTS / f"step_{described['device'].split(',')[0].replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if row["model"] != options.model or row["implementation"] not in options.only]
    content = {
        "environment": described,
        "rows": kept + [vars(row) for row in rows if row.implementation in options.only],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
