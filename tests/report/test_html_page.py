"""report.html: one file that asks for nothing, and what a browser makes of it."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from iirsnn.report import html_page, run_report
from iirsnn.report.tables import Column

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

#: Added to a copy of the page: what the browser shows, as JSON.
LOOK = """<script>
addEventListener("load", () => {
  const box = element => element.getBoundingClientRect();
  const seen = {
    tables: [...document.querySelectorAll("table")].map(table =>
      [...table.rows].map(row => [...row.cells].map(cell => cell.innerText.replace(/\\s+/g, " ")))),
    headings: [...document.querySelectorAll("h1, h2")].map(heading => heading.innerText),
    pictures: [...document.images].map(image =>
      ({alt: image.alt, natural: image.naturalWidth, shown: box(image).width})),
    asked: performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
    width: innerWidth,
    wider: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  };
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
});
</script>"""


def test_a_page_is_one_file(tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG pretended")
    page = html_page.render(
        title="a < b",
        tables=[("T & U", [Column("x\ny"), Column("z", style="bold")], [["1", "<2>"]])],
        notes=["said & done"],
        pictures={'"quoted"': picture},
    )
    assert "<title>a &lt; b</title>" in page
    assert "<h2>T &amp; U</h2>" in page
    assert '<td>1</td><td class="strong">&lt;2&gt;</td>' in page
    assert "<p>said &amp; done</p>" in page
    assert 'alt="&quot;quoted&quot;"' in page
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(data) == picture.read_bytes()


def test_the_page_of_a_run_asks_for_nothing_and_holds_every_table_and_plot(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 6
    for caption in run_report.PICTURES.values():
        assert f'alt="{caption}"' in unescape(page)
    report = json.loads((finished / "report.json").read_text())
    for title, columns, rows in run_report.tables(report):
        assert f"<h2>{title}</h2>" in unescape(page)
        for row in ([column.header for column in columns], *rows):
            assert all(f">{cell}</t" in unescape(page) for cell in row)


@pytest.mark.skipif(
    not BROWSER,
    reason="no headless browser here: install chromium, then pytest tests/report/test_html_page.py",
)
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it(finished, tmp_path, width):
    page = (finished / "report.html").read_text(encoding="utf-8")
    watched = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    file = tmp_path / "watched.html"
    file.write_text(watched.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [BROWSER, *options, f"--window-size={width},900", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = json.loads(unescape(done.stdout.split("SEEN")[1]))
    report = json.loads((finished / "report.json").read_text())
    expected = run_report.tables(report)
    assert seen["headings"][1:] == [title for title, _, _ in expected]
    for shown, (_, columns, rows) in zip(seen["tables"], expected, strict=True):
        assert shown == [[" ".join(column.header.split()) for column in columns], *rows]
    stages, times, energies, layers = seen["tables"]
    assert stages[-1][1] == f"{report['stages'][-1]['test_accuracy']:.2%}"
    assert stages[0][6] == "energy uJ"
    assert times[0][2] == "engine batch 1"
    assert float(times[-1][2]) > 0
    assert energies[0][3] == "and bytes in SRAM"
    assert float(energies[-1][3]) > float(energies[-1][1]) > 0
    assert layers[0] == ["layer", "T=2", "T=1"]
    assert [picture["alt"] for picture in seen["pictures"]] == list(run_report.PICTURES.values())
    for picture in seen["pictures"]:
        assert picture["natural"] > 500, picture
        assert 200 < picture["shown"] <= seen["width"], picture
    assert seen["asked"] == []
    assert not seen["wider"]
