"""The report page as a reader meets it: in headless Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser, find_browser
from run_folders import make_run

from dpg_cli.report import write_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here (Debian: apt-get install chromium)")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'{{7*7}}"


def test_the_harness_sees_requests_and_errors(tmp_path: Path) -> None:
    """What the other tests find absent is found where it is present."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('oh'); missing()</script>")
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        assert "http://127.0.0.1:9/x.png" in browser.requests
        assert any("oh" in line for line in browser.complaints)
        assert any("missing" in line for line in browser.complaints)


def test_a_page_works_without_errors_and_without_the_network(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run"))
    with Browser(tmp_path / "profile") as browser:
        browser.look(1200, 900)
        browser.open(page)
        assert browser.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)") == [40, 300]
        # Curves: every chart has its lines, drawn with a width and a height.
        assert browser.evaluate("document.querySelectorAll('.chart').length") >= 8
        boxes = browser.evaluate(
            "[...document.querySelectorAll('.chart polyline')].map(line => [line.getBBox().width, line.getBBox().height])"
        )
        assert len(boxes) >= 11
        assert all(width > 200 for width, _ in boxes)
        assert boxes[0][1] > 100  # Φ rises through most of the chart's height
        # The browser of examples.
        first = "document.querySelector('#rows .text').textContent"
        highest = browser.evaluate(first)
        assert browser.evaluate("document.querySelectorAll('#rows > li').length") == 10
        assert browser.evaluate("document.getElementById('position').textContent") == "page 1 of 12"
        browser.evaluate("document.getElementById('next').click()")
        assert browser.evaluate("document.getElementById('position').textContent") == "page 2 of 12"
        assert browser.evaluate(first) != highest
        browser.evaluate(
            "{const box = document.getElementById('search'); box.value = 'prompt 77'; "
            "box.dispatchEvent(new Event('input'))}"
        )
        assert browser.evaluate("document.querySelectorAll('#rows > li').length") == 1
        assert "example 77 " in browser.evaluate("document.querySelector('#rows .meta').textContent")
        colours = browser.evaluate(
            "[...new Set([...document.querySelectorAll('#rows .text span')].map(s => getComputedStyle(s).backgroundColor))]"
        )
        assert len(colours) >= 4
        browser.evaluate(
            "{const box = document.getElementById('search'); box.value = ''; "
            "const origin = document.getElementById('origin'); origin.value = 'control'; "
            "origin.dispatchEvent(new Event('change'))}"
        )
        assert browser.evaluate("document.getElementById('status').textContent") == "20 examples"
        assert browser.complaints == []
        outside = [url for url in browser.requests if not url.startswith("data:") and url != page.as_uri()]
        assert outside == []
        assert len(browser.requests) >= 1  # the page itself: requests are seen


def test_phone_and_dark(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run"))
    backgrounds = {}
    with Browser(tmp_path / "profile") as browser:
        for width, scheme in ((360, "light"), (360, "dark"), (1200, "dark")):
            browser.look(width, 800, scheme)
            browser.open(page)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            small = browser.evaluate(
                "[...document.querySelectorAll('button, select, input')].filter(e => e.offsetHeight < 40).length"
            )
            assert small == 0
            backgrounds[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert backgrounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}


def test_hostile_data_stays_text(tmp_path: Path) -> None:
    records = [
        {
            "example_id": 1, "prompt": HOSTILE, "text": HOSTILE, "token_ids": [1], "input_ids": [1, 1],
            "reward": 1.0, "token_rewards": [1.0, 2.0],
        }
    ]  # fmt: skip
    rows = [{"step": 0, "phi": 1.0, HOSTILE: 2.0}, {"step": 1, "phi": 2.0, HOSTILE: 1.0}]
    folder = make_run(
        tmp_path / "run", task=HOSTILE, effect=HOSTILE, records=records, rows=rows, command=["dpg", HOSTILE]
    )
    page = write_report(folder)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.evaluate("window.hacked") is None
        assert browser.evaluate("document.scripts.length") == 2
        assert browser.evaluate("document.querySelector('#rows .text').textContent") == HOSTILE
        assert browser.evaluate("document.querySelector('#rows .prompt').textContent") == "Prompt " + HOSTILE
        assert browser.complaints == []
        # Should something slip through all the same, the policy stops it.
        forced = tmp_path / "forced.html"
        forced.write_text(page.read_text().replace("</main>", "<script>window.hacked=1</script></main>"))
        browser.open(forced)
        assert browser.evaluate("window.hacked") is None
        assert any("Content Security Policy" in line for line in browser.complaints)
