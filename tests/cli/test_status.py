"""`nerve-status`: runs in every state, read from their directories alone."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nerve.cli.status import main, status_of
from nerve.config import quoted
from nerve.storage.record import RunRecord
from nerve.storage.record_file import RECORD_NAME
from nerve.storage.state import LOCK_NAME, RunLock
from nerve.storage.store import RunStore

ROW = {
    "layer": 0,
    "ffn": "ffn",
    "tokens_seen": 0,
    "n_samples": 8,
    "d_ff": 4,
    "d_in": 2,
    "status": "ok",
}
NewRun = Callable[..., RunRecord]


@pytest.fixture
def new_run(tmp_path, monkeypatch) -> NewRun:
    """Makes a run of 100 steps that began just now, with the `overrides` of its command line."""
    monkeypatch.chdir(tmp_path)

    def create(name: str, *overrides: str, **values) -> RunRecord:
        record = RunRecord.create(f"sweep/{name}", {"trainer": {"max_steps": 100}}, **values)
        if overrides:
            (record.directory / ".hydra").mkdir()
            (record.directory / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
        return record

    return create


@pytest.fixture
def at_work() -> Iterator[Callable[[RunRecord], None]]:
    """Takes the locks of runs, like their processes."""
    locks: list[RunLock] = []
    yield lambda record: locks.append(RunLock(record.directory))
    for lock in locks:
        lock.release()


def heard(record: RunRecord, seconds_ago: float, step: int = 0) -> None:
    """Sets the age of the heartbeat."""
    record.update(step=step)
    path = record.directory / RECORD_NAME
    then = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    changed = {"heartbeat": then.isoformat(), "checksum": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.fixture
def status(monkeypatch, capsys) -> Callable[..., tuple[list[str], str]]:
    """Calls `nerve-status`; returns the rows of its table without repeated blanks, and the lines
    below it."""

    def call(*paths: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "argv", ["nerve-status", *paths])
        main()
        out = capsys.readouterr().out
        rows = [re.sub(r"[ │]+", " ", line).strip() for line in out.splitlines() if "│" in line]
        return rows, out.rpartition("┘")[2]

    return call


def test_all_states_are_distinguished(new_run, at_work, status):
    """A dead and a slow run have both been silent for long, but a process holds the lock of one."""
    for name in ("running", "slow"):
        at_work(new_run(name))
    heard(RunRecord.load("sweep/slow"), 300, step=7)
    heard(new_run("dead"), 300, step=8)
    new_run("done").finish("done", step=100, final={"val_loss": 1.25})
    new_run("failed", job={"id": "7"}).finish("failed", error=ValueError("no such value"))
    new_run("interrupted", job={"id": "9", "array_id": "8", "array_task": "3"}).finish(
        "interrupted", step=50
    )
    new_run("unreadable")
    Path("sweep/unreadable", RECORD_NAME).write_text("{")
    rows, below = status("sweep")
    host = os.uname().nodename
    assert rows == [
        f"sweep/dead dead 8/100 – 5 min ago {host}",
        f"sweep/done done 100/100 1.250 {host}",
        f"sweep/failed failed 0/100 – {host} 7",
        f"sweep/interrupted interrupted 50/100 – {host} 8_3",
        f"sweep/running running 0/100 – {rows[4].split()[4]} s ago {host}",
        f"sweep/slow slow 7/100 – 5 min ago {host}",
        "sweep/unreadable unreadable –",
    ]
    assert "7 runs: 1 running, 1 slow, 1 done, 1 interrupted, 1 dead, 1 failed, 1 unread" in below
    assert "sweep/failed failed: ValueError: no such value" in below
    assert "sweep/unreadable/run.json is not the record of a run" in below


def test_warnings_of_one_kind_are_one_line_and_errors_are_one_each(new_run, status):
    for name, loss in (("a", "5.1"), ("b", "5.2"), ("d", "5.3")):
        new_run(name).finish("done", warning=f"untrained: the loss of {loss} nats")
    new_run("c").finish("done", warning="unlucky: for once")
    for name in ("e", "f"):
        new_run(name).finish("failed", error=ValueError("no such value"))
    _, below = status("sweep")
    assert below.splitlines()[2:] == [
        "sweep/e failed: ValueError: no such value",
        "sweep/f failed: ValueError: no such value",
        "sweep/a done: untrained: the loss of 5.1 nats; untrained as well: sweep/b, sweep/d",
        "sweep/c done: unlucky: for once",
    ]


def test_a_run_that_lives_without_getting_anywhere_says_since_when(new_run, at_work, status):
    """As one whose processes wait for each other, or that measures a large model."""
    for name, minutes in (("moving", 0.5), ("stuck", 9)):
        record = new_run(name)
        at_work(record)
        then = datetime.now(UTC) - timedelta(minutes=minutes)
        record.update(step=7, advanced=then.isoformat(timespec="seconds"))
    new_run("ended").finish("interrupted", advanced="2026-01-01T00:00:00+00:00")
    rows, _ = status("sweep")
    assert re.search(r" running 7/100 – .* s ago \w", rows[1])
    assert re.search(r" running 7/100 – .* s ago 9 min( \d+ s)? ago", rows[2])
    assert " ago" not in rows[0]


def test_a_heartbeat_from_a_clock_that_is_ahead_counts_as_now(new_run, at_work, status):
    ahead = new_run("ahead")
    at_work(ahead)
    heard(ahead, -600)
    rows, _ = status("sweep")
    assert " running 0/100 – 0 s ago " in rows[-1]


def test_rows_show_the_differing_overrides_and_are_sorted_by_them(new_run, status):
    for name, seed in (("c", 1), ("a", 2), ("b", 0)):
        new_run(name, "model.n_layers=2", f"seed={seed}").finish("done", final={"val_loss": seed})
    rows, _ = status("sweep")
    assert [row.split()[:2] for row in rows] == [
        ["sweep/b", "seed=0"],
        ["sweep/c", "seed=1"],
        ["sweep/a", "seed=2"],
    ]


def test_brackets_in_an_override_are_shown_literally(new_run, status):
    """Rich would take [stdlib] for a style and fail at [/data]."""
    for name, roots in (("a", "[stdlib]"), ("b", "[/data/code]")):
        new_run(name, f"data.corpus.roots={roots}").finish("done")
    rows, _ = status("sweep")
    shown = [row.split()[1] for row in rows]
    assert sorted(shown) == ["data.corpus.roots=[/data/code]", "data.corpus.roots=[stdlib]"]


def test_the_step_is_that_of_the_last_measurement_if_it_is_ahead_of_the_heartbeat(new_run, at_work):
    record = new_run("a")
    at_work(record)
    store = RunStore(record.directory, record.run_id)
    store.append_metrics([ROW | {"step": 40, "val_loss": 2.5}])
    store.flush(40)
    heard(record, 0, step=1)
    shown = status_of(record.directory)
    assert (shown.record.progress, shown.val_loss) == ("40/100", 2.5)


def test_several_paths_are_shown_together_and_outputs_is_the_default(new_run, status):
    for name in ("a", "b", "c"):
        new_run(name)
    assert len(status("sweep/a", "sweep/b")[0]) == 2
    os.rename("sweep", "outputs")
    assert len(status()[0]) == 3


def test_time_left_follows_the_pace_of_this_process(new_run, at_work):
    """20 steps in the 40 s since the part of step 10 leave 70 steps of 2 s, minus the 5 s since.
    Parts written before the process began, at another pace, do not count."""
    record = new_run("resumed", restarts=1)
    store = RunStore(record.directory, record.run_id)
    for step, loss in ((5, 3.0), (10, 2.5)):
        store.append_metrics([ROW | {"step": step, "val_loss": loss}])
        store.flush(step)
    at_work(record)
    now = time.time()
    earlier, later = sorted((record.directory / "metrics").iterdir())
    for path, seconds_ago in (
        (earlier, 9000),
        (record.directory / LOCK_NAME, 60),
        (later, 45),
    ):
        os.utime(path, (now - seconds_ago, now - seconds_ago))
    heard(record, 5, step=30)
    shown = status_of(record.directory)
    assert shown.left_s == pytest.approx(135, abs=2)
    assert shown.val_loss == 2.5
    assert shown.state == "running"


def test_time_left_is_unknown_before_there_is_a_pace(new_run, at_work):
    fresh, resumed = new_run("fresh"), new_run("resumed", restarts=2)
    for record in (fresh, resumed):
        at_work(record)
    heard(resumed, 0, step=30)
    assert status_of(fresh.directory).left_s is None
    assert status_of(resumed.directory).left_s is None


def test_a_run_without_a_lock_is_shown_with_no_time_left(new_run, status):
    """Recorded by code of the user, or copied from another host without hidden files."""
    heard(new_run("own"), 5, step=30)
    heard(new_run("copied", host="elsewhere"), 5, step=30)
    assert status_of(Path("sweep/own")).left_s is None
    rows, below = status("sweep")
    assert [row.split()[:3] for row in rows] == [
        ["sweep/copied", "running", "30/100"],
        ["sweep/own", "running", "30/100"],
    ]
    assert "2 runs: 2 running" in below


def test_a_run_of_other_code_has_no_maximum_step(tmp_path, monkeypatch, status):
    monkeypatch.chdir(tmp_path)
    RunRecord.create("own", {"lr": 0.1}).finish("done", step=7)
    rows, below = status("own")
    assert " done 7 " in rows[-1]
    assert "1 run: 1 done" in below


BAD = {
    "types": ("run.json", '{"schema_version": 1, "run_id": 3}'),
    "cut": ("run.json", "{"),
    "zone": ("run.json", {"heartbeat": "2026-01-01T00:00:00"}),
    "error": ("run.json", {"error": "x"}),
    "steps": ("run.json", {"config": {"trainer": {"max_steps": "all"}}}),
    "loss": ("run.json", {"final": {"val_loss": "low"}}),
    "yaml": (".hydra/overrides.yaml", "[a: b: c"),
    "text": (".hydra/overrides.yaml", "nonsense"),
    "number": (".hydra/overrides.yaml", "5"),
    "keys": (".hydra/overrides.yaml", "a: 1"),
    "bytes": (".hydra/overrides.yaml", b"\xff\xfe\x00"),
    "zeros": (".hydra/overrides.yaml", b"\x00" * 50),
    "part": ("metrics/part-000000000001.parquet", b"PAR1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_named_and_other_runs_are_shown(new_run, status, name):
    """Any file of a run, with any contents."""
    new_run("sound").finish("done", final={"val_loss": 1.25})
    path, content = new_run(name, "seed=1").directory / BAD[name][0], BAD[name][1]
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content | {"checksum": None})
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, below = status("sweep")
    assert {row.split()[0] for row in rows} == {"sweep/sound", f"sweep/{name}"}
    assert "2 runs: " in below
    if name not in ("steps", "part"):  # which it can do without
        assert str(path).removeprefix(f"{Path.cwd()}/") in below


def test_names_that_are_not_valid_text_are_shown(new_run, status, monkeypatch):
    """On a terminal or in a file whose encoding lacks these characters and dashes."""
    new_run(os.fsdecode(b"caf\xe9"), os.fsdecode(b"data.corpus.paths=\xe9.txt")).finish("done")
    new_run("other", "data.corpus.paths=a.txt").finish("done")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "argv", ["nerve-status", "sweep"])
    main()
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()
    assert b"sweep/caf\\udce9" in shown
    assert b"data.corpus.paths=\\udce9.txt" in shown
    assert b"Restore" not in shown


def test_without_a_run_there_is_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nerve-status", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith("nerve-status: A run directory contains run.json")


def test_neither_torch_nor_hydra_is_loaded():
    code = "import sys, nerve.cli.status; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "lightning", "hydra", "pandas"} & set(loaded.stdout.split())


def test_columns_without_values_are_omitted(new_run, at_work, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nerve-status", "sweep"])

    def heading() -> list[str]:
        main()
        line = next(line for line in capsys.readouterr().out.splitlines() if "┃" in line)
        return [name.strip() for name in line.split("┃")[1:-1]]

    new_run("a").finish("done")
    assert heading() == ["run", "state", "step", "val loss", "host"]
    at_work(new_run("b"))
    assert heading() == ["run", "state", "step", "val loss", "heartbeat", "host"]


def test_a_narrow_terminal_shows_the_folder_once_and_whole_names(new_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nerve-status", "sweep"])
    monkeypatch.setattr("nerve.cli.console.WIDTH", 60)
    for i, name in enumerate(("of a_project/22b5b6eeb196", "of a_project/9302bd7b005b")):
        new_run(name, f"seed={i}", "activation=gelu").finish("done", final={"val_loss": 5.638})
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "in sweep/of a_project:"
    assert [line.split()[1] for line in lines if "│" in line] == ["22b5b6eeb196", "9302bd7b005b"]
    assert max(map(len, lines)) <= 60


def test_stopped_runs_get_the_command_that_resumes_them(new_run, status):
    """A run by its directory, the trials of a sweep together. A watched run has no command."""
    for name, values in (("a b", {}), ("c", {"sweep": "s"}), ("d", {"sweep": "s"})):
        new_run(name, "seed=1", **values).finish("interrupted")
    new_run("watched").finish("interrupted")
    _, below = status("sweep")
    assert [line for line in below.splitlines() if "resume" in line] == [
        "to resume: nerve-run resume='sweep/a b'",
        "to resume 2 trials in sweep: repeat the sweep's command",
    ]


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """Submits jobs for trials of `sweep` like `nerve-run`, and sets what squeue prints."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "squeue"

    def send(answer: str, **jobs: str) -> None:
        script.write_text(f"#!/bin/sh\n{answer}\n")
        script.chmod(0o755)
        for job_id, subdir in jobs.items():
            overrides = [f"seed={job_id[1:]}", f"hydra.sweep.subdir={quoted(subdir)}"]
            folder = tmp_path / "sweep" / ".submitit" / job_id
            folder.mkdir(parents=True)
            content = {"folder": str(tmp_path / "sweep"), "overrides": overrides}
            (folder / f"{job_id}_nerve.json").write_text(json.dumps(content))

    return send


