"""Environments of their own for the peers that ours is held against: made on first use in `.bench`, versions pinned.

Peers want other versions than we do, of numpy for one, so that nothing of them is imported beside ours.
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(".bench")
PEERS = {
    "pydvl": ("pyDVL[influence]==0.10.0", "torch==2.13.0", "numpy<2"),
    "curvlinops": ("curvlinops-for-pytorch==3.0.1", "torch==2.13.0"),
    "kronfluence": ("kronfluence==1.0.1", "torch==2.13.0"),
    "dattri": ("dattri==0.3.0", "torch==2.13.0"),
}


def python_of(peer: str, folder: Path = FOLDER) -> Path:
    """The interpreter of a peer's environment, made if it is not there. Raises CalledProcessError if pip fails."""
    venv = folder.absolute() / peer
    python = venv / "bin" / "python"
    if not (venv / ".made").is_file():  # an interrupted one is made again
        print(f"making {venv.name}'s environment …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        (venv / ".made").touch()
    return python
