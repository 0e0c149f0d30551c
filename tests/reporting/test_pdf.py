"""The PDF holds what the page holds: read back by another library."""

import base64
import io
import re

import pytest
from matplotlib.figure import Figure
from pypdf import PdfReader

from rlhf.reporting.pdf import to_pdf, write_pdf
from rlhf.reporting.plots.training import to_png

PLOT = base64.b64encode(to_png(Figure(figsize=(7.6, 3.2)))).decode()
PAGE = f"""<!DOCTYPE html><html><head><title>no</title><style>p {{ color: red }}</style></head><body>
<h1>RLHF run demo</h1><p class="summary">A gain of <strong>+0.812</strong>
over &lt;b&gt;base&lt;/b&gt;.</p><h2>Models</h2>
<details><summary>Settings</summary><table><caption>Settings of it</caption><thead>
<tr><th>Field</th><th class="n">Value</th></tr></thead>
<tbody><tr><td rowspan="2">lr</td><td class="n">3e-06</td></tr>
<tr><td class="n">7,000</td></tr></tbody></table></details>
<figure><img src="data:image/png;base64,{PLOT}" alt="A plot"><figcaption>Under the plot.</figcaption></figure>
<ul><li>one point</li></ul><p class="text">first line
second line ä Ω → √</p></body></html>"""


def read(pdf):
    reader = PdfReader(io.BytesIO(pdf))
    return reader, re.sub(r"[ \t]+", " ", "\n".join(page.extract_text() for page in reader.pages))


def test_texts_tables_and_plots_are_there():
    reader, text = read(to_pdf(PAGE))
    for words in ("RLHF run demo", "A gain of +0.812 over <b>base</b>.", "Settings of it", "3e-06", "7,000"):
        assert words in text, words
    assert "• one point" in text
    assert "first line\nsecond line ä Ω → √" in text
    assert "color" not in text
    assert [image.image.size for image in reader.pages[0].images] == [(760, 320)]
    assert reader.metadata.title == "RLHF run demo"
    assert [entry["/Title"] for entry in reader.outline if not isinstance(entry, list)] == ["RLHF run demo"]


def test_every_page_says_what_it_is():
    reader, _ = read(to_pdf(PAGE.replace("<li>one point</li>", "<li>point</li>" * 200)))
    assert len(reader.pages) > 2
    for number, page in enumerate(reader.pages, start=1):
        assert f"RLHF run demo, page {number} of {len(reader.pages)}" in page.extract_text()


@pytest.mark.parametrize("text", ["x" * 3000, "\u4f60\u597d \U0001f600", "a\u202eb\u0007c", "word " * 3000])
def test_odd_texts_do_not_cost_the_file(text):
    page = PAGE.replace("3e-06", text[:400]).replace("first line", text)
    assert len(read(to_pdf(page))[0].pages) >= 1


def test_it_stands_beside_the_page(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(PAGE)
    assert write_pdf(page) == tmp_path / "report.pdf"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.pdf"}
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")


def test_no_word_of_a_narrow_column_is_broken():
    head = "".join(f"<th>{name}</th>" for name in ("Stage", "Role", "Name", "Command"))
    first = f"<td rowspan='2'>stage</td><td>policy</td><td>{'n ' * 60}</td><td>{'c ' * 60}</td>"
    table = f"<table><tr>{head}</tr><tr>{first}</tr><tr><td>reference</td><td>x</td><td>y</td></tr></table>"
    text = read(to_pdf(PAGE.replace("<li>one point</li>", table)))[1]
    for word in ("stage", "policy", "reference", "Stage", "Role"):
        assert word in text, word
