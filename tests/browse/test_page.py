"""The page in a real browser: every view, by mouse and by keyboard, on whole, empty, unfinished and damaged results."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from distinfluence.demo import flipped_labels
from distinfluence.store import InfluenceWriter, Layout, annotate, open_influences
from tests.browse.results import WIDE

pytestmark = pytest.mark.browser


def until(page: Any, condition: str) -> None:
    """Wait for a function of the page to say true. Playwright's own wait evaluates text there, which is forbidden."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def settled(page: Any) -> None:
    """Wait until the view that the address names is shown."""
    until(page, "() => document.body.dataset.shown === (location.hash || '#')")


def drawn(page: Any, rows: str, columns: str) -> None:
    until(page, f"() => document.getElementById('map').dataset.drawn === '{rows} {columns}'")


def test_the_matrix_is_shown_and_a_click_leads_to_examples(visit: Any, digits: Path) -> None:
    page = visit(digits)
    assert page.text_content("#state") == "complete"
    assert page.text_content("#window").startswith("test 0 to 296, training 0 to 1499")
    colours = page.evaluate(
        "() => { const c = document.getElementById('map');"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " let blue = 0, orange = 0; for (let i = 0; i < d.length; i += 4) { if (d[i + 2] > d[i] + 60) blue++;"
        " if (d[i] > d[i + 2] + 60) orange++; } return [blue, orange]; }"
    )
    assert min(colours) > 500
    page.locator("#map").click(position={"x": 200, "y": 100})
    page.wait_for_selector("#cell p")
    pair = page.locator("#cell a.card")
    assert pair.count() == 2 and page.locator("#cell img").count() == 2
    train = int(pair.nth(1).get_attribute("href").rpartition("=")[2])
    test = int(pair.nth(0).get_attribute("href").rpartition("=")[2])
    value = float(page.text_content("#cell p").split(": ")[1])
    assert value == pytest.approx(open_influences(digits)[test, train], rel=1e-3)
    pair.nth(0).click()
    settled(page)
    assert page.text_content("#point h2") == f"Test point {test}"
    assert page.locator("#point .cards").nth(0).locator("a.card").count() == 8
    first = page.locator("#point .cards").nth(0).locator("a.card").first
    best = int(open_influences(digits).top(test, 1).indices[0])
    assert f"training {best}" in first.text_content()
    assert first.locator("img").evaluate("(image) => image.complete && image.naturalWidth") == 8
    first.click()
    settled(page)
    assert page.text_content("#point h2") == f"Training point {best}"
    assert f"test {test}" in page.text_content("#point") or page.locator("#point a.card").count() == 16
    page.go_back()
    settled(page)
    assert page.text_content("#point h2") == f"Test point {test}"


def test_rows_and_columns_are_sorted_and_zoomed_and_the_view_is_a_link(visit: Any, digits: Path) -> None:
    page = visit(digits)
    for order in ("class", "loss", "norm", "net harm", "cluster"):
        with page.expect_response(lambda response: "/api/picture" in response.url):
            page.select_option("#column-order", order)
    page.select_option("#row-order", "class")
    page.locator("button", has_text="zoom in").click()
    drawn(page, "74:223", "375:1125")
    link = page.evaluate("location.href")
    assert "row-order=class" in link and "column-order=cluster" in link and "token" not in link
    page.goto("about:blank")
    page.goto(link)
    drawn(page, "74:223", "375:1125")
    assert page.input_value("#row-order") == "class"
    page.locator("#map").hover()
    page.mouse.wheel(0, -200)
    until(page, "() => !document.getElementById('map').dataset.drawn.startsWith('74:223')")
    page.locator("button", has_text="show all").click()
    drawn(page, "0:297", "0:1500")


