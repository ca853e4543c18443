"""The page of a report: one HTML file that needs nothing from outside.

All that comes from runs is data, a JSON block that cannot end its own element; the page's script
makes elements of it and sets their text, so that no name is ever read as markup. A content security
policy allows that one script (by its hash), inline style and embedded images, and nothing else.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

MARK = '<meta name="generator" content="nerve-report">'
PARTS = Path(__file__).parent


@dataclass(frozen=True)
class PageFigure:
    """A figure in the page: the name of its files, the caption, the PNG in base 64."""

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


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    figures: Sequence[PageFigure],
    tables: Sequence[PageTable],
) -> str:
    """The page as text."""
    made = datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00")
    data = {
        "title": title,
        "made": f"nerve {version('nerve')}, {made} UTC",
        "facts": [list(fact) for fact in facts],
        "notes": list(notes),
        "figures": [vars(figure) for figure in figures],
        "tables": [_table(table) for table in tables],
    }
    script = (PARTS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The data goes in last and once: what it holds is never searched for places to fill.
    parts = {
        "MARK": MARK,
        "SCRIPT_HASH": digest,
        "STYLE": (PARTS / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": script,
    }
    page = (PARTS / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"{{{{{name}}}}}", part)
    before, after = page.split("{{DATA}}")
    return before + to_json(data) + after


def to_json(data: Any) -> str:
    """JSON that can stand inside a script element: without <, > and &, in ASCII alone."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _table(table: PageTable) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": table.name,
        "caption": table.caption,
        "n_rows": table.n_rows,
        "columns": None,
        "rows": None,
    }
    if table.rows is not None:
        columns = [_cells(table.rows[name]) for name in table.rows.columns]
        values["columns"] = list(table.rows.columns)
        values["rows"] = [list(row) for row in zip(*columns, strict=True)]
    return values


def _cells(values: pd.Series) -> list[Any]:
    """Numbers to six digits, truth as true and false, everything else as text; null for missing."""
    return [_cell(value) for value in values.astype(object).where(values.notna(), None)]


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return str(value).lower() if isinstance(value, bool) else value
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return str(value)
