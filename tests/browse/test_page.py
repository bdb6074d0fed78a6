"""The page in a real browser: every view, by mouse and by keyboard, on whole, empty, unfinished and damaged results."""

import csv
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import zarr

from distinfluence.app.demo import flipped_labels
from distinfluence.browse.server.http import _PAGE
from distinfluence.store import InfluenceWriter, Layout, annotate, open_influences, write_contributions
from tests.browse.results import WIDE, wide_strip

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
    pair = page.locator("#cell a.card").nth(1).get_attribute("href")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "card"
    page.keyboard.press("Enter")
    settled(page)
    before = int(page.text_content("#point h2").split()[-1])
    page.keyboard.press("]")
    until(page, f"() => document.querySelector('#point h2').textContent === 'Test point {min(before + 1, 296)}'")
    page.keyboard.press("p")
    until(page, f"() => document.querySelector('#point h2').textContent === 'Test point {before}'")
    views = {"2": "#classes table", "4": "#set ul", "5": "#point h2", "6": "#suspects ol", "7": "#provenance pre"}
    for key, shown in views.items():
        page.keyboard.press(key)
        page.wait_for_selector(f"{shown} >> visible=true")
    page.keyboard.press("3")  # where one was, not at the first
    until(page, f"() => document.querySelector('#point h2').textContent === 'Test point {before}'")
    page.keyboard.press("1")
    page.wait_for_selector("#map >> visible=true")
    assert page.locator("#cell a.card").nth(1).get_attribute("href") == pair


def test_what_stands_under_the_cursor_is_told(visit: Any, digits: Path) -> None:
    page = visit(digits, "#view=matrix&rows=0:3&columns=0:3&cursor=1,1")
    assert page.get_attribute("#cursor", "aria-live") == "polite" and page.text_content("#cursor") == ""
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    value = float(open_influences(digits)[1, 2])
    said = page.text_content("#cursor")
    assert said.startswith(f"test 1, training 2: {'helps' if value > 0 else 'harms'} ")
    assert float(said.split()[-1]) == pytest.approx(value, rel=5e-3)


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
    assert page.locator("#suspects option").all_text_contents() == ["net harm", "training loss"]


def test_suspects_by_self_influence_are_offered_where_it_is_known(visit: Any, own_digits: Path) -> None:
    annotate(own_digits, "train", self_influence=np.arange(1500.0))
    page = visit(own_digits, "#view=suspects&by=self_influence&chosen=1499,1497")
    assert page.locator("#suspects a.card").first.get_attribute("href").endswith("=1499")
    checked = page.locator("#suspects input:checked")
    assert [checked.nth(i).get_attribute("value") for i in range(checked.count())] == ["1499", "1497"]
    checked.nth(0).uncheck()
    until(page, "() => location.hash.endsWith('&chosen=1497')")


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
    assert page.get_attribute("#bounds", "aria-label").startswith("error bounds from ")
    for plot in ("residuals", "bounds"):  # drawn, in the colour of those that converged
        assert page.evaluate(_BLUE_DOTS, plot) > 200
    result = open_influences(digits)
    rows = page.locator("#worst-rows tbody tr")
    assert rows.first.locator("a").text_content() == f"test {int(np.argmax(result.relative_residual))}"
    box = page.locator("#bounds").bounding_box()
    place = {"x": 48 + 100.5 / 297 * (box["width"] - 56), "y": 60}
    page.locator("#bounds").hover(position=place)
    said = page.text_content("#bounds + p")
    assert said.startswith("test point ") and "opens it" in said
    row = int(said.split(":")[0].removeprefix("test point "))
    assert float(said.split(": ")[1].split(". ")[0]) == pytest.approx(result.error_bound[row], rel=0.06)
    page.locator("#bounds").click(position=place)
    settled(page)
    assert page.text_content("#point h2") == f"Test point {row}"


_BLUE_DOTS = """(id) => { const c = document.getElementById(id);
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  let n = 0; for (let i = 0; i < d.length; i += 4) if (d[i + 3] && d[i + 2] > d[i] + 60) n++; return n; }"""


def test_a_link_opens_from_another_site_in_another_browser_with_all_that_was_seen(
    visit: Any, chromium: Any, digits: Path
) -> None:
    page = visit(digits, "#view=matrix&rows=0:100&columns=200:600&row-order=class&column-order=loss")
    page.locator("#map").click(position={"x": 300, "y": 100})
    page.wait_for_selector("#cell p")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#copy").click()
    page.wait_for_selector("#copied:not(:empty)")
    copied = page.input_value("#copied-link") or page.evaluate("navigator.clipboard.readText()")
    assert f"?token={page.server.token}#view=matrix" in copied
    seen = page.text_content("#cell"), page.text_content("#window")
    context = chromium.new_context(viewport={"width": 1000, "height": 700})
    try:
        other = context.new_page()
        other.set_content(f"<a id=out href='{copied.replace('&', '&amp;')}'>look</a>")
        other.locator("#out").click()
        other.wait_for_selector("#cell p")
        assert (other.text_content("#cell"), other.text_content("#window")) == seen
        assert "token" not in other.url
        other.goto(other.url.replace("127.0.0.1", "localhost"))  # has no cookie of that name
        assert "The token is missing or wrong" in other.text_content("h1")
    finally:
        context.close()


