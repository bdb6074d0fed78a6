"""The first minutes of someone who has just come, in environments of their own: what `pip install` gives, and a page.

Run: python -m tests.first_minutes wheel      the built wheel in an empty environment, no compiler; then the README
     python -m tests.first_minutes tutorial   a fresh clone, the tutorial's own install line, and then all it says

PyTorch and the other packages are not installed again. Each environment is lent the packages of the one that runs this,
as links in a folder on its path: those that the wheel's own requirements name, directly or through one another, and no
other. `make install` takes wheels alone, so none of them needed a compiler.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OWN = """
import sys, sysconfig
from pathlib import Path
places = [Path(sys.prefix), Path(sys.base_prefix), *map(Path, sys.argv[1:])]
found = {n: getattr(m, "__file__", None) for n, m in list(sys.modules.items())}
files = {n: Path(f) for n, f in found.items() if f and Path(f).is_absolute()}
strange = {n: str(f) for n, f in files.items() if not any(f.is_relative_to(place) for place in places)}
assert not strange, strange
ours = [n for n in files if n.partition(".")[0] == "distinfluence"]
assert ours and all(files[n].is_relative_to(sys.prefix) for n in ours), "not imported from the environment's own folder"
"""
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
    """What a command prints; its errors are shown. The tester's own PYTHONPATH is dropped."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\nended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def required(name: str, extras: frozenset[str], seen: dict[str, Distribution]) -> None:
    """Add to `seen` the packages that a package with these extras requires, directly or through others."""
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in (*extras, "")):
            continue
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if key not in seen or requirement.extras:
            seen[key] = distribution(requirement.name)
            required(requirement.name, frozenset(requirement.extras), seen)


def top_level(package: Distribution) -> Iterator[str]:
    """The entries of `site-packages` that a package has."""
    yield from {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}


def lend(folder: Path, *extras: str) -> list[str]:
    """Link what `distinfluence` with these extras requires into a folder; the names of the packages."""
    packages: dict[str, Distribution] = {}
    required("distinfluence", frozenset(extras), packages)
    folder.mkdir()
    for package in packages.values():
        for entry in top_level(package):
            source = Path(str(package.locate_file(entry)))
            if source.suffix != ".pth" and not (folder / entry).exists():
                (folder / entry).symlink_to(source)
    return sorted(packages)


def wheel(folder: Path) -> None:
    """Build the wheel, install it next to its requirements alone, and run its help and the README's Python."""
    run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)], ROOT)
    (built,) = folder.glob("*.whl")
    lent = lend(folder / "lent")
    layer = {"PYTHONPATH": str(folder / "lent"), "CC": "/bin/false", "CXX": "/bin/false"}
    venv.create(folder / "empty", with_pip=True)
    python = folder / "empty" / "bin" / "python"
    # without an index, so that a requirement which is not lent is an error
    run(
        [str(python), "-m", "pip", "install", "-q", "--no-index", "--only-binary", ":all:", str(built)], folder, **layer
    )
    assert "Usage: distinfluence" in run([str(python.with_name("distinfluence")), "--help"], folder, **layer)
    code = f"{block('README.md', 'python')}\n{OWN}"
    printed = run([str(python), "-c", code, str(folder / "lent")], folder, **layer)
    assert printed.startswith("True "), printed
    print(f"{built.name} is installed without a compiler, `distinfluence --help` and the README's Python run.")
    print(f"Lent to it, as it requires them: {', '.join(lent)}.")


def tutorial(folder: Path) -> None:
    """Clone, install as the page says, and follow the page in an empty folder."""
    clone, empty = folder / "clone", folder / "digits"
    empty.mkdir()
    run(["git", "clone", "-q", str(ROOT), str(clone)], folder)
    install = block("docs/tutorial.md", "bash")
    extras = re.search(r"'\.\[([\w,]+)\]'", install)
    activated = re.search(r"source (~/\S+)/bin/activate", install)
    assert activated is not None and extras is not None, "the tutorial's install block has changed its form"
    lent = lend(folder / "lent", *extras[1].split(","))
    path = f"{Path(sys.base_prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    home = {"HOME": str(folder), "PIP_QUIET": "1", "PATH": path, "PYTHONPATH": str(folder / "lent")}
    run(["bash", "-euo", "pipefail", "-c", install], clone, **home)
    python = folder / activated[1].removeprefix("~/") / "bin" / "python"
    search = {"PYTHONPATH": f"{folder / 'lent'}{os.pathsep}{clone / 'tests'}"}
    wrong = json.loads(
        run([str(python), "-c", FOLLOW, str(clone / "docs/tutorial.md")], empty, **search).splitlines()[-1]
    )
    for done, shown, came in wrong:
        print(f"{done}\n--- the page shows\n{shown}\n--- came\n{came}")
    if wrong:
        sys.exit(f"the tutorial differs from what came in {len(wrong)} steps")
    missing = {"influences.zarr", "top.csv", "highlights.html", "map.png"} - {file.name for file in empty.iterdir()}
    assert not missing, missing
    print("The tutorial, followed in a fresh clone and a fresh environment, gives what it says.")
    print(f"Lent to it, as it requires them: {', '.join(lent)}.")


PARTS = {"wheel": wheel, "tutorial": tutorial}


def main() -> None:
    """Do the parts that are named."""
    if not sys.argv[1:] or set(sys.argv[1:]) - set(PARTS):
        sys.exit(f"name one of {', '.join(PARTS)}")
    # a shell has what it runs in the background ignore Ctrl-C, and with it the commands that the tutorial interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
