"""The data pipeline from annotations and features to packed batches, at PiTe's sizes: `pytest bench/test_data.py`.

512 clips with 100 frames of 768 numbers, 7 mentions each with three dense tracks, answers of about 65 words. Rates are
in `extra_info`. The asserted minimum is what training needs: 100,000 tokens/s per process.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench.measure import environment
from dataloaders.samples.batch import collate
from dataloaders.samples.dataset import StageDataset
from dataloaders.samples.plan import BatchPlan, split_batch
from dataloaders.samples.prompts import SYSTEM
from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest
from dataloaders.store.tools import verify
from engine.batches import StepSource

CLIPS, FRAMES, CHANNELS, POINTS = 512, 100, 768, 3
RECORD_BYTES = 2 * FRAMES * CHANNELS
MANIFEST = Manifest("bench", FRAMES, "linspace truncated", "none", FRAMES, CHANNELS)
NEEDED_TOKENS_PER_SECOND = 100_000
_SENTENCE = (
    "a the man woman dog red ball car street walks turns holds opens jumps into near behind table kitchen small bright "
    "then while slowly camera moves towards door window hand cup water tree green field plays guitar sits down"
)


def annotation(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """A record like those of PiTe-143k: two or three events, about seven mentions, 100 samples per track."""
    answer, trajectories, vocabulary = "", [], _SENTENCE.split()
    tokens: dict[str, float] = {}
    events = int(rng.integers(2, 4))
    for event in range(events):
        answer += f"From <s{event}> to <e{event}>, "
        tokens |= {f"<s{event}>": 18.0 * event, f"<e{event}>": 18.0 * (event + 1)}
        for mention in range(7 // events + 1):
            words = [vocabulary[i] for i in rng.integers(0, len(vocabulary), int(rng.integers(5, 9)))]
            phrase, points = " ".join(words[:3]), rng.random((POINTS, 100, 2)).round(4).tolist()
            times = [tokens[f"<s{event}>"], tokens[f"<e{event}>"]]
            start = len(answer)
            trajectories.append({"turn": 0, "phrase": phrase, "start": start, "times": times, "points": points})
            answer += " ".join(words) + ("." if mention == 7 // events else ",") + " "
    question = "<video>\nCan you describe the video and show me when each event happens?"
    return {
        "source": "internvid",
        "id": f"v{number:06d}",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer.rstrip()}],
        "meta": {"split": [10.0, 64.0], "duration": 54.0, "token": tokens},
        "trajectories": trajectories,
    }


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's, in which each word of this benchmark is one token, as common words are in Vicuna."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = [
        f"{SYSTEM} USER: Can you describe the video and show me when each event happens? ASSISTANT:",
        _SENTENCE,
    ]
    tokenizer.train_from_iterator(
        texts * 9, trainers.BpeTrainer(vocab_size=2000, show_progress=False, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA/stage2 and a store of random features, 79 MB."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "stage2").mkdir()
    with (folder / "stage2/pite_143k.jsonl").open("w") as file:
        file.writelines(json.dumps(annotation(i, rng)) + "\n" for i in range(CLIPS))
    record = rng.standard_normal((64, FRAMES, CHANNELS)).astype(np.float32)
    with FeatureWriter(FeatureStore.create_or_open(folder / "videos", MANIFEST), shard_records=128) as writer:
        for i in range(CLIPS):
            writer.add({f"stage2/v{i:06d}": record[i % 64]})
    return folder


def dataset_of(folder: Path, tokenizer: PreTrainedTokenizerFast, cache: Path | None) -> StageDataset:
    return StageDataset(
        folder,
        2,
        tokenizer,
        num_frames=FRAMES,
        num_points=POINTS,
        max_length=2048,
        available=None,
        cache=cache,
        processes=0,
    )


def report(benchmark: Any, **amounts: float) -> None:
    """Store and print the rates of the median round, with the environment."""
    seconds = benchmark.stats.stats.median
    rates = {name: round(amount / seconds, 3) for name, amount in amounts.items()}
    benchmark.extra_info.update(environment(torch.device("cpu")), **rates)
    print(", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))


def test_store_write(benchmark: Any, tmp_path: Path) -> None:
    """256 records per round: converted, checksummed, written and flushed to disk."""
    records = {f"k{i}": np.random.default_rng(i).standard_normal((FRAMES, CHANNELS), np.float32) for i in range(256)}
    rounds = count()

    def write() -> None:
        with FeatureWriter(FeatureStore.create_or_open(tmp_path / str(next(rounds)), MANIFEST)) as writer:
            writer.add(records)

    benchmark.pedantic(write, rounds=5, warmup_rounds=1)
    report(benchmark, megabytes_per_second=256 * RECORD_BYTES / 1e6, records_per_second=256)


def _drop_from_page_cache(store: Path) -> None:
    """Drop the files of a store from the page cache."""
    for file in store.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@pytest.mark.parametrize("cached", [True, False], ids=["from the page cache", "from disk"])
@pytest.mark.parametrize("advised", [True, False], ids=["advised", "unadvised"])
def test_store_read(benchmark: Any, folder: Path, cached: bool, advised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 128 random records, copied into one array. `unadvised` reads the mapped files without madvise."""
    if not advised:
        monkeypatch.setattr(FeatureStore, "_advise", lambda *_: None)
    rng = np.random.default_rng(0)

    def prepare() -> tuple[tuple[FeatureStore, list[str]], dict[str, Any]]:
        store = FeatureStore(folder / "videos")
        keys = sorted(store.keys)
        if not cached:
            # Mapped pages stay in the cache, and an unused store stays mapped until it is garbage-collected.
            gc.collect()
            _drop_from_page_cache(folder / "videos")
        return (store, [keys[i] for i in rng.permutation(CLIPS)[:128]]), {}

    def read(store: FeatureStore, batch: list[str]) -> np.ndarray:
        store.advise(batch)
        return np.concatenate([store.read(key) for key in batch])

    benchmark.group = "read 128 random records"
    benchmark.pedantic(read, setup=prepare, rounds=12)
    report(benchmark, megabytes_per_second=128 * RECORD_BYTES / 1e6)


