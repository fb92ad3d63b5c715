"""The page of ``fusedres report`` in a real browser, without scripts, at the width of a desk and of a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from typing import Any

import made_results as made
import pytest

from fusedres.cli import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"desk": 1280, "phone": 360}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt install chromium")

#: Shows the page in frames that run no scripts, and writes down what the layout came to.
MEASURE = """<!doctype html><meta charset="utf-8">
{frames}
<script>
addEventListener("load", async () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument;
    await Promise.all([...page.images].map(image => image.decode()));
    const columns = new Set([...page.querySelectorAll("figure")].map(f => Math.round(f.getBoundingClientRect().left)));
    found[frame.id] = {{
      width: page.documentElement.clientWidth,
      scrolls_to: page.documentElement.scrollWidth,
      scales: [...page.images].map(image => image.clientWidth / image.naturalWidth),
      columns: columns.size,
      letters: [...page.querySelectorAll("p, td, dd, li, figcaption, h1, h2, h3, summary")].map(
        element => parseFloat(getComputedStyle(element).fontSize)),
      clipped: [...page.querySelectorAll("table")].filter(table =>
        table.getBoundingClientRect().right > table.parentElement.getBoundingClientRect().right + 1 &&
        getComputedStyle(table.parentElement).overflowX != "auto").length,
      text: page.body.innerText,
    }};
  }}
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
}});
</script>"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    peers = {f"a peer with a rather long name {i}": 0.05 + 0.01 * i for i in range(6)}
    timings = [
        made.timing(mode, batch, made.samples(0.1, nchw=0.09, channels_last=0.08, **peers, fused=0.04))
        for mode, batch in (("eval", 1), ("eval", 8), ("train", 8))
    ]
    results = [made.result(*timings)]
    content = escape(page.page(results, page.draw(results)), quote=True)
    frames = "\n".join(
        f'<iframe id="{name}" sandbox="allow-same-origin" style="border:0;width:{width}px;height:20000px"'
        f' srcdoc="{content}"></iframe>'
        for name, width in WIDTHS.items()
    )
    folder = tmp_path_factory.mktemp("page")
    (folder / "measure.html").write_text(MEASURE.format(frames=frames), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", (folder / "measure.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert text, done.stderr
    return json.loads(unescape(text[1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_its_width_and_tables_scroll_by_themselves(found: dict[str, Any], width: str) -> None:
    assert found[width]["width"] == WIDTHS[width]
    assert found[width]["scrolls_to"] == WIDTHS[width]
    assert found[width]["clipped"] == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_letters_and_figures_are_large_enough_to_read(found: dict[str, Any], width: str) -> None:
    assert min(found[width]["letters"]) >= 13
    assert len(found[width]["scales"]) == 5
    assert all(0.8 < scale < 1.3 for scale in found[width]["scales"])  # of figures with letters of 8 to 9 points


def test_figures_stand_side_by_side_where_there_is_room(found: dict[str, Any]) -> None:
    assert found["desk"]["columns"] > 1
    assert found["phone"]["columns"] == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_readable_as_text_without_a_script(found: dict[str, Any], width: str) -> None:
    for text in ("2.00x", "abacus", "a peer with a rather long name 5", "100.0 (2.50x)", "speed-up over eager"):
        assert text in found[width]["text"]