def test_classes_lead_to_what_helps_and_harms_a_class(visit: Any, digits: Path) -> None:
    page = visit(digits, "#view=classes")
    result = open_influences(digits)
    of_test, of_train = (result.points(axis).labels() for axis in ("test", "train"))
    means = np.array([[result[:][of_test == a][:, of_train == b].mean() for b in range(10)] for a in range(10)])
    shown = np.array(page.locator("#classes td a").all_text_contents(), np.float64).reshape(10, 10)
    np.testing.assert_allclose(shown, means, rtol=0.06, atol=1e-6)
    page.locator("#classes td a").nth(3 * 10 + 9).click()
    settled(page)
    assert page.text_content("#set h2") == f"{(of_test == 3).sum()} test points of class “3”"
    nines = np.flatnonzero(of_train == 9)
    best = nines[np.argmax(result[:][of_test == 3][:, nines].mean(axis=0))]
    assert f"training {best} · “9”" in page.locator("#set a.card").first.text_content()
    page.select_option("#set select >> nth=1", "")
    settled(page)
    page.select_option("#set select >> nth=0", "range")
    settled(page)
    page.fill("#set input", "10:20")
    page.keyboard.press("Tab")
    until(page, "() => document.querySelector('#set h2')?.textContent === '10 test points'")
    best = int(np.argmax(result[10:20].mean(axis=0)))
    assert f"training {best} " in page.locator("#set a.card").first.text_content()


def test_what_is_sorted_by_class_is_named_and_bounded(visit: Any, digits: Path) -> None:
    page = visit(digits, "#view=matrix&row-order=class&column-order=class")
    assert page.text_content("#window") == "test places 0 to 296 by class, training places 0 to 1499 by class"
    counts = np.bincount(open_influences(digits).points("train").labels())
    line, beside = page.evaluate(_COLUMN_INK, int(counts[0])), page.evaluate(_COLUMN_INK, int(counts[0]) + 40)
    assert line > 100 and line > 2 * beside
    page.select_option("#column-order", "loss")
    until(page, "() => document.getElementById('window').textContent.endsWith('by loss')")
    assert page.evaluate(_COLUMN_INK, int(counts[0])) < line / 2


# how much darker than white a column of the map is, in the mean
_COLUMN_INK = """(place) => { const c = document.getElementById('map');
  const x = Math.round((place / 1500) * c.clientWidth) * (c.width / c.clientWidth);
  const d = c.getContext('2d').getImageData(x, 0, 1, c.height).data;
  let sum = 0; for (let i = 0; i < d.length; i += 4) sum += 255 - Math.max(d[i], d[i + 1], d[i + 2]);
  return sum / (d.length / 4); }"""


def test_influences_are_taken_apart_by_layer_and_by_token(visit: Any, tmp_path: Path) -> None:
    path, generator = tmp_path / "parts.zarr", np.random.default_rng(0)
    writer = InfluenceWriter.create(path, Layout(2, 6, 6, top_k=3), {})
    values = generator.standard_normal((2, 6)).astype(np.float32)
    writer.write_strip(0, values)
    writer.finish()
    annotate(path, "train", [f"first second third{i}" for i in range(6)], kind="text")
    shares = {end: generator.standard_normal((2, 2, 2)) for end in ("top", "bottom")}
    tokens = {f"{end}_tokens": generator.standard_normal((2, 2, 3)) for end in ("top", "bottom")}
    write_contributions(path, ["body", "<b>head"], **shares, **tokens)
    page = visit(path, "#view=test&index=1")
    first = page.locator("#point .cards").first.locator("a.card").first
    assert first.locator("th").all_text_contents() == ["body", "<b>head"]
    told = [float(text) for text in first.locator("td.number").all_text_contents()]
    assert told == pytest.approx(shares["top"][1, 0].tolist(), rel=0.06)
    best = int(np.argmax(values[1]))
    assert first.locator(".tokens span").all_text_contents() == ["first ", "second ", f"third{best} "]
    colours = first.locator(".tokens span").evaluate_all("(spans) => spans.map((s) => s.style.background)")
    assert len(set(colours)) == 3
    assert page.locator("#point .cards").first.locator("a.card").nth(2).locator(".blocks").count() == 0