def test_sorted_cells_name_the_points_that_stand_there(visit: Any, digits: Path) -> None:
    page = visit(digits, "#view=matrix&rows=0:4&columns=0:4&row-order=loss&column-order=class")
    page.locator("#map").click(position={"x": 2, "y": 2})
    page.wait_for_selector("#cell p")
    result = open_influences(digits)
    hrefs = [page.locator("#cell a.card").nth(i).get_attribute("href").rpartition("=")[2] for i in (0, 1)]
    assert int(hrefs[0]) == int(np.argsort(-result.test_loss, kind="stable")[0])
    assert int(hrefs[1]) == int(np.argsort(result.points("train").labels(), kind="stable")[0])


def test_everything_is_reached_by_keyboard(visit: Any, digits: Path) -> None:
    page = visit(digits)
    page.focus("#map")
    page.keyboard.press("+")
    drawn(page, "74:223", "375:1125")
    page.keyboard.press("Shift+ArrowRight")
    drawn(page, "74:223", "563:1313")
    page.keyboard.press("0")
    drawn(page, "0:297", "0:1500")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#cell p")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "card"
    page.keyboard.press("Enter")
    settled(page)
    before = int(page.text_content("#point h2").split()[-1])
    page.keyboard.press("]")
    until(page, f"() => document.querySelector('#point h2').textContent === 'Test point {min(before + 1, 296)}'")
    for key, shown in (("4", "#suspects ol"), ("5", "#provenance pre"), ("3", "#point h2"), ("1", "#map")):
        page.keyboard.press(key)
        page.wait_for_selector(f"{shown} >> visible=true")


def test_suspicious_labels_are_ranked_and_the_chosen_ones_are_exported(
    visit: Any, digits: Path, tmp_path: Path
) -> None:
    page = visit(digits, "#view=suspects&k=75")
    listed = [
        int(h.rpartition("=")[2]) for h in page.eval_on_selector_all("#suspects a.card", "(a) => a.map((b) => b.href)")
    ]
    expected = np.argsort(open_influences(digits).train_total, kind="stable")[:75]
    assert listed == expected.tolist()
    assert len(set(listed) & set(flipped_labels().tolist())) > 40
    for i in (0, 2):
        page.locator("#suspects input[type=checkbox]").nth(i).check()
    with page.expect_download() as download:
        page.locator("button", has_text="export CSV").click()
    download.value.save_as(tmp_path / "chosen.csv")
    rows = list(csv.DictReader((tmp_path / "chosen.csv").read_text().splitlines()))
    assert [int(row["train"]) for row in rows] == [listed[0], listed[2]]
    assert float(rows[0]["net_harm"]) == pytest.approx(-float(open_influences(digits).train_total[listed[0]]))
    with page.expect_download() as download:
        page.locator("button", has_text="export JSON").click()
    download.value.save_as(tmp_path / "chosen.json")
    assert [point["train"] for point in json.loads((tmp_path / "chosen.json").read_text())] == [listed[0], listed[2]]
    page.select_option("#suspects select", "train_loss")
    settled(page)
    worst = int(np.argmax(open_influences(digits).train_loss))
    assert page.locator("#suspects a.card").first.get_attribute("href").endswith(f"={worst}")
    page.select_option("#suspects select", "self_influence")
    page.wait_for_selector("#problem >> visible=true")
    assert "annotate" in page.text_content("#problem")


def test_numbers_keep_their_power_of_ten(visit: Any, tmp_path: Path) -> None:
    values = np.array([0.0, 20.0, 1230.0, 1e5, 6.02e23, 0.05, 0.123, 1.2e-10, 1e-20, 3e7], np.float32)
    writer = InfluenceWriter.create(tmp_path / "i.zarr", Layout(1, values.size, values.size), {})
    writer.write_strip(0, values[np.newaxis], loss=values)
    writer.finish()
    page = visit(tmp_path / "i.zarr", "#view=test&index=0&k=10")
    cards = page.locator("#point .cards").first.locator("a.card")
    seen = {
        int(cards.nth(i).get_attribute("href").rpartition("=")[2]): [
            float(cards.nth(i).locator(kind).text_content().removeprefix("loss ")) for kind in (".value", ".quiet")
        ]
        for i in range(values.size)
    }
    for i, value in enumerate(values.tolist()):
        assert seen[i] == pytest.approx([value, value], rel=1e-3), value


