"""Runs examples/ and keeps pictures and words for docs/examples.md: python docs/make_example_pictures.py [name …]."""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    """Run, quantise, write."""
    wanted = set(sys.argv[1:])
    for script in sorted((ROOT / "examples").glob("*.py")):
        if wanted and script.stem not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(script), "--out", folder]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            (PICTURES / f"{script.stem}.txt").write_text(printed)
            for picture in Path(folder).glob("*.png"):
                taken = Image.open(picture).convert("RGB")
                taken.quantize(256, dither=Image.Dither.NONE).save(PICTURES / f"example-{picture.name}", optimize=True)


if __name__ == "__main__":
    main()
