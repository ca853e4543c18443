"""Recomputes the study from its runs: study/findings.md, criteria.md, runs.md and figures.

python study/scorecard
"""

from argparse import ArgumentParser
from pathlib import Path

from criteria import CHECKS, OURS, report
from evidence import Evidence
from figures import draw
from page import blocks, each_run, fill

STUDY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Rewrites what is generated; text written by hand stays as it is."""
    parser = ArgumentParser(prog="python study/scorecard", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, default=STUDY / "runs", help="a folder of runs for each sweep"
    )
    runs = parser.parse_args().runs
    page = STUDY / "findings.md"
    evidence = Evidence(runs)
    judged = [check.judge(evidence) for check in (*CHECKS, *OURS)]
    page.write_text(fill(page.read_text("utf-8"), blocks(evidence, judged)), "utf-8")
    criteria = STUDY / "criteria.md"
    criteria.write_text(report.page(judged), "utf-8")
    listing = STUDY / "runs.md"
    listing.write_text(each_run(evidence), "utf-8")
    for path in [page, criteria, listing, *draw(evidence, judged, STUDY / "figures")]:
        print(path)


if __name__ == "__main__":
    main()