def test_trials_in_slurms_queue_are_listed(new_run, status, queue):
    """Also without a run so far, and one that will be resumed; for active and completed runs the
    directory says more."""
    new_run("going on").finish("interrupted", step=50)
    new_run("done").finish("done", final={"val_loss": 1.25})
    queue(
        "echo j1 PD Priority; echo j2 R None; echo j3 PD JobHeldUser; echo j4 R None; echo 9 PD x",
        j1="it's new",
        j2="begun",
        j3="going on",
        j4="done",
        j5="cancelled",
    )
    for path in ("sweep", "."):
        rows, below = status(path)
        shown = {re.search(r"j\d$", row)[0]: row for row in rows if row[-2] == "j"}
        assert shown.keys() == {"j1", "j2", "j3"}
        assert re.search(r"it's new .*seed=1 queued –", shown["j1"])
        assert "starting" in shown["j2"]
        assert re.search(r"queued 50/100", shown["j3"])
        assert len(rows) == 4
        assert "4 runs: 2 queued, 1 starting, 1 done" in below
        assert "going on queued: JobHeldUser" in below
        assert "Priority" not in below


@pytest.mark.parametrize("answer", ["echo no socket >&2; exit 1", "exec sleep 60"])
def test_a_queue_that_does_not_answer_hides_no_run(new_run, status, queue, monkeypatch, answer):
    monkeypatch.setattr("nerve.cli.sweep.queue.ANSWERS_WITHIN_S", 0.2)
    new_run("dead").finish("interrupted")
    queue(answer, j1="new")
    rows, _ = status("sweep")
    assert len(rows) == 1


def test_slurm_is_not_asked_if_nothing_waits(new_run, status, queue):
    new_run("done").finish("done")
    queue("exit 1", j1="done")
    rows, below = status("sweep")
    assert len(rows) == 1
    assert "not shown" not in below


def test_watch_refreshes_while_any_run_is_active(new_run, at_work, status, monkeypatch):
    record = new_run("run")
    at_work(record)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            record.finish("done", final={"val_loss": 1.25})

    monkeypatch.setattr("time.sleep", sleep)
    rows, _ = status("--watch", "sweep")
    assert [row.split()[1] for row in rows] == ["running", "running", "done"]
    assert slept == [10.0, 10.0]


def test_ctrl_c_ends_the_watch(new_run, at_work, status, monkeypatch):
    at_work(new_run("run"))

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    rows, _ = status("sweep", "--watch")
    assert len(rows) == 1
