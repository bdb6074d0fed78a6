"""Makes the pictures of the page in docs/browse.md and docs/tutorial.md, in Chromium: python docs/make_pictures.py."""

import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeAlias

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from tests.browse.conftest import CHROMIUM, serving
from tests.browse.results import digits
from tests.walkthrough import follow

View: TypeAlias = tuple[str, Literal["light", "dark"], int]  # address, scheme, height
PICTURES = Path(__file__).parent / "pictures"
DEMO: dict[str, View] = {
    "matrix": ("#view=matrix&row-order=class&column-order=class&contrast=root", "light", 700),
    "test-point": ("#view=test&index=159&k=8", "light", 800),
    "training-point": ("#view=train&index=512&k=8", "light", 800),
    "suspects": ("#view=suspects&k=60", "dark", 640),
    "provenance": ("#view=provenance", "light", 1000),
}
TUTORIAL: dict[str, View] = {
    "tutorial-test-point": ("#view=test&index=519&k=6", "light", 820),
    "tutorial-suspects": ("#view=suspects&k=30", "light", 640),
}


def main() -> None:
    """Make both results, visit, picture."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as demo, tempfile.TemporaryDirectory() as tutorial:
        digits(Path(demo) / "influences.zarr")
        sys.path.insert(0, tutorial)  # where the page's digits.py is written
        for _ in follow(PICTURES.parent / "tutorial.md", Path(tutorial)):
            pass
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for folder, views in ((demo, DEMO), (tutorial, TUTORIAL)):
                with serving(Path(folder) / "influences.zarr") as server:
                    for name, view in views.items():
                        picture(browser, server.url, name, *view)
            browser.close()


def picture(browser: Browser, url: str, name: str, view: str, scheme: Literal["light", "dark"], height: int) -> None:
    """One view of the page, as a small PNG."""
    page = browser.new_page(viewport={"width": 1180, "height": height}, color_scheme=scheme)
    page.goto(url + view)
    page.wait_for_selector("body[data-shown]:not([data-shown=''])")
    if name == "matrix":
        page.locator("#map").click(position={"x": 420, "y": 155})
        page.wait_for_selector("#cell p")
    taken = Image.open(BytesIO(page.screenshot()))
    # as many colours as a palette has, spread over all that there are: else greys are tinted and the ramp is banded
    small = taken.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(PICTURES / f"{name}.png", optimize=True)
    page.close()


if __name__ == "__main__":
    main()