def test_store_verify(benchmark: Any, folder: Path) -> None:
    found = benchmark.pedantic(lambda: verify(folder / "videos"), rounds=3)
    assert found.records == CLIPS and not found.damage
    report(benchmark, megabytes_per_second=CLIPS * RECORD_BYTES / 1e6)


def test_plan_of_a_million(benchmark: Any) -> None:
    """The order of an epoch."""
    benchmark.pedantic(lambda: BatchPlan(10**6, 256, seed=0).samples(0), rounds=5)
    report(benchmark, samples_per_second=10**6)


def test_split(benchmark: Any) -> None:
    """256 samples split over eight ranks; every rank computes this in every step."""
    lengths = np.random.default_rng(0).integers(150, 400, 256)
    benchmark.pedantic(lambda: split_batch(lengths, 8, 16384), rounds=50)
    report(benchmark, steps_per_second=1)


def test_tokenize_a_stage(benchmark: Any, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Done once per stage: read, check and tokenize annotations, place tracks on the frames. One process."""
    assert not (folder / "samples").exists(), "this must run before the tests that use the tokenized samples"
    dataset = benchmark.pedantic(lambda: dataset_of(folder, tokenizer, folder / "samples"), rounds=1)
    assert len(dataset) == CLIPS
    report(benchmark, records_per_second=CLIPS)


@pytest.fixture(scope="module")
def indexed(folder: Path, tokenizer: PreTrainedTokenizerFast) -> StageDataset:
    dataset = dataset_of(folder, tokenizer, folder / "samples")
    assert 150 < dataset.tokens.mean() < 300, "PiTe-143k has about 215 tokens a sample"
    return dataset


def test_open_a_tokenized_stage(
    benchmark: Any, folder: Path, indexed: StageDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Done by every other rank and run: checksum the annotations and map the tokenized file."""
    dataset = benchmark.pedantic(lambda: dataset_of(folder, tokenizer, folder / "samples"), rounds=5)
    assert dataset.fingerprint() == indexed.fingerprint()
    report(benchmark, records_per_second=CLIPS)


def test_collate_alone(benchmark: Any, indexed: StageDataset) -> None:
    """64 samples from memory."""
    samples = [indexed[i] for i in range(64)]
    features = [np.zeros((FRAMES, CHANNELS), np.float16)] * 64
    benchmark.pedantic(lambda: collate(samples, features), rounds=30, warmup_rounds=2)
    report(benchmark, tokens_per_second=sum(len(s.token_ids) for s in samples))


@pytest.mark.parametrize("ranks", [1, 8])
def test_step(benchmark: Any, folder: Path, indexed: StageDataset, ranks: int) -> None:
    """One rank's part of 256 samples: plan, samples, features from the store, packing. At least 100,000 tokens/s."""
    plan, store = BatchPlan(CLIPS, 256, seed=0), FeatureStore(folder / "videos")
    source = StepSource(indexed, plan, store, token_budget=16384, ranks=ranks)
    steps: Iterator[int] = count()
    tokens: list[int] = []

    def step() -> None:
        tokens.append(sum(batch.num_tokens for batch in source.step(next(steps)).micro_batches))

    benchmark.pedantic(step, rounds=20, warmup_rounds=4)
    report(benchmark, tokens_per_second=float(np.mean(tokens)), samples_per_second=256 / ranks)
    assert benchmark.extra_info["tokens_per_second"] >= NEEDED_TOKENS_PER_SECOND
