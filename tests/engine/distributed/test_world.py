"""Any number of ranks and micro-batches computes the same as one, with copied and with sharded weights."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dataloaders.samples.batch import collate
from dataloaders.samples.plan import Prefixes, split_batch
from engine.distributed import private, watchdog
from engine.distributed.gradients import Gradients
from engine.distributed.world import World, shard_frozen
from engine.loop import backward_order
from engine.metrics import read_metrics
from engine.train import main
from pite import devices
from tests.engine.distributed.ranks import launch, train
from tests.engine.workspace import train_arguments
from tests.samples import random_samples, related_samples, tiny_model

SAMPLES = 20
MICRO_BATCHES = (1, 2, 4)


def losses_and_gradients(
    world: World, micro_batches: int, sharded: bool, steps: int = 1, share: bool = True
) -> dict[str, torch.Tensor]:
    """The summed losses and gradients after `steps` equal steps, computed as in the training loop.

    All samples have one head of the prompt, and four are about each video.
    """
    model = tiny_model(2)
    samples, features = related_samples(SAMPLES // 4, 4, model.config)
    normalizers = tuple(collate(samples, features).normalizers.tolist())
    model.decoder.checkpoint_activations(1 if micro_batches == 2 else 0)
    if sharded:
        mesh = init_device_mesh("cpu", (world.size,))
        for module in (*model.decoder.layers, model):
            shard_frozen(module, mesh)
    lengths = [len(s.token_ids) for s in samples]
    groups = np.unique([s.media for s in samples], return_inverse=True)[1]
    bins = split_batch(lengths, world.size * micro_batches, 10_000, Prefixes(9, 9 + 8, groups))
    mine = [b[0] for b in bins[world.rank * micro_batches : (world.rank + 1) * micro_batches]]
    # Small buckets of a few parameters, so that most are reduced while backward runs.
    gradients = Gradients(backward_order(model), world.size, bucket_bytes=8_000)
    for _ in range(steps):
        gradients.zero()
        sums = torch.zeros(3)
        for left, members in zip(range(micro_batches)[::-1], mine):
            batch = collate(
                [samples[i] for i in members], [features[i] for i in members], normalizers=normalizers, share=share
            )
            losses = model(batch, head="trajectory", label_smoothing=0.1, trajectory_weight=2.0)
            if left == 0:
                gradients.reduce_in_next_backward()
            losses.total.backward()
            sums += torch.stack([losses.total.detach(), losses.ce, losses.l1])
        gradients.finish(sums)
    return {"sums": sums, **{name: p.grad.clone() for name, p in model.trainable()}}


def reduce_during_backward() -> int:
    world = World.join("cpu")
    model = tiny_model(2)
    model.set_trainable(("vision_adapter", "trajectory_projector"))
    samples, features = random_samples(4, model.config)
    with closing(Gradients(backward_order(model), world.size, bucket_bytes=8_000)) as gradients:
        losses = model(collate(samples, features), head="trajectory")
        gradients.reduce_in_next_backward()
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
            losses.total.backward()
            begun = reduce.call_count
            gradients.finish(torch.zeros(3))
    assert begun == reduce.call_count - 1 > 1, "all buckets, and then the step's numbers"
    world.leave()
    return 0


def write_every_layout(directory: Path) -> int:
    world = World.join("cpu")
    for sharded in (False, True):
        for micro_batches in MICRO_BATCHES:
            found = losses_and_gradients(world, micro_batches, sharded, steps=2)
            torch.save(found, directory / f"{world.size}-{micro_batches}-{sharded}-{world.rank}.pt")
    world.leave()
    return 0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_layout_gives_the_same_loss_and_gradients(tmp_path: Path, size: int):
    reference = losses_and_gradients(World(0, 1, torch.device("cpu")), 1, sharded=False, share=False)
    ranks = launch(size, tmp_path, write_every_layout, tmp_path)
    assert ranks.wait() == [0] * size, ranks.stderr(0)
    for sharded in (False, True):
        for micro_batches in MICRO_BATCHES:
            every = [torch.load(tmp_path / f"{size}-{micro_batches}-{sharded}-{r}.pt") for r in range(size)]
            for name, expected in reference.items():
                error = (every[0][name] - expected).norm()
                assert error <= 1e-5 * expected.norm() + 1e-9, (name, sharded, micro_batches)
                assert all(torch.equal(every[0][name], other[name]) for other in every), "ranks agree bit for bit"


def test_gradients_are_reduced_while_backward_runs(tmp_path: Path):
    ranks = launch(2, tmp_path, reduce_during_backward)
    assert ranks.wait() == [0, 0], ranks.stderr(0)


@pytest.mark.parametrize("nccl2", [False, True])
def test_torchs_own_timeouts_are_longer_than_the_watchdogs(monkeypatch: pytest.MonkeyPatch, nccl2: bool):
    """Torch's NCCL watchdog aborts four dump times after an error. All its other timeouts are longer than ours too.

    That of nccl2 aborts at once, unless its error handling is off.
    """
    monkeypatch.setattr(private, "has_nccl2", lambda: nccl2)
    joined: dict[str, object] = {}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}
    monkeypatch.setattr(os, "environ", {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **place})
    monkeypatch.setattr("engine.distributed.start.connect", lambda rank: dist.HashStore())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backends, **named: joined.update(named))
    monkeypatch.setattr("engine.distributed.world.Watchdog", MagicMock())
    monkeypatch.setattr(devices, "check_computes", lambda device: None)
    stall = 5000.0
    assert World.join(stall=stall).device == torch.device("cuda:1")
    assert joined["timeout"].total_seconds() > stall
    assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > stall
    assert 4 * int(os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) / 1000 > 2 * watchdog.HEARTBEAT_TIMEOUT
    assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == ("0" if nccl2 else None)


def test_more_processes_than_devices_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"1 CUDA device and none is left for its process 2: .*--nproc-per-node 1"):
        World.join()


def test_backward_finishes_gradients_in_the_order_of_the_buckets():
    """Otherwise a bucket would wait for the last gradient, and no all-reduce would overlap with backward."""
    model = tiny_model(2)
    model.set_trainable(("vision_adapter", "trajectory_projector"))
    order = backward_order(model)
    finished: list[torch.nn.Parameter] = []
    for parameter in order:
        parameter.register_post_accumulate_grad_hook(finished.append)
    samples, features = random_samples(3, model.config)
    model(collate(samples, features), head="trajectory").total.backward()
    place = {id(p): i for i, p in enumerate(order)}
    assert len(finished) == len(order)
    # A projection's A and B come together, in either order.
    assert all(abs(i - place[id(p)]) <= 1 for i, p in enumerate(finished))


NUMBERS = ("loss", "ce", "l1", "gradient_norm")


def lines(output: Path, stage: int = 1) -> list[dict[str, float]]:
    return read_metrics(output / f"stage{stage}" / "metrics.jsonl")


@pytest.mark.parametrize("parallel, size", [("ddp", 2), ("fsdp", 2), ("fsdp", 3)])
def test_ranks_train_as_one(workspace: Path, tmp_path: Path, parallel: str, size: int):
    """With three ranks a global batch of four leaves some micro-batches empty."""
    flags = {"global_batch": 4, "max_steps": 4, "token_budget": 80} if size == 3 else {}
    one, many = tmp_path / "one", tmp_path / "many"
    assert main(train_arguments(workspace, one, "1", dtype="float32", **flags)) == 0
    ranks = train(size, tmp_path / "logs", train_arguments(workspace, many, "1", parallel=parallel, **flags))
    assert ranks.wait() == [0] * size, ranks.stderr(0)
    alone, together = lines(one), lines(many)
    assert len(alone) == len(together) == (4 if size == 3 else 6)
    for a, b in zip(alone, together):
        assert a["tokens"] == b["tokens"]
        for name in NUMBERS:
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
    assert (many / "stage1" / "final" / "lineage.json").exists() == (size == 2)


POISON = """
import numpy as np
from dataloaders.store.features import FeatureStore
read = FeatureStore.read
def poisoned(self, key):
    record = read(self, key)
    return np.full_like(record, np.nan) if key == "stage2/v000003" else record
