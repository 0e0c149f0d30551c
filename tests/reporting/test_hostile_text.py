"""Text of models, data, raters and configs that wants to be more than text: on the page, in the PDF, in Markdown."""

import io
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from hostile import ALL, HOSTILE
from markdown_it import MarkdownIt
from pypdf import PdfReader
from pypdf.generic import IndirectObject
from tensorboard.plugin_util import markdown_to_safe_html
from test_notebook import execute
from test_notebook import outputs as outputs_of
from test_report import run_dir as run_dir  # the fixture: a run folder with everything in it
from test_report import run_json, write

from rlhf.evaluation.summary import summarise
from rlhf.model_card.markdown import code, plain, table
from rlhf.reporting import notebook as notebook_code
from rlhf.reporting.files import write_report
from rlhf.reporting.notebook import make_notebook
from rlhf.reporting.report import build_report
from rlhf.reporting.run import read_run
from rlhf.reporting.seed_report import build_seed_report
from rlhf.tracking.board import verbatim


@pytest.fixture
def hostile_run(run_dir):
    """A run with such texts wherever a text can stand."""
    for stage in ("reward", "ppo_full", "ppo_lora", "evaluation"):
        facts = run_json(stage) | {"device": ALL, "git_commit": ALL, "error": ALL, "command": ALL}
        facts |= {"config": {ALL: ALL, "list": HOSTILE}, "versions": {ALL: ALL}, "data": {ALL: {ALL: 3}}}
        facts["models"] = [{"role": ALL, "name": ALL, "parameters": 1, "trainable": 1}]
        write(run_dir / stage / "run.json", facts)
    numbers = {"score": 0.5, "response_length": 3}
    rows = [
        {"prompt_id": f"{i} {ALL}", "model": model, "prompt": text, "response": text, **numbers}
        for i, text in enumerate(HOSTILE)
        for model in ("base", "full", "lora")
    ]
    write(run_dir / "evaluation/responses.jsonl", rows)
    write(run_dir / "evaluation/rating_responses.jsonl", rows)
    reward = json.loads((run_dir / "reward/evaluation.json").read_text())
    write(run_dir / "reward/evaluation.json", reward | {"labels": [ALL, "$\\frac{$"]})
    value = {"mean": 3.0, "interval": [2.0, 4.0]}
    note = {"prompt_id": ALL, "model": ALL, "rater": ALL, "note": ALL}
    write(
        run_dir / "ratings/ratings.json",
        {
            **{"sheet_id": ALL, "confidence": 0.95, "criteria": {"coherence": ALL}, "raters": [ALL]},
            **{"incomplete": [ALL], "n_prompts": 2, "pairs": []},
            "models": {"base": {"overall": value, "coherence": value}},
            **{"agreement": {"coherence": 0.5}, "consistency": {ALL: {"n": 1, "same": 1.0, "mean_difference": 0.0}}},
            **{"notes": [note], "words": HOSTILE},
        },
    )
    return run_dir


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path, checks, policy=True):
    """Open a page and click everything on it; returns (marker, requests elsewhere, answers of the checks).

    policy: with the page's Content-Security-Policy, or without it, on the escaping alone.
    """
    context = browser.new_context(bypass_csp=not policy)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (asked.append("dialog"), dialog.dismiss()))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('a, summary, img').forEach(node => node.click())")
    page.wait_for_timeout(200)
    answers = [page.evaluate(check) for check in checks]
    owned = page.evaluate("window.owned === undefined")
    context.close()
    return owned, [url for url in asked if url.partition("#")[0] != path.as_uri()], answers


TABLE = ("div", "style", "table", "thead", "tbody", "tr", "th", "td", "p")
CHECKS = (
    "document.querySelectorAll('script, iframe, img, image, link, base, object, meta[http-equiv=refresh]').length",
    "[...document.querySelectorAll('a')].filter(n => !/^#[a-z]+$/.test(n.getAttribute('href'))).length",
    "document.querySelectorAll('svg').length - document.querySelectorAll('figure > .plot > svg').length",
    "document.querySelectorAll('svg :not(defs, clipPath, rect, g, path, use, text)').length",
    "[...document.querySelectorAll('*')].filter(n => [...n.attributes].some(a => a.name.startsWith('on'))).length",
    "document.querySelectorAll('style').length",
    "getComputedStyle(document.querySelector('main')).display",
)


@pytest.mark.parametrize("policy", [True, False])
def test_the_report_runs_nothing_and_asks_for_nothing(browser, hostile_run, policy):
    path = build_report(hostile_run, title=ALL, author=ALL)
    harmless, asked, answers = opened(browser, path, CHECKS, policy)
    assert harmless
    assert asked == []
    assert answers == [0, 0, 0, 0, 0, 1, "block"]
    assert "1337" not in path.read_text()  # 7 * 191: no template in a text was filled in


@pytest.mark.parametrize("policy", [True, False])
def test_the_seeds_page_too(browser, hostile_run, policy):
    other = hostile_run.with_name("<img src=x onerror=window.owned=1> $\\frac{$")
    shutil.copytree(hostile_run, other)
    for stage in ("reward", "ppo_full", "ppo_lora", "evaluation"):  # not a copy: another seed
        facts = json.loads((other / stage / "run.json").read_text())
        write(other / stage / "run.json", facts | {"seed": 1})
    path = build_seed_report(hostile_run.with_name("many"), [hostile_run, other], title=ALL, author=ALL)
    harmless, asked, answers = opened(browser, path, CHECKS, policy)
    assert harmless
    assert asked == []
    assert answers == [0, 0, 0, 0, 0, 1, "block"]


