"""A session: its budget, failures of sections, and what is left of it when it is killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import report
from bench.gpu.results import SESSION
from bench.gpu.session import Options, run_session
from tests import SOURCE_PATH
from tests.bench.gpu.pretended import run, section
from tests.test_arrows import ROOT


def records(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / SESSION).read_text())["sections"]


def test_a_failure_is_recorded_and_the_next_section_runs(tmp_path, capsys):
    assert run(tmp_path, "fails", "dies", "absent", "red", "dies_at_its_end", "writes") == 3
    found = records(tmp_path)
    assert [found[name]["state"] for name in found] == ["failed", "failed", "not run", *["done"] * 3]
    assert found["fails"]["problem"] == "RuntimeError: no such kernel and more"
    assert found["dies"]["problem"] == "its process ended with exit code 9"
    content = json.loads((tmp_path / "fails.json").read_text())
    assert "in fails\n" in content["traceback"] and len(content["rows"]) == 1
    assert report.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "# Session on a device, commit abc" in text and "- absent: it is not installed" in text
    assert "| red | what red measures | done, 2 red |" in text and "in fails" in text and "| 99 | none" in text


def test_a_section_that_does_not_fit_is_listed(tmp_path, capsys):
    options = Options(tmp_path, 60, "cpu", time.monotonic())
    assert run_session([section("writes", 100), section("red")], options, section("environment"), ()) == 1
    assert report.main([str(tmp_path)]) == 0
    assert "- writes: needs about 100 s, and " in capsys.readouterr().out
    assert not (tmp_path / "writes.json").exists()


def test_a_section_that_hangs_is_stopped_at_the_end_of_the_budget(tmp_path, capsys):
    begin = time.monotonic()
    assert run(tmp_path, "hangs", "red", budget=3) == 1
    assert time.monotonic() - begin < 100
    assert records(tmp_path)["hangs"]["state"] == "stopped" and records(tmp_path)["red"]["state"] == "not run"
    assert report.main([str(tmp_path)]) == 0
    assert "before it hangs" in capsys.readouterr().out


def test_sections_that_a_killed_session_did_not_reach_are_listed(tmp_path, capsys):
    kill_session(tmp_path / "results", "'hangs', 'red'", '"pid"', 0)
    assert report.main([str(tmp_path / "results")]) == 0
    text = capsys.readouterr().out
    assert "- hangs: killed while it ran" in text and "- red: the session ended before it" in text
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "has no session.json" in capsys.readouterr().err


def test_a_folder_of_another_device_is_refused(tmp_path):
    run(tmp_path, "red")
    content = json.loads((tmp_path / SESSION).read_text())
    (tmp_path / SESSION).write_text(json.dumps(content | {"environment": {"device": "another", "commit": "abc"}}))
    with pytest.raises(ValueError, match="has results of the device another, and this is a device: choose"):
        run(tmp_path, "red")


def test_a_session_goes_on_where_it_was(tmp_path):
    run(tmp_path, "red")
    run(tmp_path, "absent")
    assert list(records(tmp_path)) == ["red", "absent"]


def test_processes_start_from_nothing_where_the_imports_break_the_one_they_are_forked_from(tmp_path):
    """In a process of its own, because this one's forked processes have been started by other tests."""
    (tmp_path / "broken.py").write_text("import os; os._exit(3)")
    code = (
        "import time; from pathlib import Path\n"
        "from bench.gpu.session import Options, run_session; from tests.bench.gpu.pretended import section\n"
        "if __name__ == '__main__':\n"
        f"    options = Options(Path({str(tmp_path / 'results')!r}), 300, 'cpu', time.monotonic())\n"
        "    run_session([section('writes')], options, section('environment'), ['broken'])"
    )
    (tmp_path / "session.py").write_text(code)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE_PATH, str(tmp_path)])}
    program = [sys.executable, tmp_path / "session.py"]
    done = subprocess.run(program, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert "forkserver: its process did not start" in done.stderr
    assert records(tmp_path / "results")["writes"]["state"] == "done", done.stderr


def test_a_device_that_does_not_work_is_one_sentence(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"cpu does not work here \(RuntimeError: no driver is loaded\)"):
        run(tmp_path, "red", environment="no_device")
    assert "RuntimeError" not in capsys.readouterr().err and not list(tmp_path.iterdir())


def kill_session(folder: Path, names: str, field: str, seconds: float) -> None:
    """Start a session in a process of its own, and kill it `seconds` after a section has written `field`."""
    code = f"import sys; from pathlib import Path; from tests.bench.gpu.pretended import run\nif __name__ == '__main__': run(Path(sys.argv[1]), {names})"
    program = folder.with_suffix(".py")
    program.write_text(code)
    variables = {**os.environ, "PYTHONPATH": SOURCE_PATH}
    process = subprocess.Popen([sys.executable, program, folder], cwd=ROOT, env=variables, stderr=subprocess.DEVNULL)
    try:
        while not any(field in path.read_text() for path in folder.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("seed", range(4))
def test_what_was_saved_before_a_kill_is_readable(seed, tmp_path, capsys):
    """SIGKILL at a random moment of a session that writes all the time."""
    folder = tmp_path / "results"
    kill_session(folder, "*['writes', 'step'] * 20", '"rows"', random.Random(seed).uniform(0, 1.5))
    assert report.main([str(folder)]) == 0
    text = capsys.readouterr().out
    states = {name: record["state"] for name, record in records(folder).items()}
    assert all((f"- {name}: killed while it ran" in text) == (state == "running") for name, state in states.items())
    assert states.keys() == {"writes", "step"}
    for name in states:
        if (folder / f"{name}.json").exists():
            rows = json.loads((folder / f"{name}.json").read_text()).get("rows", [])
            assert [row["tiles"] for row in rows] == [str(i) for i in range(len(rows))]


def test_a_section_ends_with_its_session(tmp_path):
    folder = tmp_path / "results"
    kill_session(folder, "'hangs'", '"pid"', 0)
    pid = json.loads((folder / "hangs.json").read_text())["pid"]
    for _ in range(300):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the section runs on")
