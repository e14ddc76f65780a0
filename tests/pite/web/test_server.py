"""What the page's server gives out, and what it refuses, without a browser."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'pite-engine[web]'")

import httpx

from pite.chat.reply import Event, Reply
from pite.draw import Track
from pite.web.__main__ import main
from pite.web.examples import of_demo, of_folder, thumbnail
from pite.web.flags import WebFlags
from pite.web.scene import player, scene
from tests.commands import status_of
from tests.held_out import make_held_out
from tests.media import write_video
from tests.pite.web.conftest import free_port, running
from tests.pite.web.fakes import FakeChat


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def server(example: Path, uploads: Path) -> Iterator[Any]:
    write_video(example.with_name("other.mp4"), 8)
    with running(FakeChat(), uploads, example, max_upload_mb=1) as blocks:
        yield blocks


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "//etc/passwd",
        "../../../../../../etc/passwd",
        "{uploads}/../../../../../../../etc/passwd",
        "{cwd}/pyproject.toml",
        "pyproject.toml",
        "{example}/../other.mp4",
        "http://127.0.0.1:1/x",
        "http:/127.0.0.1:1/x",
        "file:///etc/passwd",
    ],
)
def test_no_file_outside_is_given_out(server: Any, example: Path, uploads: Path, path: str) -> None:
    given = path.format(uploads=uploads, cwd=Path.cwd(), example=example)
    answer = httpx.get(f"{server.address}/gradio_api/file={given}", timeout=60)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text and "pite-engine" not in answer.text


def test_the_example_is_given_out_in_parts(server: Any, example: Path) -> None:
    whole = httpx.get(f"{server.address}/gradio_api/file={example}", timeout=60)
    assert whole.content == example.read_bytes() and whole.headers["content-type"] == "video/mp4"
    assert "default-src 'self'" in whole.headers["content-security-policy"]
    part = httpx.get(f"{server.address}/gradio_api/file={example}", headers={"Range": "bytes=4-7"}, timeout=60)
    assert part.status_code == 206 and part.content == b"ftyp"


@pytest.mark.parametrize("path", ["/etc/passwd", "{example}", "http://127.0.0.1:1/x.mp4", "https://example.org/x.mp4"])
def test_a_forged_upload_is_refused(server: Any, example: Path, path: str) -> None:
    """A request with a path or an address where the browser puts its own upload."""
    functions = server.fns.items()
    (number,) = [number for number, function in functions if function.name == "_receive"]
    file = {"path": path.format(example=example), "meta": {"_type": "gradio.FileData"}}
    api = f"{server.address}/gradio_api/queue"
    body = {"data": [None, file], "fn_index": number, "session_hash": "forged"}
    assert httpx.post(f"{api}/join", json=body, timeout=60).status_code == 200
    messages = httpx.get(f"{api}/data", params={"session_hash": "forged"}, timeout=60).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in messages if line]
    (done,) = [event for event in events if event["msg"] == "process_completed"]
    assert done["success"] is False
    assert "root:" not in json.dumps(events)


def test_a_large_upload_is_refused(server: Any) -> None:
    files = {"files": ("large.mp4", b"0" * (1 << 20) + b"1", "video/mp4")}
    assert httpx.post(f"{server.address}/gradio_api/upload", files=files, timeout=60).status_code == 413


def test_nothing_is_sent_to_gradios_makers(server: Any) -> None:
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert server.analytics_enabled is False and server.share_url is None
    config = httpx.get(f"{server.address}/config", timeout=60).text
    for outside in ("googleapis", "gstatic", "cdnjs", "jsdelivr"):
        assert outside not in config


def test_the_server_looks_up_and_connects_to_this_machine_only(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it starts, and while it makes the page."""
    hosts, look_up, connect = [], socket.getaddrinfo, socket.socket.connect

    def looked_up(host: Any, *more: Any, **options: Any) -> Any:
        hosts.append(host)
        return look_up(host, *more, **options)

    def connected(self: socket.socket, address: Any) -> None:
        hosts.append(address[0])
        connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(socket.socket, "connect", connected)
    with running(FakeChat(), tmp_path, example) as blocks:
        assert httpx.get(blocks.address, timeout=60).status_code == 200
    assert hosts and set(hosts) <= {"127.0.0.1", "localhost", "::1"}


def test_it_listens_on_this_machine_only(server: Any) -> None:
    assert server.server_name == "127.0.0.1" == WebFlags().host
    assert server.max_file_size == 1 << 20 or server.max_file_size == 10**6


def test_the_command_loads_the_model_and_opens_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gradio

    made, port, pages = make_held_out(tmp_path), free_port(), []
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda _: pages.append(httpx.get(address, timeout=60)))
    where = ["--model", f"{made}/model", "--clip", f"{made}/clip", "--examples", f"{made}/data/evaluation/videos"]
    assert status_of(main, [*where, "--port", str(port), "--device", "cpu"]) == 0
    assert address in capsys.readouterr().out.splitlines()
    (page,) = pages
    assert page.status_code == 200 and "pite-scene" in page.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(address, timeout=60)


def test_a_port_in_use_is_named(example: Path, tmp_path: Path) -> None:
    from pite.web.page import Page
    from pite.web.server import start

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}: "):
            start(Page(FakeChat()), WebFlags(port=port), tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "0"], "--port must be 1 to 65535, not 0"),
        (["--queue", "0"], "--queue must be at least 1, not 0"),
        (
            ["--every", "1", "--stanza", "s"],
            "--stanza and --every: give --ground, too: without it nothing is found in the video",
        ),
        (["--host", " "], "--host is empty: give an address, such as 127.0.0.1"),
    ],
)
def test_flags_are_checked(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, flags) == 2
    assert capsys.readouterr().err == f"pite.web: {message}\n"


def test_without_a_demo_the_command_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, ["--demo", f"{tmp_path}/demo"]) == 1
    assert capsys.readouterr().err == (
        f"pite.web: --demo {tmp_path}/demo: there is no finished demo: run `make demo`, or give --model and --clip\n"
    )


def test_the_demos_model_encoder_and_videos_are_chosen(tmp_path: Path) -> None:
    flags = WebFlags(demo=tmp_path)
    assert flags.chosen_model == tmp_path / "run/stage2/final"
    assert flags.chosen_clip == f"{tmp_path}/models/clip"
    assert WebFlags(model=tmp_path, clip="c").chosen_clip == "c"
    make_held_out(tmp_path)
    examples = of_demo(tmp_path, objects=1) + of_demo(tmp_path, objects=2)
    assert examples and all(example.path.is_file() for example in examples)
    assert all("{}" not in question for example in examples for question in example.questions)
    folder = of_folder(tmp_path / "data/evaluation/videos")
    assert [example.path.name for example in folder] == [f"e{i:06d}.mp4" for i in range(4)]
    picture = thumbnail(folder[0].path)
    assert picture is not None and max(picture.size) <= 240
    assert thumbnail(tmp_path / "data/evaluation/activitynet_captions.json") is None


def test_texts_are_escaped(tmp_path: Path) -> None:
    import numpy as np

    evil = "<script>\"'</script>"
    event = Event((0, 1), (0.0, 1.0), evil)
    reply = Reply(evil, (), (event,), (Track(evil, np.zeros((1, 2, 2))),), 2, 2.0, (0.0, 1.0))
    assert "<script>" not in scene(reply) and "<script>" not in player(tmp_path / evil)