def test_the_browser_would_have_run_it(browser, tmp_path):
    """Were the texts duds, the tests above could not fail."""
    (tmp_path / "page.html").write_text(f"<html><body><main>{HOSTILE[0]}{HOSTILE[13]}</main></body></html>")
    assert opened(browser, tmp_path / "page.html", ())[0] is False


def test_the_pdf_links_to_nothing_and_does_nothing(hostile_run):
    _, pdf, _ = write_report(hostile_run, title=ALL, author=ALL)
    reader = PdfReader(io.BytesIO(pdf.read_bytes()))
    words = {"/URI", "/JS", "/JavaScript", "/Launch", "/AA", "/SubmitForm", "/EmbeddedFile", "/OpenAction"}
    found = set()
    for number in range(1, len(reader.xref_objStm) + max(reader.xref[0]) + 1):
        try:
            thing = reader.get_object(IndirectObject(number, 0, reader))
        except Exception:  # numbers that stand for nothing
            continue
        if hasattr(thing, "keys"):
            found |= set(thing.keys()) | {str(thing.get("/S"))}
    assert "/Type" in found
    assert found & (words - {"/OpenAction"}) == set()
    action = reader.trailer["/Root"].get("/OpenAction")
    assert action is None or isinstance(action, list)  # a place on a page, no action


def test_a_title_in_the_notebook_is_text(hostile_run):
    render = MarkdownIt("commonmark").render
    for path in ("evaluation", "ppo_full", "ppo_lora", "reward"):
        shutil.rmtree(hostile_run / path)
    for text in [*HOSTILE, "a_b_c *d* `e` # f", "2) x - y"]:
        notebook = nbformat.reads(make_notebook(read_run(hostile_run), {}, text, text).decode(), as_version=4)
        html = render(notebook.cells[0].source)
        assert html.count("<") == 6, text  # of one heading and two paragraphs
        first = html[: html.index("</h1>")].removeprefix("<h1>")
        assert "<" not in first, text
        assert "\x1b" not in first
    assert render(plain("a_b \\ *c* [d](e) <f> &amp; ~g~ | 1. $h$")) == (
        "<p>a_b \\ *c* [d](e) &lt;f&gt; &amp;amp; ~g~ | 1. $h$</p>\n"
    )


def test_what_the_notebook_shows_is_text(hostile_run):
    rows = [json.loads(line) for line in (hostile_run / "evaluation/responses.jsonl").read_text().splitlines()]
    rows = [row | {"prompt_length": 5, "eos": True, "gold_score": 0.5} for row in rows]
    write(hostile_run / "evaluation/responses.jsonl", rows)
    write(hostile_run / "evaluation/evaluation.json", summarise(rows, ["base", "full", "lora"], 0.95, 0))
    write(hostile_run / "ppo_full/warnings.jsonl", {"step": 1, "seen": ALL, "since": 1, "helps": ALL})
    path = write_report(hostile_run, title=ALL)[2]
    notebook = nbformat.read(path, as_version=4)
    ours = Path(notebook_code.__file__).with_suffix(".md").read_text(encoding="utf-8")
    for cell in notebook.cells:  # a run's files may say anything: the code is the package's
        assert cell.cell_type == "markdown" or f"```python\n{cell.source}\n```" in ours
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    assert {kind for output in outputs for kind in output.get("data", {})} == {"image/png", "text/html", "text/plain"}
    for text in (*texts, *pages):
        assert all(c.isprintable() or c in "\n\u00a0" for c in text), text  # no-break blanks are ours, in intervals
    assert r"\x1b[2J\x1b]8;;http://evil.example\x07link" in "".join(texts)
    assert r"\x1b[2J\x1b]8;;http://evil.example\x07link" in "".join(pages)
    assert "![x](http://evil.example/x.png) [x](javascript:alert(1))" in "".join(pages)
    tags = {tag for page in pages for tag in re.findall(r"<(/?[a-zA-Z!][^\s>]*)", page)}
    assert tags - {f"{end}{name}" for end in ("", "/") for name in TABLE} == set()
    for page in filter(None, pages):
        assert "mathjax_ignore" in page  # a formula, with \href in it, is text, too
    assert outputs_of(execute(path)) == outputs_of(notebook)


def test_in_a_model_card_a_text_is_a_code_span():
    def shape(text):
        forms = code(text), f"# {code(text)}", table(["a"], [[code(text)]])
        html = "".join(map(MarkdownIt("commonmark", {"html": True}).enable("table").render, forms))
        assert "\x1b" not in html
        return re.findall("<[^>]*>", html)

    assert shape("x").count("<code>") == 3
    for text in [*HOSTILE, ALL, "`", "``` `", "a|b", "\\", "x\\|y`"]:
        assert shape(text) == shape("x"), text


def test_tensorboard_shows_text_as_it_is():
    for text in HOSTILE:
        html = markdown_to_safe_html(verbatim(f"prompt: {text}\n\n{text}"))
        tags = {part.split(">")[0] for part in html.split("<")[1:]}
        assert tags == {"pre", "code", "/code", "/pre"}, text
        assert html.count("<pre>") == 1


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\n\r", "\u2028", "\x0b", "\x85"])
def test_no_line_end_leads_out_of_tensorboards_verbatim(end):
    html = markdown_to_safe_html(verbatim(f"text{end}{end}![x](http://evil.example/x.png){end}<img src=http://evil>"))
    assert "<img" not in html
