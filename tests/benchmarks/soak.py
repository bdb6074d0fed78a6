"""The long tests: twenty kills a stage, SLURM's own limits, memory of three shapes. What each of them took.

Run: python -m tests.benchmarks.soak      or `make soak`, which keeps the table and simulates a thousand workers too

DISTINFLUENCE_CHAOS=KILLS:SEED says how many processes each test kills and with which seed, if not twenty and the date.
"""

import datetime
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "soak.xml"
LIMITS = ("-o", "timeout=900", "-o", "faulthandler_timeout=1000")


def table(report: Path) -> list[str]:
    """One line for each test of a JUnit file: seconds, outcome, name."""
    lines = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        module = str(case.get("classname")).removeprefix("tests.")
        lines.append(f"{float(case.get('time', 'nan')):7.1f} s  {outcome:<8}{module}::{case.get('name')}")
    return lines


def main() -> None:
    """Run them one after the other and print the table."""
    chaos = os.environ.get("DISTINFLUENCE_CHAOS", f"20:{datetime.date.today():%Y%m%d}")
    environment = {**os.environ, "DISTINFLUENCE_CHAOS": chaos, "DISTINFLUENCE_SLURM": "required"}
    command = [sys.executable, "-m", "pytest", "-m", "soak or chaos", *LIMITS, f"--junitxml={REPORT}", "tests"]
    REPORT.unlink(missing_ok=True)  # or the table of an earlier run is shown where this one writes none
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
    print(f"DISTINFLUENCE_CHAOS={chaos}\n")
    print("\n".join(table(REPORT)))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
