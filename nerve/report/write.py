"""Writes a report on runs as a folder: one page, figures as PNG and SVG, tables as CSV and
Parquet."""

import base64
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from nerve.analysis.correlate import WINDOWS
from nerve.analysis.load import Runs
from nerve.config import require_choice
from nerve.errors import ConfigError, StoreError
from nerve.files import building_folder
from nerve.progress import Progress, unseen
from nerve.report.content import Content, Drawing, Table
from nerve.report.one_run import content_of_run
from nerve.report.page.render import MARK, PageFigure, PageTable, render
from nerve.report.reference import mark, read_reference
from nerve.report.several_runs import content_of_runs
from nerve.storage.find import AnyPath, IncompleteWarning

PNG_DPI = 150
INDEX = "index.html"
PARTS = {"figures": (".png", ".svg"), "tables": (".csv", ".parquet")}
"""Folders of a report, and the suffixes of its files in them."""
BUILDING = ".new-report-"
"""Prefix of the temporary folder in which a report is written before it is moved into place."""


def write_report(
    paths: AnyPath | Iterable[AnyPath],
    output: AnyPath | None = None,
    *,
    window: str = "after_warmup",
    steps: Sequence[int] = (),
    reference: AnyPath | None = None,
    progress: Progress = unseen,
) -> Path:
    """Writes `index.html`, `figures/` and `tables/`, and returns the path of the page.

    A single run gets its own figures (overview, gains, spectra, training); several runs are
    compared. Warnings of the loaders (damaged parts, copies, newer schemas, differing data) are
    shown on the page. An existing report in the folder is replaced only when the new one is
    complete; until then, and if the process is killed, it stays unchanged.

    Args:
        paths: a run, a sweep, a tree of outputs, or several of these.
        output: the folder; None for `report` beside the first path.
        window: the steps over which correlations within runs are shown first, one of `WINDOWS`.
        steps: for a single run, the steps whose spectra are plotted (the nearest stored ones).
        reference: a CSV file with values of a paper, shown as marks in the figures
            (`read_reference`).
        progress: called with a description of the current work.

    Raises:
        StoreError: if there is no run, or the folder holds something else or cannot be written.
        ConfigError: for an unknown window, steps with several runs, or an invalid reference file.
    """
    roots = _listed(paths)
    folder = folder_of(roots, output)
    with _writing(folder):
        _require_own(folder)
    content = gather(roots, window=window, steps=steps, reference=reference, progress=progress)
    with _writing(folder):
        return _write(content, folder, progress)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns an `OSError` within the block into a `StoreError` that names the report's folder."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"The folder of a report must be writable; {folder} is not: {error}. Choose another "
            "folder with -o."
        ) from error


def folder_of(paths: Sequence[AnyPath], output: AnyPath | None = None) -> Path:
    """The folder into which `write_report` writes if it gets these arguments."""
    if output is not None:
        return Path(output)
    beside = Path(paths[0]).resolve().parent if paths else Path()  # without a path, gather raises
    return beside / "report"


def gather(
    paths: AnyPath | Iterable[AnyPath],
    *,
    window: str = "after_warmup",
    steps: Sequence[int] = (),
    reference: AnyPath | None = None,
    progress: Progress = unseen,
) -> Content:
    """The content of a report on the runs under `paths`, without drawing or writing anything.

    Arguments and errors as in `write_report`.
    """
    require_choice("window", window, WINDOWS)
    marks = None if reference is None else read_reference(reference)
    roots = _listed(paths)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Only training by nerve-run logs scalars; for other runs, their absence means nothing.
        warnings.filterwarnings("ignore", "Runs without scalars", IncompleteWarning)
        progress("reading runs", 0, 3)
        runs = Runs(roots)
        if steps and len(runs) != 1:
            raise ConfigError(
                "steps selects the spectra to plot for a single run; got "
                f"{', '.join(map(str, steps))} for {len(runs):,} runs, which are compared at their "
                "last steps. Omit steps, or pass the path of one run."
            )
        progress(f"reading metrics of {len(runs):,} runs", 1, 3)
        _ = runs.metrics
        progress("comparing", 2, 3)
        if len(runs) == 1:
            content = content_of_run(runs, window, steps)
        else:
            title = f"{len(runs):,} runs under {', '.join(str(root) for root in roots)}"
            content = content_of_runs(runs, window, title)
    content.notes[:0] = dict.fromkeys(_text(str(warning.message)) for warning in caught)
    if marks is not None:
        _add_marks(content, marks, _text(str(reference)))
    return content


def _add_marks(content: Content, marks: pd.DataFrame, source: str) -> None:
    """Adds the reference values to the figures whose panels show these metrics, and a table of all
    values."""
    content.drawings = [
        replace(drawing, draw=partial(_marked, drawing, marks)) for drawing in content.drawings
    ]
    caption = f"The values of {source}, shown as marks in the figures."
    content.tables.append(Table("reference", caption, marks))


def _marked(drawing: Drawing, marks: pd.DataFrame) -> Figure:
    return mark(drawing.draw(), marks)


