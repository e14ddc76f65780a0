"""Encoding on two hosts that share a store: one is much slower, and neither waits for the other."""

from __future__ import annotations

import sys
from pathlib import Path

from dataloaders.store.features import FeatureStore
from tests.clips import save_clip, write_data
from tests.cluster.hosts import Cluster

SLOW = """
import sys, time
from engine.encode import run
store = run._store
run._store = lambda *rest: (time.sleep(float(sys.argv[1])), store(*rest))[1]
from engine.encode.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def test_one_host_is_much_slower(cluster: Cluster, tmp_path: Path):
    cluster.mend()
    data, clip = write_data(tmp_path / "data", 8, 4), tmp_path / "clip"
    save_clip(clip)
    (tmp_path / "program.py").write_text(SLOW)
    flags = {"data": data, "store": tmp_path / "store", "clip": clip, "num-frames": 5, "workers": 0, "device": "cpu"}
    started = []
    for number, (host, delay) in enumerate(zip(cluster.hosts, (0, 2)), 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command += [tmp_path / "program.py", delay, *(f"--{name}={value}" for name, value in flags.items())]
        started.append(host.start([*command, f"--part={number}/2"], tmp_path / f"{host.name}.log"))
    assert started[0].wait(120) == 0, started[0].output
    assert started[1].process.poll() is None, "the slower host goes on alone"
    assert started[1].wait(120) == 0, started[1].output
    keys = [key for kind in ("images", "videos") for key in FeatureStore(tmp_path / "store" / kind).keys]
    assert len(keys) == len(set(keys)) == 2 * 8 + 4
