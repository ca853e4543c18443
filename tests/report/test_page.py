"""The page in a browser: figures render, tables sort and filter, and nothing is requested from a
network."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from support import StaticPage

import nerve
from nerve.report.page.render import MAX_ROWS, PageFigure, PageTable, render
from nerve.report.write import write_report
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

HOSTILE = "<script>alert(1)</script>"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        if os.environ.get("CI") == "true":
            pytest.fail("chromium and chromium-driver must be installed; see .ci/apt.txt")
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def sweep(trained_runs: Path) -> Path:
    """The report on 2 activations × 2 normalizations × 2 seeds."""
    return write_report(trained_runs)


def opened(browser: webdriver.Chrome, index: Path) -> webdriver.Chrome:
    """Opens a page from its file; log messages of earlier pages are discarded."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(index.as_uri())
    return browser


def requested(browser: webdriver.Chrome) -> set[str]:
    """The URLs that the page requested, except embedded data."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    return {address for address in addresses if not address.startswith("data:")}


def column(browser: webdriver.Chrome, table: str, name: str) -> list[str]:
    """The displayed text of a column's cells."""
    part = browser.find_element(By.ID, f"table-{table}")
    names = [button.text for button in part.find_elements(By.CSS_SELECTOR, "th button")]
    script = (
        "return [...arguments[0].querySelectorAll(arguments[1])].map((cell) => cell.textContent)"
    )
    return browser.execute_script(script, part, f"td:nth-child({names.index(name) + 1})")


def header(browser: webdriver.Chrome, table: str, name: str) -> WebElement:
    part = browser.find_element(By.ID, f"table-{table}")
    (button,) = [b for b in part.find_elements(By.CSS_SELECTOR, "th button") if b.text == name]
    return button


def filtered(browser: webdriver.Chrome, table: str, name: str, text: str) -> str:
    """Types text into a column's filter; returns what the page says about the number of rows."""
    part = browser.find_element(By.ID, f"table-{table}")
    field = part.find_element(By.CSS_SELECTOR, f'input[aria-label="filter {name}"]')
    field.send_keys(Keys.CONTROL + "a")
    field.send_keys(Keys.DELETE, text)
    return part.find_element(By.CSS_SELECTOR, ".count").text


def test_a_real_sweep_renders_without_errors_and_without_a_network(browser, sweep):
    page = opened(browser, sweep)
    images = page.find_elements(By.CSS_SELECTOR, "figure img")
    names = {path.stem for path in (sweep.parent / "figures").glob("*.svg")}
    assert {"curves_by_activation.name", "layers_by_normalization.kind", "loss"} <= names
    assert len(images) == len(names)
    for image in images:
        assert int(image.get_property("naturalWidth")) > 500
        assert image.size["width"] > 300
        assert "rank(pre)" in (image.get_attribute("alt") or "")
    captions = [caption.text for caption in page.find_elements(By.TAG_NAME, "figcaption")]
    assert all(
        "N/D = 8" in caption and "4 designs with 2 seeds each" in caption for caption in captions
    )
    assert page.find_element(By.TAG_NAME, "h1").text == f"8 runs under {sweep.parents[1] / 'runs'}"
    assert page.get_log("browser") == []
    assert requested(page) == {sweep.as_uri()}
    # What the links beside figures and tables point to is there.
    for link in page.find_elements(By.CSS_SELECTOR, "figcaption a, .caption a"):
        assert (sweep.parent / str(link.get_dom_attribute("href"))).is_file()


def test_the_table_of_a_real_sweep_sorts_and_filters(browser, sweep):
    runs = nerve.load_runs(sweep.parents[1] / "runs")
    page = opened(browser, sweep)
    losses = sorted(runs["final.val_loss"])
    header(page, "runs", "final_loss").click()
    shown = [float(text) for text in column(page, "runs", "final_loss")]
    assert shown == pytest.approx(losses, rel=1e-3)
    header(page, "runs", "final_loss").click()
    shown = [float(text) for text in column(page, "runs", "final_loss")]
    assert shown == pytest.approx(losses[::-1], rel=1e-3)
    assert filtered(page, "runs", "activation.name", "RELU") == "4 of 8 rows"
    assert set(column(page, "runs", "activation.name")) == {"relu"}
    assert filtered(page, "runs", "normalization.kind", "none") == "2 of 8 rows"
    assert filtered(page, "runs", "seed", "=1") == "1 of 8 rows"
    (run_id,) = column(page, "runs", "run_id")
    row = runs.set_index("run_id").loc[run_id]
    assert (row["activation.name"], row["normalization.kind"], row["seed"]) == ("relu", "none", 1)
    assert page.get_log("browser") == []


