"""The table of peers: a row for each question that was put to a peer and to us."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.environments import PEERS
from tests.benchmarks.truth.asked_of_others import DATTRI, KRONFLUENCE
from tests.benchmarks.truth.asked_of_pydvl import PYDVL
from tests.benchmarks.truth.questions import Defect, asked

DEFECTS: Mapping[str, tuple[Defect, ...]] = {"pydvl": PYDVL, "kronfluence": KRONFLUENCE, "dattri": DATTRI}


def peers() -> list[str]:
    """A row for each question that was put to a peer and to us."""
    lines = ["| peer | question | right | it returns | ours |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for peer, defects in DEFECTS.items():
            found = asked(peer, Path(folder))
            label = PEERS[peer][0].replace("[influence]", "").replace("==", " ")
            for defect in defects:
                theirs = found if isinstance(found, str) else defect.peers(found)
                lines.append(f"| {label} | {defect.question} | {defect.right} | {theirs} | {defect.ours()} |")
    return [*lines, ""]
