"""What researchers would otherwise store metrics with: writing a run, its size, loading all runs.

Each stores the same numbers, those of the columns of metrics that are numbers, and gives them back
in one frame. `results.py --peers` runs them side by side.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from nerve.analysis.load import load_metrics
from nerve.storage.record import RunRecord
from nerve.storage.schema import METRICS_SCHEMA
from nerve.storage.store import RunStore

KEYS = ("step", "layer")
NUMBERS = [
    field.name
    for field in METRICS_SCHEMA
    if not pa.types.is_string(field.type) and field.name not in KEYS
]


@dataclass(frozen=True)
class Peer:
    """How a run is written into a folder of runs, and how all of them are loaded; of a slow one,
    not more than `most` runs."""

    write: Callable[[Path, str, pd.DataFrame], None]
    load: Callable[[Path], pd.DataFrame]
    most: int = 1_000_000


def peers() -> dict[str, Peer]:
    """nerve, CSV files, TensorBoard, and MLflow with SQLite if it is installed."""
    found = {"nerve": Peer(write_nerve, load_nerve), "CSV, pandas": Peer(write_csv, load_csv)}
    if importlib.util.find_spec("tensorboard"):
        found["TensorBoard"] = Peer(write_tensorboard, load_tensorboard)
    if importlib.util.find_spec("mlflow") and importlib.util.find_spec("sqlalchemy"):
        found["MLflow, SQLite"] = Peer(write_mlflow, load_mlflow, most=3)
    return found


def compare(tables: list[pa.Table]) -> Iterator[str]:
    """One line per peer: ms to write a run, MB of a run, seconds to load all runs, after one run
    for the imports.

    Args:
        tables: the metrics of each run.
    """
    for name, peer in peers().items():
        frames = [table.to_pandas() for table in tables[: peer.most]]
        store_and_load(peer, frames[:1])
        writing, n_bytes, loading, loaded = store_and_load(peer, frames)
        n_values = sum(len(frame) for frame in frames) * len(NUMBERS)
        if n_loaded(loaded) != n_values:
            raise AssertionError(f"{name} has {n_loaded(loaded):,} of {n_values:,} values")
        n = len(frames)
        yield (
            f"  {name:14} {n:5} runs, each written in {1000 * writing / n:8.1f} ms, "
            f"{n_bytes / n / 1e6:5.2f} MB, loaded in {1000 * loading / n:8.1f} ms"
        )


def store_and_load(
    peer: Peer, frames: list[pd.DataFrame]
) -> tuple[float, int, float, pd.DataFrame]:
    """Seconds to write all runs, their bytes, seconds to load them, and what was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for index, frame in enumerate(frames):
            peer.write(Path(folder), f"{index:05d}", frame)
        written = time.perf_counter()
        n_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        start = time.perf_counter()
        loaded = peer.load(Path(folder))
        return written - began, n_bytes, time.perf_counter() - start, loaded


def n_loaded(frame: pd.DataFrame) -> int:
    """How many values a frame has, besides those that name a row."""
    return int(frame.drop(columns=[*KEYS, "run"], errors="ignore").notna().sum().sum())


def write_nerve(folder: Path, run: str, rows: pd.DataFrame) -> None:
    """A record and one part, durably."""
    record = RunRecord.create(folder / run, {"name": run})
    store = RunStore(folder / run, record.run_id)
    store.append_metrics(rows.drop(columns="run_id").to_dict("records"))
    store.flush(int(rows["step"].max()))
    record.finish("done")


def load_nerve(folder: Path) -> pd.DataFrame:
    return load_metrics(folder)[[*KEYS, *NUMBERS]]


def write_csv(folder: Path, run: str, rows: pd.DataFrame) -> None:
    rows[[*KEYS, *NUMBERS]].to_csv(folder / f"{run}.csv", index=False)


def load_csv(folder: Path) -> pd.DataFrame:
    paths = sorted(folder.glob("*.csv"))
    return pd.concat([pd.read_csv(path).assign(run=path.stem) for path in paths])


def scalars(rows: pd.DataFrame) -> Iterator[tuple[int, dict[str, float]]]:
    """Each step, and its values by tags such as `layer_03/pr_post`."""
    tags = [f"layer_{layer:02d}/{name}" for layer in rows["layer"].unique() for name in NUMBERS]
    for step, at_step in rows.groupby("step"):
        values = at_step[NUMBERS].to_numpy(float).ravel().tolist()
        yield int(str(step)), dict(zip(tags, values, strict=True))


def write_tensorboard(folder: Path, run: str, rows: pd.DataFrame) -> None:
    """All values of a step in one event, which is the fastest way."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder / run))
    for step, values in scalars(rows):
        each = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        writer.add_event(Event(step=step, wall_time=float(step), summary=Summary(value=each)))
    writer.close()


def load_tensorboard(folder: Path) -> pd.DataFrame:
    """One row per run and step, one column per tag; the values are those of float32."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    frames = []
    for path in sorted(folder.iterdir()):
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()
        columns = {
            tag: np.array([event.value for event in events.Scalars(tag)])
            for tag in events.Tags()[SCALARS]
        }
        steps = [event.step for event in events.Scalars(next(iter(columns)))]
        frames.append(pd.DataFrame({"run": path.name, "step": steps, **columns}))
    return pd.concat(frames)


def write_mlflow(folder: Path, run: str, rows: pd.DataFrame) -> None:
    """In the largest batches that MLflow takes."""
    from mlflow.entities import Metric

    client = mlflow_client(folder)
    run_id = client.create_run("0", run_name=run).info.run_id
    values = [
        Metric(tag.replace("/", "."), value, step, step)
        for step, of_step in scalars(rows)
        for tag, value in of_step.items()
    ]
    for start in range(0, len(values), 1000):
        client.log_batch(run_id, metrics=values[start : start + 1000])
    client.set_terminated(run_id)


def load_mlflow(folder: Path) -> pd.DataFrame:
    """One row per run and step, one column per tag."""
    client = mlflow_client(folder)
    frames = []
    for run in client.search_runs(["0"], max_results=50_000):
        histories = {
            key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics
        }
        columns = {key: [each.value for each in history] for key, history in histories.items()}
        steps = [each.step for each in next(iter(histories.values()))]
        frames.append(pd.DataFrame({"run": run.info.run_name, "step": steps, **columns}))
    return pd.concat(frames)


def mlflow_client(folder: Path):  # type: ignore[no-untyped-def]  # MLflow may not be installed
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")
