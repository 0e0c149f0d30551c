"""The PDF holds what the page holds: read back by another library."""

import io
import re

import pytest
from matplotlib.figure import Figure
from pypdf import PdfReader

from rlhf.reporting.pdf import to_pdf
from rlhf.reporting.plots.style import to_png

COLOURS = {"one": "red", "two": "green", "three": "blue"}
IMAGES = {name: to_png(Figure(figsize=(4.2, 3.2), dpi=100, facecolor=colour)) for name, colour in COLOURS.items()}
PLOTS = "".join(
    f'<figure data-plot="{name}"><div class="plot"><svg><text>not this</text></svg></div>'
    f"<figcaption>Under plot {name}.</figcaption></figure>"
    for name in IMAGES
)
PAGE = f"""<!DOCTYPE html><html><head><meta charset="utf-8"><title>no</title><style>p {{ color: red }}</style></head>
<body>
<h1>RLHF run demo</h1><nav><a href="#x">nor this</a></nav><p class="verdict">A gain of <strong>+0.812</strong>
over &lt;b&gt;base&lt;/b&gt;.</p><h2>Models</h2>
<details><summary>Settings</summary><table><caption>Settings of it</caption><thead>
<tr><th>Field</th><th class="n">Value</th></tr></thead>
<tbody><tr><td>lr</td><td class="n">3e-06</td></tr>
<tr><td>n</td><td class="n">7,000</td></tr></tbody></table></details>
<details class="screen"><summary>All</summary><p>for the screen</p><details><p>and this</p></details><p>still</p>
</details>
<div class="plots">{PLOTS}</div>
<article class="sample"><h3>Prompt 3 of 9</h3><p class="text prompt">Why?</p>
<div><h4>base</h4><p class="text">Because.</p></div>
<div><h4>full</h4><p class="text">So.</p></div></article>
<ul><li>one point</li></ul><p class="text">first line
second line ä Ω → √</p></body></html>"""


def read(page):
    reader = PdfReader(io.BytesIO(to_pdf(page, IMAGES)))
    return reader, re.sub(r"[ \t]+", " ", "\n".join(page.extract_text() for page in reader.pages))


def test_texts_tables_and_plots_are_there():
    reader, text = read(PAGE)
    for words in ("RLHF run demo", "A gain of +0.812 over <b>base</b>.", "Settings of it", "3e-06", "7,000"):
        assert words in text, words
    for words in ("Under plot one.", "Under plot three.", "Prompt 3 of 9", "Why?", "Because.", "So."):
        assert words in text, words
    assert "• one point" in text
    assert "first line\nsecond line ä Ω → √" in text
    for words in ("color", "not this", "nor this", "for the screen", "and this", "still", "boxes"):
        assert words not in text, words
    assert [image.image.size for image in reader.pages[0].images] == [(420, 320)] * 3
    assert reader.metadata.title == "RLHF run demo"
    titles = [entry["/Title"] for entry in reader.outline if not isinstance(entry, list)]
    assert titles == ["RLHF run demo"]


def test_every_page_says_what_it_is():
    reader, _ = read(PAGE.replace("<li>one point</li>", "<li>point</li>" * 200))
    assert len(reader.pages) > 2
    for number, page in enumerate(reader.pages, start=1):
        assert f"RLHF run demo, page {number} of {len(reader.pages)}" in page.extract_text()


@pytest.mark.parametrize("text", ["x" * 3000, "\u4f60\u597d \U0001f600", "a\u202eb\u0007c", "word " * 3000])
def test_odd_texts_do_not_cost_the_file(text):
    page = PAGE.replace("3e-06", text).replace("first line", text).replace("Because.", text).replace("Why?", text)
    assert len(read(page)[0].pages) >= 1


