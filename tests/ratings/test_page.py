"""The rating page as a rater meets it: in a browser, by keyboard, over a reload, from a file and over HTTP."""

import json
import threading

import pytest
import rating_sheets
from chromium import browser as browser
from hostile import HOSTILE

from rlhf.ratings.collect import check_sheet, import_sheets, stored_sheets
from rlhf.ratings.scale import CRITERIA
from rlhf.ratings.serve import SheetServer
from rlhf.ratings.sheet import make_key, render_sheet

KEY = rating_sheets.key(prompts=3, repeats=1)
COUNT = len(KEY["items"]) * len(CRITERIA)


@pytest.fixture
def sheet(tmp_path):
    path = tmp_path / "sheet.html"
    path.write_text(render_sheet(KEY), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.problems.append(request.url) if "//" in request.url[7:] else None)
    yield page
    context.close()
    assert page.problems == []


def rate_all(page, skip=0):
    """By keyboard alone: name, then every question's rating, screen by screen; ratings 1 2 3 4 5 1 2 …"""
    page.keyboard.press("n")  # nothing has the focus yet: goes to the first question
    page.click("#back")
    page.fill("#rater", "Ann Ä.")
    page.press("#rater", "Tab")
    page.keyboard.press("n")
    for i in range(COUNT - skip):
        page.keyboard.press(str(1 + i % 5))
        if (i + 1) % (len(CRITERIA) * 3) == 0 and i + 1 < COUNT:  # the screen is full: Next has the focus
            page.keyboard.press("Enter")
            page.keyboard.press("n")


def saved(page, tmp_path):
    while page.locator("#next").is_enabled():
        page.click("#next")
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_by_keyboard_over_a_reload_to_a_file_that_is_imported(page, sheet, tmp_path):
    page.goto(sheet)
    rate_all(page, skip=1)
    assert page.inner_text("#count") == f"{COUNT - 1} of {COUNT} ratings"
    page.locator("textarea").last.fill("a note")
    page.reload()
    assert page.inner_text("#count") == f"{COUNT - 1} of {COUNT} ratings"
    assert page.input_value("#rater") == "Ann Ä."
    record = json.loads(saved(page, tmp_path).read_text())
    assert record["complete"] is False
    assert "1 ratings are still missing" in page.inner_text("#missing")
    page.click("#open")
    page.keyboard.press("5")
    path = saved(page, tmp_path)
    assert path.name.startswith(f"ratings-{KEY['sheet_id'][:6]}-Ann")
    [stored] = import_sheets(KEY, [path], tmp_path / "store")
    assert stored["complete"]
    values = [v for item in KEY["items"] for v in stored["items"][item["item_id"]]["ratings"].values()]
    assert values == [1 + i % 5 for i in range(COUNT)]
    assert stored["items"][KEY["items"][-1]["item_id"]]["note"] == "a note"


def test_by_mouse(page, sheet):
    page.goto(sheet)
    page.click("#next")
    label = page.locator(".steps label").nth(3)
    label.click()
    assert page.inner_text("#count") == f"1 of {COUNT} ratings"
    assert page.locator(".word").first.inner_text() == f"4: {CRITERIA['coherence'].steps[3]}"


def test_a_rater_who_comes_back_is_at_the_first_prompt_without_ratings(page, sheet):
    def shown():
        return page.evaluate("[...document.querySelectorAll('main > section')].findIndex(s => !s.hidden)")

    page.goto(sheet)
    page.reload()
    assert shown() == 0  # nothing is rated yet: what to do
    for _ in range(len(CRITERIA) * 3 + 1):  # the first prompt, and one rating of the second
        page.keyboard.press("n")
        page.keyboard.press("3")
    page.click("#back")
    page.reload()
    assert shown() == 2
    for _ in range(COUNT - len(CRITERIA) * 3 - 1):
        page.keyboard.press("n")
        page.keyboard.press("3")
    page.reload()
    assert page.inner_text("#missing").startswith("All ratings are complete.")
    assert page.locator("#save").is_visible()


