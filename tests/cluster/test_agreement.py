"""Hosts that do not run the same are refused before the first step, and a start without a network ends with a sentence."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster
from tests.engine.distributed.ranks import Ranks, launch
from tests.engine.distributed.test_agreement import OTHER_CODE, OTHER_WEIGHTS
from tests.engine.workspace import train_arguments


def on_host(cluster: Cluster, arguments: list[str], differs: list[str], code: str, port: int) -> int:
    """engine.train as one rank on each host; rank 1 has further arguments, and both run `code` before."""
    import torch

    from engine.distributed import start
    from engine.train import main

    rank = int(os.environ["RANK"])
    host, first = cluster.hosts[rank], cluster.hosts[0]
    host.enter()
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": first.address, "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "eth0"}  # these processes share one host name
    socket.gethostname = lambda: host.name
    torch.set_num_threads(1)
    start.START_TIMEOUT = 6.0
    exec(code, {"rank": rank})
    return main([*arguments, *(differs if rank else [])])


def launched(cluster: Cluster, workspace: Path, folder: Path, differs: list[str], code: str = "") -> Ranks:
    cluster.mend()
    arguments = train_arguments(workspace, folder / "run", "1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return launch(2, folder, on_host, cluster, arguments, differs, code, port)


def sentences(ranks: Ranks) -> list[str]:
    """The lines of both ranks that name an error."""
    assert ranks.wait(120) == [1, 1], [ranks.stderr(rank) for rank in range(2)]
    texts = [ranks.stderr(rank) for rank in range(2)]
    assert not any("Traceback" in text for text in texts), texts
    return [line for text in texts for line in text.splitlines() if line.startswith("engine.train:")]


@pytest.mark.parametrize("differs, code, words", [
    (["--seed", "1"], "", "flags.seed is 1 on rank 1 and 0 on rank 0"),
    (["--global-batch", "4"], "", "flags.global-batch is 4 on rank 1 and 8 on rank 0"),
    (["--learning-rate", "1e-3"], "", "flags.learning-rate is 0.001 on rank 1"),
    (["--max-steps", "2"], "", "flags.max-steps is 2 on rank 1"),
    ([], OTHER_CODE, "code.dataloaders is "),
    ([], OTHER_WEIGHTS, "after step 0, the checksum of the parameter "),
])  # fmt: skip
def test_hosts_that_differ(
    cluster: Cluster, workspace: Path, tmp_path: Path, differs: list[str], code: str, words: str
):
    (sentence,) = sentences(launched(cluster, workspace, tmp_path, differs, code))
    assert words in sentence and "rank 1 (hostb) does not run what rank 0 (hosta) runs" in sentence


def test_other_annotations(cluster: Cluster, workspace: Path, tmp_path: Path):
    shutil.copytree(workspace / "data", tmp_path / "data", symlinks=True)
    file = tmp_path / "data" / "stage1" / "localized_narratives.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    differs = ["--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache")]
    (sentence,) = sentences(launched(cluster, workspace, tmp_path, differs))
    assert "data is 23 samples" in sentence and "rank 1 (hostb)" in sentence


OTHER_FOLDER = """
from engine import preflight
preflight.SHARED_SECONDS = 1.0
if rank == 1:
    from pathlib import Path
    from engine.config import RunConfig
    claim = preflight.check_shared
    preflight.check_shared = lambda output, *rest: claim(output / "of another host", *rest)"""


def test_an_output_folder_that_is_not_shared(cluster: Cluster, workspace: Path, tmp_path: Path):
    found = sentences(launched(cluster, workspace, tmp_path, [], OTHER_FOLDER))
    assert len(found) == 1 and "rank 1 (hostb)" in found[0] and "is not the folder" in found[0]
    assert not list((tmp_path / "run").glob("stage1/metrics.jsonl"))


CUT_OFF = """
import os
if rank == 1:
    os.environ["MASTER_PORT"] = "9"
"""


def test_a_start_that_does_not_come_together(cluster: Cluster, workspace: Path, tmp_path: Path):
    """As behind a firewall: hostb cannot reach the store of hosta."""
    found = sentences(launched(cluster, workspace, tmp_path, [], CUT_OFF))
    assert any(f"the key-value store at {cluster.hosts[0].address}:9 does not answer within 6 s" in s for s in found)
    assert any("no heartbeat of rank 1 within 6 s" in s and "GLOO_SOCKET_IFNAME" in s for s in found)