def test_letters_of_many_scripts_are_there_and_those_that_are_not_are_named():
    assert "Ä. Öztürk, Ελένη, Мария" in read(PAGE.replace("one point", "Ä. Öztürk, Ελένη, Мария"))[1]
    text = " ".join(read(PAGE.replace("one point", "\u4f60\u597d"))[1].split())
    assert (
        "2 characters of this report (Chinese), such as U+4F60, U+597D, are not in this PDF's font and show as" in text
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("なぜ 얼음 ทำ बर्फ", "characters of this report (Devanagari, Thai, Hiragana, Hangul), such as U+092B"),
        ("لماذا يطفو", "Letters in Arabic are not joined or put in order. The HTML page shows them."),
        (
            "למה 冰",
            "(Chinese), such as U+51B0, are not in this PDF's font and show as boxes. Letters in Hebrew are not",
        ),
    ],
)
def test_what_the_pdf_does_not_show_as_it_is_written_is_said(text, line):
    assert line in " ".join(read(PAGE.replace("one point", text))[1].split())


@pytest.mark.parametrize("before", [40, 60, 64, 80])
def test_a_table_that_fits_on_a_page_is_not_broken(before):
    rows = "".join(f"<tr><td>row {i}</td><td>{i}</td></tr>" for i in range(30))
    table = f"<h2>About it</h2><table><caption>Short</caption><thead><tr><th>A</th></tr></thead>{rows}</table>"
    reader, _ = read(PAGE.replace("<li>one point</li>", "<li>point</li>" * before + table))
    pages = [page.extract_text() for page in reader.pages]
    (place,) = [i for i, text in enumerate(pages) if "row 0" in text]
    assert "Short" in pages[place]
    assert "About it" in pages[place]  # its heading is with it
    assert "row 29" in pages[place]


def test_a_long_table_repeats_its_heads():
    rows = "".join(f"<tr><td>row {i}</td><td>{i}</td></tr>" for i in range(200))
    table = f"<table><caption>Long</caption><thead><tr><th>Header</th></tr></thead><tbody>{rows}</tbody></table>"
    reader, text = read(PAGE.replace("<li>one point</li>", table))
    assert all(f"row {i}" in text for i in range(200))
    with_rows = [page.extract_text() for page in reader.pages if "row " in page.extract_text()]
    assert len(with_rows) > 2
    assert all("Header" in page for page in with_rows)


def test_no_word_of_a_narrow_column_is_broken():
    head = "".join(f"<th>{name}</th>" for name in ("Stage", "Role", "Name", "Command"))
    first = f"<td>stage</td><td>policy</td><td>{'n ' * 60}</td><td>{'c ' * 60}</td>"
    table = f"<table><tr>{head}</tr><tr>{first}</tr><tr><td>st</td><td>reference</td><td>x</td><td>y</td></tr></table>"
    text = read(PAGE.replace("<li>one point</li>", table))[1]
    for word in ("stage", "policy", "reference", "Stage", "Role"):
        assert word in text, word


def test_numbers_end_where_their_column_ends_and_words_begin_where_it_begins():
    rows = "".join(f'<tr><td>{word}</td><td class="n">{n}</td></tr>' for word, n in (("Ab", "1"), ("Abcdef", "1,000")))
    page = PAGE.replace("<li>one point</li>", f"<table><caption>Both</caption>{rows}</table>")
    places = {}
    for sheet in PdfReader(io.BytesIO(to_pdf(page, IMAGES))).pages:
        sheet.extract_text(visitor_text=lambda text, cm, tm, *_: places.setdefault(text.strip(), tm[4]))
    assert places["Ab"] == places["Abcdef"]
    assert places["1"] > places["1,000"] + 5


@pytest.mark.parametrize(("words", "beside"), [(20, True), (3000, False)])
def test_responses_stand_side_by_side_where_they_fit_on_a_page(words, beside):
    page = PAGE.replace("Because.", "Because " * words)
    places = []
    for sheet in PdfReader(io.BytesIO(to_pdf(page, IMAGES))).pages:
        sheet.extract_text(visitor_text=lambda text, cm, tm, *_: places.append((text.strip(), tm[4])))
    (first,), (second,) = ([x for text, x in places if text == name] for name in ("base", "full"))
    assert (second > first + 50) is beside