def test_a_name_is_asked_for(page, sheet):
    page.goto(sheet)
    while page.locator("#next").is_enabled():
        page.click("#next")
    page.click("#save")
    assert page.evaluate("document.activeElement.id") == "rater"
    assert "name or initials" in page.inner_text("#count")


def test_markup_in_a_response_is_text(page, sheet):
    page.goto(sheet)
    assert page.title() == "Rating sheet"
    shown = page.locator(".response").all_text_contents()
    assert any("<script>document.title='owned'</script> **bold** & \"quoted\"\nnext line" in text for text in shown)
    assert page.locator(".response *").count() == 0
    assert page.locator("em", has_text="the response is empty").count() >= 1


def test_hostile_texts_stay_texts(browser, tmp_path):
    """With the page's Content-Security-Policy and without it, on the escaping alone."""
    rows = [
        {"prompt_id": f"p{i}", "model": model, "prompt": text, "response": f"{model} {text}"}
        for i, text in enumerate(HOSTILE)
        for model in rating_sheets.MODELS
    ]
    key = make_key(rows, 0)
    path = tmp_path / "sheet.html"
    path.write_text(render_sheet(key), encoding="utf-8")
    for policy in (True, False):
        context = browser.new_context(bypass_csp=not policy)
        page, asked = context.new_page(), []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(path.as_uri())
        assert page.evaluate("window.owned === undefined && document.title === 'Rating sheet'")
        assert asked == [path.as_uri()]
        assert page.evaluate("document.querySelectorAll('.text *, script + script, iframe, svg, img, a').length") == 0
        shown = page.locator(".response").all_text_contents()
        assert shown == [item["response"] for item in key["items"]]  # what check_sheet compares
        isolated = page.locator(".response").first.evaluate("node => getComputedStyle(node).unicodeBidi")
        assert isolated in ("isolate", "plaintext", "isolate-override")  # a writing direction ends with its text
        context.close()


def test_every_control_has_a_name_for_a_screen_reader(page, sheet):
    page.goto(sheet)
    page.click("#next")
    radios = page.get_by_role("radio")
    names = {radios.nth(i).get_attribute("aria-label") for i in range(radios.count())}
    assert len(names) == radios.count() == 3 * 5 * 5
    assert f"Coherence, response B: 2, {CRITERIA['coherence'].steps[1]}" in names
    assert page.get_by_role("group", name="Relevance").count() == 3
    assert page.get_by_role("textbox", name="Notes on response C").count() == 1
    assert page.get_by_role("progressbar", name="Ratings given").count() == 1


def test_it_fits_a_phone(page, sheet):
    page.set_viewport_size({"width": 360, "height": 700})
    page.goto(sheet)
    for _ in range(2):
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360
        page.click("#next")
    box = page.locator(".steps label:visible").first.bounding_box()
    assert min(box["width"], box["height"]) >= 32  # a finger hits it


def test_a_served_page_sends(page, tmp_path):
    server = SheetServer(render_sheet(KEY), KEY, tmp_path / "store")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        page.on("request", lambda request: page.problems.clear())  # http addresses are meant here
        page.goto(server.url)
        rate_all(page)
        page.click("#next")
        page.click("#send")
        page.get_by_text("Received. Thank you").wait_for()
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
    [sheet] = stored_sheets(KEY, tmp_path / "store")
    assert sheet["complete"]
    assert sheet["rater"] == "Ann Ä."


def test_an_altered_page_is_refused(page, sheet, tmp_path):
    page.goto(sheet)
    rate_all(page)
    page.evaluate("document.querySelector('.response').textContent = 'a better one'")
    record = json.loads(saved(page, tmp_path).read_text())
    with pytest.raises(ValueError, match="the sheet's response, found another text"):
        check_sheet(KEY, record, "a.json")
