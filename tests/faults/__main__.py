"""Whether the tests still catch the faults that were drawn.

    python tests/faults 17                # one fault: in the end all quick tests
    python tests/faults --all after.tsv   # all faults; goes on where after.tsv ends

A fault meets the test that caught it last, as after.tsv has it, then the near tests: those that
mirror its module and those that import it. With `--all` the faults that these let pass then go into
one copy together, on which all quick tests run once; each test that fails there runs on each of
these faults alone. So a test that passes with all of them in place is taken to pass with each. A
test that fails without any fault proves nothing and is left out. At the end the faults that
before.tsv says are caught and that are not any more are named, but for those whose code is gone,
and the exit status is 1 if there are any.
"""

import argparse
import sys
import time
from pathlib import Path

from place import Fault, PlaceError, load
from run import copy_with, failing, failing_without_fault, near_tests
from table import NEAR_PASS, NOT_CAUGHT, NOT_FOUND, Row, read, write

ROOT = Path(__file__).parents[2]
BEFORE, AFTER = (Path(__file__).with_name(f"{name}.tsv") for name in ("before", "after"))


def run_near(fault: Fault, without: list[str]) -> Row:
    """What the test that caught it last and the near tests say, but for those of `without`."""
    start = time.monotonic()
    try:
        with copy_with([fault], ROOT) as (copy, (path,)):
            file = str(path.relative_to(copy))
            last = [test for test in caught_last(fault, copy) if test not in without]
            failed: list[str] = []
            for tests in (last, near_tests(path, copy)):
                if tests and not failed:
                    failed = failing(copy, ["-n0", "-x", *tests, *deselect(without)])
            result = failed[0] if failed else NEAR_PASS
    except PlaceError as error:
        file, result = fault.file, f"{NOT_FOUND}: {error}"
    place = f"{file}: {fault.function or '(module)'}"
    return Row(fault.id, fault.kind, place, str(fault), result, round(time.monotonic() - start, 1))


def run_everything(fault: Fault, without: list[str]) -> str:
    """The first failing test of all that are quick and not near, or NOT_CAUGHT."""
    with copy_with([fault], ROOT) as (copy, (path,)):
        ignored = [f"--ignore={test}" for test in near_tests(path, copy)]
        return next(iter(failing(copy, ["-x", *ignored, *deselect(without)])), NOT_CAUGHT)


def caught_last(fault: Fault, tree: Path) -> list[str]:
    """The test that caught it last, if the tree has it still."""
    row = read(AFTER).get(fault.id)
    if row is None or not row.caught:
        return []
    file, _, name = row.result.partition("::")
    function = f"def {name.partition('[')[0]}("
    is_there = (tree / file).is_file() and function in (tree / file).read_text()
    return [row.result] if is_there else []


def deselect(tests: list[str]) -> list[str]:
    return [f"--deselect={test}" for test in tests]


def run_one(fault: Fault) -> Row:
    without: list[str] = []
    while True:
        row = run_near(fault, without)
        if row.result == NEAR_PASS:
            row.result = run_everything(fault, without)
        broken = failing_without_fault([row.result], ROOT) if row.caught else []
        if not broken:
            return row
        print(f"fails without the fault, too: {row.result}", flush=True)
        without += broken


def run_all(faults: dict[int, Fault], out: Path) -> dict[int, Row]:
    rows = read(out)
    for fault in faults.values():
        if fault.id not in rows:
            rows[fault.id] = run_near(fault, [])
            write(out, rows)
            print(rows[fault.id], flush=True)
    broken = failing_without_fault(sorted({r.result for r in rows.values() if r.caught}), ROOT)
    for i in [i for i, row in rows.items() if row.result in broken]:
        rows[i] = run_near(faults[i], broken)
        write(out, rows)
        print(rows[i], flush=True)
    passed = [faults[i] for i, row in rows.items() if row.result == NEAR_PASS]
    if passed:
        run_together(passed, rows, out)
    return rows


def run_together(faults: list[Fault], rows: dict[int, Row], out: Path) -> None:
    """Replaces NEAR_PASS in the rows of `faults` by what all quick tests say."""
    with copy_with(faults, ROOT) as (copy, _):
        failed = failing(copy, [])
    print(f"fail with {len(faults)} faults at once: {failed}", flush=True)
    broken = failing_without_fault(failed, ROOT)
    tests = [test for test in failed if test not in broken]
    print(
        f"{len(tests)} tests fail with {len(faults)} faults at once; without: {broken}", flush=True
    )
    for fault in faults:
        start = time.monotonic()
        with copy_with([fault], ROOT) as (copy, _):
            alone = failing(copy, ["-n0", "-x", *tests]) if tests else []
        row = rows[fault.id]
        row.result = alone[0] if alone else NOT_CAUGHT
        row.seconds = round(row.seconds + time.monotonic() - start, 1)
        write(out, rows)
        print(row, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__.split("\n")[0])
    parser.add_argument("ids", nargs="*", type=int, help="faults of faults.json")
    parser.add_argument("--all", type=Path, metavar="FILE", help="all faults, into this table")
    arguments = parser.parse_args()
    faults = {fault.id: fault for fault in load()}
    for i in arguments.ids:
        row = run_one(faults[i])
        print(f"{row.id} ({row.kind}) {row.place}\n  {row.fault}\n  {row.result}", flush=True)
    if not arguments.all:
        return 0
    rows = run_all(faults, arguments.all)
    caught = [row for i, row in read(BEFORE).items() if row.caught and not faults[i].gone]
    lost = [row for row in caught if not rows[row.id].caught]
    for row in lost:
        print(f"caught before by {row.result}, now {rows[row.id].result}:\n  {row.fault}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
