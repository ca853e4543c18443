"""The page of a report: one HTML file that needs nothing from outside.

The template escapes all that comes from runs, so that no name is ever read as markup, and its
tables can be read without JavaScript. The page's script lets them be sorted and filtered. A content
security policy allows that one script (by its hash), inline style and embedded images, and nothing
else.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

MARK = '<meta name="generator" content="nerve-report">'
PARTS = Path(__file__).parent

MAX_ROWS = 1000
"""Of a longer table the page has the first rows; the files have all."""


@dataclass(frozen=True)
class PageFigure:
    """A figure in the page: the name of its files, the caption, the PNG in base 64.

    Names of files are those that `write_report` makes, of letters that are safe in an address.
    """

    name: str
    caption: str
    png: str


@dataclass(frozen=True)
class PageTable:
    """A table in the page: the name of its files, the caption, its length, the rows to show.

    Args:
        name: of the files.
        caption: what a row is.
        n_rows: in the files.
        rows: what the page shows; None leaves the table to the files.
    """

    name: str
    caption: str
    n_rows: int
    rows: pd.DataFrame | None


@dataclass(frozen=True)
class Cell:
    """A cell: the text that is shown, and the attributes by which it is styled and sorted."""

    text: str
    attributes: dict[str, str]


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    figures: Sequence[PageFigure],
    tables: Sequence[PageTable],
) -> str:
    """The page as text that UTF-8 can hold."""
    made = datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PARTS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (PARTS / "page.js").read_text(encoding="utf-8")
    page = environment.get_template("page.html").render(
        mark=Markup(MARK),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((PARTS / "page.css").read_text(encoding="utf-8")),
        title=title,
        made=f"nerve {version('nerve')}, {made} UTC",
        facts=facts,
        notes=notes,
        figures=figures,
        tables=[_table(table) for table in tables],
    )
    return page.encode("utf-8", "replace").decode()


def _table(table: PageTable) -> dict[str, Any]:
    columns, rows = None, []
    if table.rows is not None:
        columns = list(table.rows.columns)
        first = table.rows.head(MAX_ROWS)
        cells = [[_cell(name, value) for value in _values(first[name])] for name in columns]
        rows = list(zip(*cells, strict=True))
    return {**vars(table), "columns": columns, "rows": rows}


def _values(values: pd.Series) -> list[Any]:
    """Python's own values; None for missing ones."""
    return list(values.astype(object).where(values.notna(), None))


def _cell(column: str, value: Any) -> Cell:
    """A number is sorted by its first six digits; all but numbers is text."""
    if value is None:
        return Cell("–", {"class": "missing"})
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, int):
        return Cell(str(value), {"class": "number", "data-value": str(value)})
    if isinstance(value, float) and math.isfinite(value):
        digits = f"{value:.6g}"
        return Cell(_shown(float(digits)), {"class": "number", "data-value": digits})
    text = str(value)
    flagged = {"class": "flagged"} if column == "flag" and text != "ok" else {}
    return Cell(text, {"title": text, **flagged})


def _shown(value: float) -> str:
    """Four digits; whole numbers, and those from 10,000 on, without decimals."""
    size = abs(value)
    if value.is_integer() or size >= 9999.5:
        return f"{value:.0f}" if size < 1e15 else f"{value:.4g}"
    if size < 0.01:
        return f"{value:.4g}".replace("e-0", "e-")
    return f"{value:#.4g}"
