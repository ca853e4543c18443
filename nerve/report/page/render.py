"""The page of a report: one self-contained HTML file.

The template escapes everything that comes from runs, so that no name is interpreted as markup.
Tables can be read without JavaScript; the page's script adds sorting and filtering. A content
security policy allows only this script (by its hash), inline styles and embedded images.
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
"""The page shows only the first rows of a longer table; the files have all."""


@dataclass(frozen=True)
class PageFigure:
    """A figure on the page: the name of its files, the caption, the PNG in base 64.

    The name, made by `write_report`, contains only characters that are safe in a URL.
    """

    name: str
    caption: str
    png: str


@dataclass(frozen=True)
class PageTable:
    """A table on the page: the name of its files, the caption, its length, the rows to show.

    Args:
        name: name of the files.
        caption: says what a row is.
        n_rows: number of rows in the files.
        rows: the rows to show; None if the table is only in the files.
    """

    name: str
    caption: str
    n_rows: int
    rows: pd.DataFrame | None


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the attributes for styling and sorting."""

    text: str
    attributes: dict[str, str]


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    figures: Sequence[PageFigure],
    tables: Sequence[PageTable],
) -> str:
    """The page as text that can be encoded in UTF-8."""
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
    """The values as Python objects; None for missing ones."""
    return list(values.astype(object).where(values.notna(), None))


def _cell(column: str, value: Any) -> Cell:
    """The cell of a value. Numbers are sorted by their first six digits; all else is text."""
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
    """A number with four digits; integers, and numbers from 10,000 on, without decimals."""
    size = abs(value)
    if value.is_integer() or size >= 9999.5:
        return f"{value:.0f}" if size < 1e15 else f"{value:.4g}"
    if size < 0.01:
        return f"{value:.4g}".replace("e-0", "e-")
    return f"{value:#.4g}"