def test_provenance_and_convergence(visit: Any, digits: Path) -> None:
    page = visit(digits, "#view=provenance")
    text = page.text_content("#provenance")
    assert "CgInfluence" in text and "297 of 297 rows" in text and "fingerprints" in text
    assert "0 strips not computed yet, 3 strips computed" in text
    assert page.get_attribute("#residuals", "aria-label").startswith("relative residuals from ")


def test_light_and_dark_are_both_readable(visit: Any, digits: Path) -> None:
    page = visit(digits, "#view=test&index=3")
    contrasts = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for selector in ("body", ".quiet", ".helps", ".harms", ".card"):
            contrasts.append(page.evaluate(_CONTRAST, selector))
    assert min(contrasts) >= 4.5, contrasts
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"


_CONTRAST = """(selector) => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (text) => { const [r, g, b] = parts(text).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const node = document.querySelector(selector);
  let back = node;
  while (parts(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
  const colours = [getComputedStyle(node).color, getComputedStyle(back).backgroundColor];
  const lights = colours.map(light).sort((x, y) => y - x);
  return (lights[0] + 0.05) / (lights[1] + 0.05); }"""


def test_a_result_without_strips_says_that_nothing_is_computed(visit: Any, tmp_path: Path) -> None:
    InfluenceWriter.create(tmp_path / "empty.zarr", Layout(20, 50, 10), {})
    page = visit(tmp_path / "empty.zarr")
    assert page.text_content("#state") == "running: 0 of 5 strips"
    assert "nothing is computed yet" in page.text_content("#window")
    page.evaluate("location.hash = '#view=test&index=0'")
    page.wait_for_selector("#point h2")
    assert "ranked over what is there" in page.text_content("#point") and "None yet." in page.text_content("#point")
    page.evaluate("location.hash = '#view=suspects'")
    page.wait_for_selector("#suspects >> text=No strip is finished yet.")


def test_an_unfinished_result_shows_what_is_there(visit: Any, digits: Path, own_digits: Path) -> None:
    InfluenceWriter.open(own_digits).reopen([1])
    page = visit(own_digits)
    assert page.text_content("#state") == "running: 2 of 3 strips"
    assert "33 % not computed yet" in page.text_content("#window")
    page.evaluate("location.hash = '#view=train&index=700'")
    page.wait_for_selector("#point >> text=not computed yet")
    page.evaluate("location.hash = '#view=test&index=5'")
    page.wait_for_selector("#point >> text=ranked over what is there")
    there = [j for j in open_influences(digits).top(5, 50).indices.tolist() if not 500 <= j < 1000]
    assert f"training {there[0]}" in page.locator("#point .cards a.card").first.text_content()
    page.evaluate("location.hash = '#view=provenance'")
    page.wait_for_selector("#provenance >> text=1 strips not computed yet, 2 strips computed")


def test_a_run_that_goes_on_is_followed(visit: Any, own_digits: Path) -> None:
    values = open_influences(own_digits)[:, 500:1000]
    writer = InfluenceWriter.open(own_digits)
    writer.reopen([1])
    page = visit(own_digits)
    assert "33 % not computed yet" in page.text_content("#window")
    writer.write_strip(1, values)
    until(page, "() => !document.getElementById('window').textContent.includes('not computed')")
    writer.finish()
    until(page, "() => document.getElementById('state').textContent === 'complete'")
    assert page.is_hidden("#problem")


def test_the_worst_test_points_are_a_way_in(visit: Any, digits: Path) -> None:
    page = visit(digits)
    worst = int(np.argmax(open_influences(digits).test_loss))
    page.locator("#cell a.card").first.click()
    settled(page)
    assert page.text_content("#point h2") == f"Test point {worst}"