FeatureStore.read = poisoned"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_sample_with_nan_features_is_named_with_its_rank(workspace: Path, tmp_path: Path, parallel: str):
    flags = {"llm": "random", "parallel": parallel, "checkpoint_every": 1}
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path, "2", **flags), POISON)
    assert ranks.wait() == [1, 1]
    (sentence,) = (line for line in ranks.stderr(0).splitlines() if "is not finite" in line)
    assert (
        "rank 0: the loss or gradient of v000003 is" in sentence
        or "rank 1: the loss or gradient of v000003 is" in sentence
    )
    assert "is not finite" not in ranks.stderr(1), "rank 0 prints it for all"
    failed = int(sentence.split("engine.train: step ")[1].split(",")[0])
    saved = sorted(p.name for p in (tmp_path / "stage2" / "checkpoints").iterdir())
    assert saved[-1:] == ([f"step-{failed - 1:08d}"] if failed > 1 else [])
    assert len(lines(tmp_path, 2)) == failed - 1


def test_one_rank_of_a_host_checksums_the_annotations(workspace: Path, tmp_path: Path):
    code = """
from dataloaders import files
read = files.sha256
def noted(path):
    if path.suffix == ".jsonl": open(f"OUTPUT/read{rank}", "a").write(f"{path.name} ")
    return read(path)
files.sha256 = noted""".replace("OUTPUT", str(tmp_path))
    place = 'import os\nos.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}'
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path / "out", "1", max_steps=1), place + code)
    assert ranks.wait() == [0, 0], ranks.stderr(0)
    assert (tmp_path / "read0").read_text() == "localized_narratives.jsonl "
    assert not (tmp_path / "read1").exists()
