"""Makes the pictures of docs/browse.md, the page on the demo's digits in Chromium: python docs/make_pictures.py."""

import sys
import tempfile
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.browse.conftest import CHROMIUM, serving
from tests.browse.results import digits

PICTURES = Path(__file__).parent / "pictures"
VIEWS = {
    "matrix": ("#view=matrix&row-order=class&column-order=class&contrast=root", "light", 640),
    "test-point": ("#view=test&index=159&k=6", "light", 820),
    "suspects": ("#view=suspects&k=60", "dark", 640),
}


def main() -> None:
    """Serve, visit, picture."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        digits(Path(folder) / "influences.zarr")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with serving(Path(folder) / "influences.zarr") as server:
            for name, (view, scheme, height) in VIEWS.items():
                page = browser.new_page(viewport={"width": 1180, "height": height}, color_scheme=scheme)
                page.goto(server.url + view)
                page.wait_for_selector("body[data-shown]:not([data-shown=''])")
                if name == "matrix":
                    page.locator("#map").click(position={"x": 420, "y": 215})
                    page.wait_for_selector("#cell p")
                taken = Image.open(BytesIO(page.screenshot()))
                taken.quantize(64, dither=Image.Dither.NONE).save(PICTURES / f"{name}.png", optimize=True)
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