def test_a_damaged_result_shows_where_and_goes_on(visit: Any, own_digits: Path) -> None:
    shard = own_digits / "influences/c/0/1"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    (own_digits / "influences/c/0/2").unlink()
    page = visit(own_digits)
    assert "damaged strips: 1" in page.text_content("#window")
    page.evaluate("location.hash = '#view=train&index=700'")
    page.wait_for_selector("#problem >> visible=true")
    assert "damaged" in page.text_content("#problem")
    page.evaluate("location.hash = '#view=test&index=5'")
    page.wait_for_selector("#point h2")
    assert page.is_hidden("#problem")
    page.evaluate("location.hash = '#view=provenance'")
    page.wait_for_selector("#provenance >> text=1 strips file lost")


def test_no_script_in_labels_or_texts_runs(visit: Any, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    path = tmp_path / "evil.zarr"
    writer = InfluenceWriter.create(path, Layout(3, 8, 4), {"solver": {"method": evil}, "remarks": [evil]})
    for i in range(2):
        writer.write_strip(i, np.random.default_rng(i).standard_normal((3, 4)))
    writer.finish()
    annotate(path, "train", [evil] * 8, kind="text", labels=np.arange(8) % 2, classes=[evil, "javascript:alert(1)"])
    annotate(path, "test", np.ones((3, 2)), kind="table", columns=[evil, "b"], labels=[0, 1, 0], classes=[evil, evil])
    page = visit(path, "#view=test&index=1")
    for view in (
        "view=test&index=1",
        "view=train&index=0",
        "view=suspects",
        "view=provenance",
        f"view={evil}&index={evil}",
    ):
        page.evaluate("(hash) => { location.hash = hash; }", f"#{view}")
        settled(page)
        assert page.locator("main img").count() == 0 and page.locator("main script").count() == 0
    page.evaluate("location.hash = '#view=test&index=1'")
    page.wait_for_selector("#point .sample p")
    assert page.locator("#point .sample p").first.text_content() == evil
    assert page.title() == "Influences: evil.zarr"


def test_texts_and_table_rows_are_shown_as_what_they_are(visit: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.zarr"
    writer = InfluenceWriter.create(path, Layout(2, 6, 6), {})
    writer.write_strip(0, np.arange(12.0).reshape(2, 6))
    writer.finish()
    annotate(path, "train", [f"sentence {i}\nsecond line" for i in range(6)], kind="text")
    annotate(path, "test", np.array([[1.5, 2.0], [3.0, 4.0]]), kind="table", columns=["age", "height"])
    page = visit(path, "#view=test&index=0")
    assert page.locator("#point .large td").all_text_contents() == ["age", "1.5", "height", "2"]
    assert page.locator("#point .cards a.card p").first.text_content() == "sentence 5\nsecond line"


def test_two_thousand_by_a_million_opens_on_under_five_percent_of_its_bytes(visit: Any, wide: Path) -> None:
    whole = 4 * WIDE.n_test * WIDE.n_train
    page = visit(wide)
    first = page.evaluate("fetch('/api/traffic').then((answer) => answer.json())")["bytes_read"]
    assert page.text_content("#window").startswith("test 0 to 1999, training 0 to 999999, from an overview")
    assert 0 < first < 0.05 * whole
    page.locator("#map").click(position={"x": 300, "y": 100})
    page.wait_for_selector("#cell p")
    for _ in range(9):
        with page.expect_response(lambda response: "/api/picture" in response.url):
            page.keyboard.press("+")
    until(page, "() => !document.getElementById('window').textContent.includes('overview')")
    pair = page.locator("#cell a.card")
    pair.nth(1).click()
    settled(page)
    pair.nth(0).wait_for(state="attached")
    every = page.evaluate("fetch('/api/traffic').then((answer) => answer.json())")["bytes_read"]
    assert every < 0.05 * whole


def test_an_overview_that_was_not_stored_is_made(visit: Any, tmp_path: Path) -> None:
    layout = Layout(100, 45_000, 9000)
    writer = InfluenceWriter.create(tmp_path / "old.zarr", layout, {})
    for i in range(4):
        writer.write_strip(i, np.full((100, 9000), float(i + 1)))
    group = zarr.open_group(str(writer.path), mode="r+")
    del group["overview"]
    page = visit(writer.path)
    assert "from an overview" in page.text_content("#window") and "20 % not computed yet" in page.text_content(
        "#window"
    )
