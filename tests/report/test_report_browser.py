"""The pages in a real browser: they render, load nothing else, and the scoreboard can be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck import catalogue
from limbeck.report.compare import write_comparison
from limbeck.report.run import write_run_report
from limbeck.report.scoreboard import write_scoreboard
from tests.report import make
from tests.report.pages import requests

pytestmark = pytest.mark.browser


def opened(browser: Any, path: Path, width: int = 1400, dark: bool = False) -> None:
    """Load a page, and check that nothing was logged, that nothing else was asked for, and that it fits its width."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get("about:blank")
    browser.get_log("browser")
    requests(browser)
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    assert [u for u in requests(browser) if not u.startswith(("file:", "data:", "about:"))] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_report(make.run_folder(tmp_path_factory.mktemp("r") / "run", make.result()))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cards = {
        n: make.card(n, f)
        for n, f in (("delta", "models"), ("alpha", "models"), ("gamma", "datasets"), ("beta", "samplers"))
    }
    folder = make.scoreboard_folder(
        tmp_path_factory.mktemp("board"),
        make.entry("delta", 0.1),
        make.entry("alpha", -0.02, "fails", note="Only small pictures."),
        make.entry("beta", 0.02, "undecided"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "cards", lambda: cards)
        return write_scoreboard(folder)


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (390, False)])
def test_a_run_report_renders(browser, run_page, width, dark):
    opened(browser, run_page, width, dark)
    assert "Knowledge distillation on digits" in browser.title
    charts = browser.find_elements("css selector", "svg.chart")
    assert len(charts) == 5
    assert all(c.size["width"] > 200 and c.size["height"] > 100 for c in charts)
    line = browser.find_element("css selector", "svg.chart path[style*='--s1']")
    assert line.value_of_css_property("stroke") == ("rgb(116, 181, 236)" if dark else "rgb(31, 106, 165)")
    paper = browser.find_element("tag name", "body").value_of_css_property("background-color")
    assert ("22, 21, 19" in paper) == dark


def test_links_of_a_run_report_lead_to_its_sections(browser, run_page):
    opened(browser, run_page)
    for link in browser.find_elements("css selector", "header nav a"):
        name = link.get_attribute("href").rsplit("#", 1)[1]
        link.click()
        assert (
            abs(browser.execute_script(f"return document.getElementById('{name}').getBoundingClientRect().top")) < 900
        )


@pytest.mark.parametrize("width", [1400, 390])
def test_an_unfinished_run_and_a_comparison_render(browser, tmp_path, width):
    opened(browser, write_run_report(make.run_folder(tmp_path / "run", None)), width)
    assert "has not ended" in browser.find_element("css selector", ".notice").text
    opened(browser, write_comparison(make.comparison(), tmp_path), width)
    assert len(browser.find_elements("css selector", "svg.strip circle")) == 9


def shown(browser: Any) -> list[str]:
    """Names of the methods that can be seen, in order."""
    return [e.get_attribute("id") for e in browser.find_elements("css selector", "tbody.entry") if e.is_displayed()]


def clicker(browser: Any) -> Callable[[str], str]:
    def click(label: str) -> str:
        heading = browser.find_element("xpath", f"//table[@id='methods']/thead//th[normalize-space(.)='{label}']")
        heading.find_element("tag name", "button").click()
        return str(heading.get_attribute("aria-sort"))

    return click


@pytest.mark.parametrize("width", [1400, 390])
def test_the_scoreboard_sorts_by_text(browser, board, width):
    opened(browser, board, width)
    click = clicker(browser)
    assert shown(browser) == ["delta", "alpha", "gamma", "beta"]
    assert click("Method") == "ascending"
    assert shown(browser) == ["alpha", "beta", "delta", "gamma"]
    assert click("Method") == "descending"
    assert shown(browser) == ["gamma", "delta", "beta", "alpha"]
    assert click("Verdict") == "ascending"
    assert shown(browser)[0] == "alpha"
    sorted_columns = browser.find_elements("css selector", "#methods > thead th:not([aria-sort='none'])")
    assert [h.text.split()[0] for h in sorted_columns] == ["Verdict"]


def test_the_scoreboard_sorts_by_number_with_absent_values_last(browser, board):
    opened(browser, board)
    click = clicker(browser)
    assert click("Difference") == "descending"
    assert shown(browser) == ["delta", "beta", "alpha", "gamma"]  # as text, 0.1 and 0.02 would change places
    assert click("Difference") == "ascending"
    assert shown(browser) == ["alpha", "beta", "delta", "gamma"]


def test_the_scoreboard_sorts_from_the_keyboard(browser, board):
    from selenium.webdriver.common.keys import Keys

    opened(browser, board)
    button = browser.find_element("css selector", "#methods > thead button")
    browser.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    assert shown(browser)[0] == "alpha"


def test_the_scoreboard_filters(browser, board):
    from selenium.webdriver.support.ui import Select

    opened(browser, board)
    count = browser.find_element("id", "count")
    search = browser.find_element("id", "search")
    search.send_keys("SMALL pictures")
    assert shown(browser) == ["alpha"]
    assert count.text == "1 of 4"
    search.clear()
    search.send_keys("paper")
    assert len(shown(browser)) == 4
    Select(browser.find_element("id", "family")).select_by_visible_text("models")
    assert shown(browser) == ["delta", "alpha"]
    Select(browser.find_element("id", "verdict")).select_by_visible_text("holds")
    assert shown(browser) == ["delta"]
    Select(browser.find_element("id", "verdict")).select_by_visible_text("not measured")
    assert shown(browser) == []
    assert browser.find_element("id", "nothing").is_displayed()
    browser.find_element("id", "clear").click()
    assert len(shown(browser)) == 4
    assert not browser.find_element("id", "nothing").is_displayed()


@pytest.mark.parametrize("width", [1400, 390])
def test_a_row_opens_its_details(browser, board, width):
    opened(browser, board, width)
    button = browser.find_element("css selector", "#delta button.open")
    details = browser.find_element("id", button.get_attribute("aria-controls"))
    assert not details.is_displayed()
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert details.is_displayed()
    assert "its likelihood is better" in details.text
    assert len(details.find_elements("css selector", "svg.strip circle")) == 12
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    clicker(browser)("Method")
    assert details.is_displayed()  # details move with their row
    button.click()
    assert not details.is_displayed()
    assert button.get_attribute("aria-expanded") == "false"


def test_a_click_anywhere_in_a_row_opens_it(browser, board):
    opened(browser, board)
    browser.find_element("css selector", "#gamma td.claim").click()
    assert "limbeck verify gamma" in browser.find_element("css selector", "#gamma tr.details").text


def test_an_address_with_a_name_opens_that_method(browser, board):
    opened(browser, board)
    browser.get("about:blank")
    browser.get(f"{board.as_uri()}#beta")
    assert browser.find_element("css selector", "#beta tr.details").is_displayed()
    assert not browser.find_element("css selector", "#alpha tr.details").is_displayed()
