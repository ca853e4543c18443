"""The table of what caught each fault: tab-separated, one row per fault, written after each."""

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path

NEAR_PASS = "near tests pass; not run further"
NOT_CAUGHT = "not caught"
NOT_FOUND = "place not found"


@dataclass
class Row:
    id: int
    kind: str
    place: str
    fault: str
    result: str
    """The first failing test, or one of the three above."""
    seconds: float

    @property
    def caught(self) -> bool:
        return not self.result.startswith((NEAR_PASS, NOT_CAUGHT, NOT_FOUND))


NAMES = [field.name for field in dataclasses.fields(Row)]


def read(path: Path) -> dict[int, Row]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {
            int(r["id"]): Row(**{**r, "id": int(r["id"]), "seconds": float(r["seconds"])})
            for r in rows
        }


def write(path: Path, rows: dict[int, Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, NAMES, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for _, row in sorted(rows.items()):
            writer.writerow(dataclasses.asdict(row))