def test_hostile_runs_are_shown_as_text(
    browser, tmp_path: Path, row: Callable[..., dict[str, Any]]
):
    """Names, errors, configuration values and the path itself are text on the page."""
    for i, name in enumerate((HOSTILE, "$x_{$ \u202e\n</script><!--", "gelu")):
        config = {"activation": {"name": name}, HOSTILE: {"x": i}, "seed": 0}
        directory = tmp_path / "<img src=x onerror=alert(2)>" / str(i)
        record = RunRecord.create(directory, config, sweep=HOSTILE, unigram_loss=9.0)
        store = RunStore(directory, record.run_id)
        store.append_metrics(row(step, 0, val_loss=5 - step / 9 + i) for step in (0, 9))
        store.flush(9)
        error = ValueError(HOSTILE) if i == 2 else None
        record.finish("failed" if error else "done", error, step=9)
    page = opened(browser, write_report(tmp_path / "<img src=x onerror=alert(2)>"))
    assert "<img src=x onerror=alert(2)>" in page.find_element(By.TAG_NAME, "h1").text
    assert "<img src=x onerror=alert(2)>" in page.title
    assert HOSTILE in column(page, "runs", "activation.name")
    assert column(page, "runs", "sweep") == [HOSTILE] * 3
    assert f"ValueError: {HOSTILE}" in column(page, "runs", "error")
    assert HOSTILE in page.find_element(By.ID, "notes").text
    images = page.find_elements(By.TAG_NAME, "img")
    assert images
    assert all(int(image.get_property("naturalWidth")) > 0 for image in images)
    assert len(page.find_elements(By.TAG_NAME, "script")) == 1
    assert page.get_log("browser") == []  # an alert would also have stopped the commands above
    assert len(requested(page)) == 1


def page_of(tmp_path: Path, rows: list[list[Any]]) -> Path:
    """A page with one table of the columns `text` and `number`."""
    frame = pd.DataFrame(rows, columns=["text", "number"])
    path = tmp_path / "index.html"
    path.write_text(render("t", [], [], [], [PageTable("runs", "c", len(rows), frame)]))
    return path


def test_sorting_puts_numbers_by_size_names_in_natural_order_and_missing_values_last(
    browser, tmp_path
):
    rows = [["a10", 10.0], ["a2", None], [None, -1.0], ["b", 9.0], ["A3", 1e-7]]
    page = opened(browser, page_of(tmp_path, rows))
    header(page, "runs", "number").click()
    assert column(page, "runs", "number") == ["-1", "1e-7", "9", "10", "–"]
    header(page, "runs", "number").click()
    assert column(page, "runs", "number") == ["10", "9", "1e-7", "-1", "–"]
    header(page, "runs", "text").click()
    assert column(page, "runs", "text") == ["a2", "A3", "a10", "b", "–"]
    sorts = [
        th.get_attribute("aria-sort") for th in page.find_elements(By.CSS_SELECTOR, "th[scope]")
    ]
    assert sorts == ["ascending", "none"]


def test_filters_compare_numbers_and_find_text(browser, tmp_path):
    rows = [[f"run {i}", float(i)] for i in range(1000)]
    page = opened(browser, page_of(tmp_path, rows))
    part = page.find_element(By.ID, "table-runs")
    assert part.find_element(By.CSS_SELECTOR, ".count").text == "1000 of 1000 rows"
    assert len(column(page, "runs", "text")) == 1000
    assert filtered(page, "runs", "number", ">= 990") == "10 of 1000 rows"
    assert filtered(page, "runs", "text", "7") == "1 of 1000 rows"
    assert filtered(page, "runs", "number", "") == "271 of 1000 rows"
    assert filtered(page, "runs", "text", "<3") == "0 of 1000 rows"  # texts have no size


def test_tables_are_read_without_scripts(tmp_path):
    """Four digits, integers without decimals, and a dash for missing values."""
    values = [10.0, None, 1e-7, 0.123456, 2.5, -12345.67, 9999.7, float("inf")]
    page = page_of(tmp_path, [[f"run {i}", value] for i, value in enumerate(values)]).read_text()
    head, *rows = StaticPage(page).tables["runs"]
    assert head == ["text", "number"]
    shown = ["10", "–", "1e-7", "0.1235", "2.500", "-12346", "10000", "inf"]
    assert rows == [[f"run {i}", text] for i, text in enumerate(shown)]


def test_a_long_table_shows_its_first_rows_and_links_its_files(tmp_path):
    page = page_of(tmp_path, [["run", i] for i in range(MAX_ROWS + 1)]).read_text()
    found = StaticPage(page)
    assert [row[1] for row in found.tables["runs"][1:]] == [str(i) for i in range(1000)]
    assert "the first 1000 of 1001 rows; the files have all of them" in found.text
    assert 'href="tables/runs.csv"' in page
    whole = page_of(tmp_path, [["run", i] for i in range(MAX_ROWS)]).read_text()
    assert "the files have all" not in whole


@pytest.mark.parametrize(
    "text",
    [
        "</script>",
        "<!--<script>",
        "]]>",
        "\u2028\u2029",
        "\udcff",
        "&lt;",
        '" onclick="',
        "{{ title }}",
    ],
)
def test_no_text_is_read_as_markup_or_as_a_placeholder(text):
    """Any text comes out as it went in; characters that UTF-8 cannot encode become question
    marks."""
    frame = pd.DataFrame([[text]], columns=pd.Index([text], dtype=object), dtype=object)
    figure = PageFigure("f", text, "")
    page = render(text, [(text, text)], [text], [figure], [PageTable(text, text, 1, frame)])
    seen = text.replace("\udcff", "?")
    found = StaticPage(page)
    assert list(found.tables.values()) == [[[seen], [seen]]]
    # Title and heading, label and fact, note, caption; the table's heading, caption and two links.
    assert found.text.count(seen) == 10
    plain = render("t", [("l", "v")], ["n"], [figure], [PageTable("t", "c", 1, frame)])
    assert page.count("<script") == plain.count("<script") == 1
