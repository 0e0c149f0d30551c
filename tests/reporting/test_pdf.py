"""The PDF holds what the page holds: read back by another library."""

import io
import re
from typing import NamedTuple

import pytest
from matplotlib.figure import Figure
from pypdf import PdfReader

from rlhf.reporting import pdf
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


class Line(NamedTuple):
    """A text of a PDF: millimetres from the left, and from the top of the first page."""

    text: str
    x: float
    y: float
    bold: bool
    size: float

    @property
    def page(self):
        return int(self.y // 297)


def placed(body):
    found = []
    for number, sheet in enumerate(PdfReader(io.BytesIO(to_pdf(f"<h1>Title</h1>{body}", IMAGES))).pages):

        def visit(text, _, place, font, size, number=number):
            if font and text.strip():
                x, y = (value * 25.4 / 72 for value in place[4:])
                found.append(Line(text.strip(), x, 297 * (number + 1) - y, "Bold" in font["/BaseFont"], size))

        sheet.extract_text(visitor_text=visit)
    return found


def only(lines, text):
    (found,) = [line for line in lines if line.text == text]
    return found


def spread(make, count):
    """Elements, each after one bullet more than the one before: they come to stand at many heights of a page."""
    return "".join(f"{'<ul>' + '<li>point</li>' * (i % 45) + '</ul>'}{make(i)}" for i in range(1, count))


def figure(caption, plot="one"):
    return f'<figure data-plot="{plot}"><figcaption>{caption}</figcaption></figure>'


def sample(asked, *answers):
    said = "".join(f'<div><h4>{name}</h4><p class="text">{text}</p></div>' for name, text in answers)
    return f'<article class="sample"><h3>Prompt</h3><p class="text prompt">{asked}</p>{said}</article>'


@pytest.mark.parametrize(
    ("head", "follows"),
    [
        ("<h2>head {0}</h2>", lambda i: figure(f"body {i}")),
        ("<h2>head {0}</h2><h3>between</h3>", lambda i: figure(f"body {i}")),
        ("<h2>head {0}</h2>", lambda i: sample(f"body {i}", ("base", "one\ntwo\nthree"))),
        ("<h2>head {0}</h2>", lambda i: f"<p>body {i}</p>"),
    ],
)
def test_a_heading_is_on_the_page_of_what_follows_it(head, follows):
    lines = placed(spread(lambda i: head.format(i) + follows(i), 24))
    assert lines[-1].page > 2
    for i in range(1, 24):
        assert only(lines, f"head {i}").page == only(lines, f"body {i}").page


@pytest.mark.parametrize("before", [38, 42, 44])
def test_a_heading_is_on_the_page_where_a_table_of_pages_begins(before):
    rows = "".join(f"<tr><td>row {i}</td></tr>" for i in range(70))
    lines = placed(f"<ul>{'<li>point</li>' * before}</ul><h2>head</h2><table><caption>Long</caption>{rows}</table>")
    assert only(lines, "head").page == only(lines, "Long").page == only(lines, "row 1").page


def test_a_heading_may_be_the_last_of_all():
    assert only(placed("<p>text</p><h2>head</h2>"), "head").bold


def test_short_texts_and_samples_and_tables_are_not_broken_over_two_pages():
    words = "\n".join(f"{{0}} line {n}" for n in range(6))
    rows = "".join(f"<tr><td>{{0}} row {n}</td></tr>" for n in range(6))
    for make in (
        lambda i: f'<p class="text">{words.format(i)}</p>',
        lambda i: sample(words.format(i), ("base", words.format(i)), ("full", f"{i} last")),
        lambda i: f"<table>{rows.format(i)}</table>",
    ):
        lines = placed(spread(make, 24))
        for i in range(1, 24):
            assert len({line.page for line in lines if line.text.startswith(f"{i} ")}) == 1, i


def test_a_long_text_begins_where_the_one_before_ends():
    lines = placed(f'<p class="text">{chr(10).join(f"a{n}" for n in range(30))}</p>' * 2)
    assert [line.page for line in lines if line.text == "a0"] == [0, 0]
    assert [line.page for line in lines if line.text == "a29"] == [0, 1]


def test_captions_stand_below_their_plots_and_what_follows_below_the_longer_caption():
    long = " ".join(f"word{n}" for n in range(60))
    lines = placed(figure("Left") + figure(long, "two") + figure("Third", "three") + "<p>after</p>")
    left, third, after = (only(lines, text) for text in ("Left", "Third", "after"))
    second = [line for line in lines if "word" in line.text]
    assert second[0].x - left.x == pytest.approx(93, abs=0.5)  # half of 180 mm less 6, and 6
    assert second[0].y == pytest.approx(left.y, abs=0.1)
    # the plot's height, 87 mm * 320 / 420, the caption's lines of 3.75 mm and 3.5 mm
    assert third.y - left.y == pytest.approx(87 * 320 / 420 + 3.75 * len(second) + 3.5, abs=0.1)
    assert len(second) > 3
    assert third.x == left.x
    assert after.y > third.y


def test_plots_have_their_captions_as_texts_for_screen_readers():
    content = to_pdf(figure("First") + figure("Second", "two"), IMAGES)
    assert re.findall(rb"/Alt \((\w+)\)", content) == [b"First", b"Second"]
    reader = PdfReader(io.BytesIO(content))
    assert reader.root_object["/Lang"] == "en"
    assert reader.metadata.title == "Report"  # without a heading


def test_heads_labels_prompts_and_verdicts_are_bold_and_small_print_is_small():
    table = "<table><caption>Cap</caption><thead><tr><th>a1</th></tr><tr><th>a2</th></tr></thead><tr><td>b</td></tr>"
    answers = ("base", "plain"), ("full", "other")
    lines = placed(
        f'<p class="author">Ann</p><p class="verdict">verdict</p><p class="how">how</p><p>body</p>{table}</table>'
        f"<h4>small</h4>{sample('asked', *answers)}"
    )
    bold = {line.text for line in lines if line.bold}
    assert bold == {"Title", "verdict", "Cap", "a1", "a2", "small", "asked", "base", "full"}
    sizes = {line.text: line.size for line in lines}
    assert [sizes[text] for text in ("Ann", "verdict", "how", "body", "b")] == [7.5, 11.5, 7.5, 9.0, 7.5]
    long = placed(sample("asked", ("base", "word " * 1200), ("full", "other")))
    assert {line.text for line in long if line.bold} == {"Title", "asked", "base", "full"}


def test_what_follows_a_sample_stands_below_its_longest_response():
    for answers in ((("base", "So."), ("full", "a\nb\nc\nd")), (("base", "a\nb\nc\nd"), ("full", "So."))):
        lines = placed(sample("asked", *answers) + "<p>after</p>")
        assert only(lines, "after").y > only(lines, "d").y + 3


def test_each_policys_colour_is_over_its_response():
    content = to_pdf(sample("asked", *((f"{name} <span>+1.0</span>", "So.") for name in ("full", "LoRA"))), IMAGES)
    drawn = PdfReader(io.BytesIO(content)).pages[0].get_contents().get_data()
    assert b"0 0.4471 0.698 RG" in drawn  # #0072b2
    assert b"0.8353 0.3686 0 RG" in drawn  # #d55e00


def test_rows_of_two_heads_are_repeated_and_what_follows_a_table_keeps_the_margin():
    rows = "".join(f"<tr><td>row {i}</td><td>cell {i}</td></tr>" for i in range(120))
    heads = "<thead><tr><th>one</th></tr><tr><th>two</th></tr></thead>"
    lines = placed(f"<table>{heads}{rows}</table><ul>{'<li>point</li>' * 60}</ul>")
    pages = {line.page for line in lines if line.text.startswith("row")}
    assert len(pages) == 3
    for head in ("one", "two"):
        assert [line.page for line in lines if line.text == head] == sorted(pages)
    assert all(only(lines, f"cell {i}") for i in range(120))  # the head is narrower than the rows
    assert max(line.y % 297 for line in lines if "page" not in line.text) < 297 - 15


def test_a_row_is_as_tall_as_its_tallest_cell():
    lines = placed(f"<table><tr><td>{'word ' * 100}</td><td>x</td></tr><tr><td>next</td><td>y</td></tr></table>")
    tall = [line for line in lines if "word" in line.text]
    assert len(tall) > 2
    assert only(lines, "next").y > tall[-1].y + 4


@pytest.mark.parametrize(("columns", "size"), [(7, 7.5), (8, 6.7)])
def test_a_table_of_many_columns_is_set_smaller(columns, size):
    lines = placed(f"<table><tr>{''.join(f'<td>c{i}</td>' for i in range(columns))}</tr></table>")
    assert only(lines, "c0").size == size


def widths(*rows):
    document = pdf._Document("t")
    document.set_font("sans", "B", 7.5)
    block = pdf.Block("table", table=[[pdf.Cell(text) for text in row] for row in rows])
    return document, pdf._widths(document, block, len(rows[0]))


def test_columns_are_as_wide_as_their_texts_where_all_fit():
    document, found = widths(["a", "two words"], ["", "x"])
    padding = 2 * document.c_margin + 1
    assert found == pytest.approx([max(4, document.get_string_width(text) + padding) for text in ("a", "two words")])
    # a long text wants 70 mm at most, a long word 45 mm
    assert widths(["a " * 500, "x"])[1][0] == pytest.approx(70 + padding)
    assert widths(["a" * 500, "x"])[1][0] == pytest.approx(70 + padding)


def test_columns_that_do_not_fit_share_the_page():
    document, found = widths([*["x" * 60] * 4, "word"])  # too wide even if each word of 45 mm or more is broken
    padding = 2 * document.c_margin + 1
    least = [*[45 + padding] * 4, document.get_string_width("word") + padding]
    assert found == pytest.approx([width * document.epw / sum(least) for width in least])
    document, found = widths(["word", *["some words " * 30] * 4])
    assert sum(found) == pytest.approx(document.epw)
    assert found[0] == pytest.approx(document.get_string_width("word") + padding)  # no more is to be had
    assert found[1:] == pytest.approx([found[1]] * 4)


def test_what_is_missing_is_counted_and_said_below_the_author():
    lines = placed('<p class="author">Ann</p><p>body \u4f60\u597d\u4e00\u4e01\u4e03\u4e07 \u0e17</p>')
    text = " ".join(line.text for line in lines)
    assert "7 characters of this report (Thai, Chinese), such as U+0E17, U+4E00, U+4E01, U+4E03, U+4E07, are" in text
    assert text.index("Ann") < text.index("7 characters") < text.index("body")
    said = " ".join(line.text for line in placed("<p>\u0710\u0712 \u05d0\u05d1</p>"))  # Syriac is not in the font
    assert "(Syriac)" in said
    assert "Letters in Hebrew are not joined" in said