def test_influences_by_input_are_shown_on_the_input(visit: Any, tmp_path: Path) -> None:
    path = tmp_path / "inputs.zarr"
    writer = InfluenceWriter.create(path, Layout(2, 5, 5, input_shape=(4, 4)), {})
    values = np.random.default_rng(0).standard_normal((2, 5, 4, 4)).astype(np.float32)
    writer.write_strip(0, values)
    writer.finish()
    annotate(path, "train", np.random.default_rng(1).random((5, 4, 4)), kind="image")
    page = visit(path)
    links = page.locator("nav a >> visible=true").all_text_contents()
    assert links == ["Influence by input", "Provenance"]
    strongest = int(np.argmax(np.linalg.norm(values[0].reshape(5, 16), axis=1)))
    page.locator("#saliency a.card").first.click()
    settled(page)
    assert page.input_value("#saliency input >> nth=1") == str(strongest)
    assert page.locator("img.saliency").evaluate("(image) => image.complete && image.naturalWidth") == 4
    largest = np.unravel_index(np.abs(values[0, strongest]).argmax(), (4, 4))
    assert page.locator("#saliency .listed td").first.text_content() == ", ".join(map(str, largest))


VIEWS = {
    "matrix": "#view=matrix&row-order=class&column-order=class",
    "classes": "#view=classes",
    "test": "#view=test&index=3",
    "set": "#view=set&class=3",
    "train": "#view=train&index=3",
    "suspects": "#view=suspects&k=20",
    "provenance": "#view=provenance",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_readable_in(visit: Any, page: Any, digits: Path, view: str, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    visit(digits, VIEWS[view])
    texts = ("h1", ".quiet", ".helps", ".harms", ".card", "#window", "td", "nav a")
    contrasts = {selector: page.evaluate(_CONTRAST, selector) for selector in texts if page.query_selector(selector)}
    assert min(contrasts.values()) >= 4.5, contrasts
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (
        scheme == "light"
    )
    if view == "matrix":  # full colour stands out, half of it can be told from nothing
        full = [page.evaluate(_RAMP_CONTRAST, x) for x in (0, 239)]
        half = [page.evaluate(_RAMP_CONTRAST, x) for x in (60, 179)]
        assert min(full) >= 4.5 and min(half) >= 1.8, (full, half)


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


_RAMP_CONTRAST = """(x) => {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const dot = document.getElementById('ramp').getContext('2d').getImageData(x, 6, 1, 1).data;
  const back = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
  const lights = [light(dot), light(back)].sort((a, b) => b - a);
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


def test_two_thousand_by_a_million_is_drawn_from_one_picture_and_its_overview(
    visit: Any, page: Any, wide: Path
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    visit(wide)
    page.wait_for_selector("#map[data-drawn]")
    until_drawn = sorted(asked)
    read = page.evaluate("fetch('/api/traffic').then((answer) => answer.json())")["bytes_read"]
    # The address with the token redirects to the one without. Each file of the page is asked for once, then what the
    # result is, then one picture.
    files = ["/", *(f"/{name}" for name in _PAGE)]
    assert until_drawn == sorted([*files, "/api/summary", "/api/picture"])
    # The picture is made from the coarse overview, in float32. The summary reads one float32 for each training point,
    # to learn which suspicions are known; every strip of that column has its full length on the disk.
    expected = 4 * math.prod(WIDE.levels[0].shape) + 4 * WIDE.n_strips * WIDE.strip
    # The rest is 40 kB of metadata of arrays, two numbers for each test point, and for each strip its state and the
    # checksums of three chunks.
    assert expected < read < expected + 60_000 + 2 * 8 * WIDE.n_test + (1 + 3 * 4) * WIDE.n_strips


def test_a_matrix_too_large_to_sort_is_added_up_by_class(visit: Any, wide: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(wide, tmp_path / "wide.zarr", copy_function=os.link))
    annotate(own, "test", labels=np.arange(WIDE.n_test) % 2, classes=["even", "odd"])
    annotate(own, "train", labels=np.arange(WIDE.n_train) % 3)
    page = visit(own)
    assert page.is_disabled("#row-order") and page.is_visible("#unsorted a")
    page.locator("#unsorted a").click()
    settled(page)
    assert "Estimated from 8 of 245 strips" in page.text_content("#classes")
    values = wide_strip()
    expected = [[values[a::2, b::3].mean() for b in range(3)] for a in range(2)]
    shown = np.array(page.locator("#classes td a").all_text_contents(), np.float64).reshape(2, 3)
    assert np.abs(shown - expected).max() < 0.01
    read = page.evaluate("fetch('/api/traffic').then((answer) => answer.json())")["bytes_read"]
    assert read < 0.05 * 4 * WIDE.n_test * WIDE.n_train


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