def _write(content: Content, folder: Path, progress: Progress) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with building_folder(folder, BUILDING) as new:
        _build(content, new, progress)
        _put_in_place(new, folder)
    n_steps = _n_steps(content)
    progress("done", n_steps, n_steps)
    return folder / INDEX


def _n_steps(content: Content) -> int:
    return len(content.drawings) + len(content.tables) + 1


def _build(content: Content, folder: Path, progress: Progress) -> None:
    total = _n_steps(content)
    for part in PARTS:
        (folder / part).mkdir()
    figures, tables = [], []
    names = _file_names([drawing.name for drawing in content.drawings])
    for done, (name, drawing) in enumerate(zip(names, content.drawings, strict=True)):
        progress("drawing figures", done, total)
        png = _save(drawing.draw(), folder / "figures" / name)
        figures.append(PageFigure(name, drawing.caption, base64.b64encode(png).decode("ascii")))
    names = _file_names([table.name for table in content.tables])
    for done, (name, table) in enumerate(zip(names, content.tables, strict=True), len(figures)):
        progress("writing tables", done, total)
        tables.append(_page_table(name, table, _save_table(table.frame, folder / "tables" / name)))
    progress("writing the page", total - 1, total)
    page = render(content.title, content.facts, content.notes, figures, tables)
    (folder / INDEX).write_text(page, encoding="utf-8")


def _put_in_place(new: Path, folder: Path) -> None:
    """Replaces each file atomically, the page last, and then removes files of the former report."""
    whole = {part: {path.name for path in (new / part).iterdir()} for part in PARTS}
    for part, names in whole.items():
        (folder / part).mkdir(exist_ok=True)
        for name in names:
            os.replace(new / part / name, folder / part / name)
    os.replace(new / INDEX, folder / INDEX)
    for part, suffixes in PARTS.items():
        for path in (folder / part).iterdir():
            if path.suffix in suffixes and path.name not in whole[part]:
                path.unlink()


def _save(figure: Figure, path: Path) -> bytes:
    """Writes `<path>.png` and `<path>.svg`; returns the PNG.

    This uses the canvases directly, because `savefig` draws each figure twice, the first time for
    the layout.
    """
    buffer, dpi = io.BytesIO(), figure.dpi
    with warnings.catch_warnings():
        # A name may contain characters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.dpi = PNG_DPI
        FigureCanvasAgg(figure).print_png(buffer)
        figure.dpi = dpi
        figure.set_layout_engine("none")  # the layout is done
        svg = FigureCanvasSVG(figure)
        svg.print_svg(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
    png = buffer.getvalue()
    path.with_name(f"{path.name}.png").write_bytes(png)
    return png


def _save_table(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Writes `<path>.csv` and `<path>.parquet`; returns the frame as written."""
    clean = frame.reset_index(drop=True)
    for name in clean.columns:
        if clean[name].dtype == "object":
            clean[name] = _one_type(clean[name])
    clean.columns = [_text(str(name)) for name in clean.columns]
    clean.to_csv(path.with_name(f"{path.name}.csv"), index=False)
    # pandas refuses the name of a file whose bytes are not valid UTF-8.
    with open(path.with_name(f"{path.name}.parquet"), "wb") as file:
        clean.to_parquet(file, index=False, compression="zstd")
    return clean


def _one_type(values: pd.Series) -> pd.Series:
    """Values that one Parquet column can hold: strings if types are mixed (4 and "8/3"), and for
    integers that it cannot hold exactly (a seed of 128 bits)."""
    kinds = {type(value) for value in values.dropna()}
    if kinds <= {int, float} or kinds == {bool}:
        with suppress(OverflowError, pa.ArrowInvalid):
            pa.array(values, from_pandas=True)
            return values
    return values.map(lambda value: _text(str(value)), na_action="ignore")


def _page_table(name: str, table: Table, clean: pd.DataFrame) -> PageTable:
    shown = [column for column in table.shown or clean.columns if column in clean.columns]
    rows = clean[list(dict.fromkeys(shown))] if table.in_page else None
    return PageTable(name, table.caption, len(clean), rows)


def _listed(paths: AnyPath | Iterable[AnyPath]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]


def _text(text: str) -> str:
    """Text that can be encoded in UTF-8: undecodable bytes of a path become question marks."""
    return text.encode("utf-8", "replace").decode()


def _file_names(names: Sequence[str]) -> list[str]:
    """Unique names that are safe as file names on any system."""
    safe: list[str] = []
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")[:80] or "unnamed"
        count = sum(other == base or other.startswith(f"{base}~") for other in safe)
        safe.append(f"{base}~{count + 1}" if count else base)
    return safe


def _require_own(folder: Path) -> None:
    """Raises unless the folder is new, empty, or holds a report or the beginning of one."""
    if not folder.exists():
        return
    if folder.is_dir():
        index, content = folder / INDEX, [path.name for path in folder.iterdir()]
        is_report = index.is_file() and MARK.encode() in index.read_bytes()[:1000]
        if is_report or not content or any(name.startswith(BUILDING) for name in content):
            return
    raise StoreError(
        f"A report may only replace an earlier report; {folder} contains something else. Choose "
        "another folder with -o."
    )
