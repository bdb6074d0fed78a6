"""The first minutes of someone who has just come, in environments of their own: what `pip install` gives, and a page.

Run: python -m tests.first_minutes wheel      the built wheel in an empty environment, no compiler; then the README
     python -m tests.first_minutes tutorial   a fresh clone, the tutorial's own install line, and then all it says

Not part of the test run, as PyTorch has to be installed each time: a minute or two.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLLOW = """
import json, sys
from pathlib import Path
import distinfluence
import walkthrough
assert Path(distinfluence.__file__).is_relative_to(sys.prefix), distinfluence.__file__
sys.path.insert(0, "")  # as in a session: the reader's own files can be imported
steps = walkthrough.follow(Path(sys.argv[1]), Path.cwd())
print(json.dumps([[step.done, step.shown, step.came] for step in steps if not step.agrees]))
"""


def block(page: str, kind: str) -> str:
    """The first fenced block of a kind on a page, without the indentation of a list."""
    found = re.search(rf"^```{kind}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page} has no block of {kind}"
    return found[1]


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a command prints; its errors are shown. PYTHONPATH is left out: what is installed is what is imported."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env={**inherited, **environment}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\nended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def wheel(folder: Path) -> None:
    """Build it, install it where nothing is and nothing can be compiled, ask for help, and run the README's Python."""
    run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)], ROOT)
    (built,) = folder.glob("*.whl")
    venv.create(folder / "empty", with_pip=True)
    python = folder / "empty" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    install = ["install", "-q", "--only-binary", ":all:", "-c", constraints, str(built)]
    run([str(python), "-m", "pip", *install], folder, CC="/bin/false", CXX="/bin/false")
    assert "Usage: distinfluence" in run([str(python.with_name("distinfluence")), "--help"], folder)
    printed = run([str(python), "-c", block("README.md", "python")], folder)
    assert printed.startswith("True "), printed
    print(f"{built.name} is installed without a compiler, `distinfluence --help` and the README's Python run.")


def tutorial(folder: Path) -> None:
    """Clone, install as the page says, and follow the page in an empty folder."""
    clone, empty = folder / "clone", folder / "digits"
    empty.mkdir()
    run(["git", "clone", "-q", str(ROOT), str(clone)], folder)
    cache = run([sys.executable, "-m", "pip", "cache", "dir"], folder).strip()
    home = {"HOME": str(folder), "PIP_CACHE_DIR": cache, "PIP_QUIET": "1"}
    install = block("docs/tutorial.md", "bash")
    activated = re.search(r"source (~/\S+)/bin/activate", install)
    assert activated is not None, "the tutorial's install block activates no environment"
    run(["bash", "-euo", "pipefail", "-c", install], clone, **home)
    python = folder / activated[1].removeprefix("~/") / "bin" / "python"
    search = {"PYTHONPATH": str(clone / "tests")}
    wrong = json.loads(
        run([str(python), "-c", FOLLOW, str(clone / "docs/tutorial.md")], empty, **search).splitlines()[-1]
    )
    for done, shown, came in wrong:
        print(f"{done}\n--- the page shows\n{shown}\n--- came\n{came}")
    if wrong:
        sys.exit(f"the tutorial differs from what came in {len(wrong)} steps")
    print("The tutorial, followed in a fresh clone and a fresh environment, gives what it says.")


PARTS = {"wheel": wheel, "tutorial": tutorial}


def main() -> None:
    """Do the parts that are named."""
    if not sys.argv[1:] or set(sys.argv[1:]) - set(PARTS):
        sys.exit(f"name one of {', '.join(PARTS)}")
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
