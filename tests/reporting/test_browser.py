"""The page in a browser: at every width, on a phone, in dark mode and in print."""

import re

import pytest
from chromium import browser as browser
from test_notebook import evaluated as evaluated
from test_report import run_dir as run_dir  # the fixture: a run folder with everything in it

from rlhf.reporting.report import build_report

OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
CUT_OFF = """[...document.querySelectorAll('.scroll')].filter(n => n.scrollWidth > n.clientWidth)
    .map(n => n.querySelector('caption').textContent)"""
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
# Sizes on the screen of the texts in plots: their own, times the plot's scale.
TEXTS = """[...document.querySelectorAll('.plot text')].map(t => parseFloat(getComputedStyle(t).fontSize)
    * t.ownerSVGElement.getBoundingClientRect().width / t.ownerSVGElement.viewBox.baseVal.width)"""
OUTSIDE = """[...document.querySelectorAll('.plot text')].filter(t => {
    const [a, b] = [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()];
    return a.right > b.right + 1 || a.left < b.left - 1 || a.bottom > b.bottom + 1 || a.top < b.top - 1;
}).map(t => t.textContent)"""
COLOURS = """[...document.querySelectorAll('.plot text, p, td, a, figcaption')].map(t =>
    t.closest('svg') ? getComputedStyle(t).fill : getComputedStyle(t).color)"""


def luminance(colour):
    """WCAG 2.1's relative luminance of "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_nothing_is_cut_off_at_any_width_and_plots_can_be_read(browser, evaluated):
    path = build_report(evaluated, "A title that is rather long, as titles are", "Ä. Student").as_uri()
    page = browser.new_page()
    for width in (360, 390, 600, 704, 768, 960, 1024, 1280, 1440, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(path)
        page.evaluate(OPEN)
        assert page.evaluate(CUT_OFF) == [], width
        assert page.evaluate(WIDER) is False, width
        assert page.evaluate(OUTSIDE) == [], width
        assert min(page.evaluate(TEXTS)) >= 11, width
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_both_modes_those_of_plots_too(browser, evaluated, scheme):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(build_report(evaluated).as_uri())
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for colour in set(page.evaluate(COLOURS)):
        low, high = sorted((paper, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour
    context.close()


def test_what_is_folded_is_printed(browser, evaluated):
    page = browser.new_page()
    page.goto(build_report(evaluated).as_uri())
    page.emulate_media(media="print")
    assert page.locator("#environment td").first.bounding_box()["height"] > 0
    assert not page.locator(".toc").is_visible()
    page.close()
