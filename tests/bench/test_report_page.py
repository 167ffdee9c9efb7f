"""The page of the report: it stands alone, is well formed, and opens in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from bench.report import formats, page
from bench.report.plots import log_scale
from tests.bench.reports import Elements, Factory


def test_page_stands_alone_and_is_well_formed(factory: Factory) -> None:
    factory.several()
    html = page.render(factory.content())
    elements = Elements(html).found
    names = [name for name, _ in elements]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "plain &lt;PyTorch&gt;" in html
    for name, attributes in elements:
        if name == "svg" and attributes.get("role") == "img":
            assert attributes["aria-label"]
        elif name == "svg" and "viewbox" not in attributes:
            assert attributes.get("aria-hidden") == "true"  # the table it stands in has the numbers
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    targets = [str(attributes["href"])[1:] for _, attributes in elements if "href" in attributes]
    assert set(targets) <= set(ids)


def test_scales_name_round_values() -> None:
    for low, high in ((0.5, 40.0), (0.97, 1.02), (1e-6, 3.0), (1.0, 1.0), (1.0, 900.0)):
        scale = log_scale([low, high], formats.tick_ratio, baseline=1.0)
        assert scale.low < low <= high < scale.high
        assert 1 <= len(scale.ticks) <= 10
        places = [scale.at(tick) for tick in scale.ticks]
        assert places == sorted(places)
        assert 0 < places[0] <= places[-1] < 100


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
addEventListener("load", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const root = document.documentElement, box = (one) => one.getBoundingClientRect();
  const drawn = [...document.querySelectorAll("svg.panel, svg.strip")].filter((one) => box(one).width > 60);
  const text = [...document.querySelectorAll("svg.panel text")].map((one) => box(one));
  parent.document.documentElement.dataset.found = JSON.stringify({
    width: innerWidth, wide: root.scrollWidth, requests: performance.getEntriesByType("resource").length,
    headings: [...document.querySelectorAll("h2, h3")].map((one) => one.innerText), drawn: drawn.length,
    outside: text.filter((one) => one.right > innerWidth + 1 || one.left < -1).length,
    small: Math.min(...text.map((one) => one.height)),
  });
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_in_a_browser(factory: Factory, tmp_path: Path, width: int) -> None:
    factory.several()
    html = page.render(factory.content())
    assert page.POLICY in html.replace("&#x27;", "'")
    probed = html.replace("style-src", "script-src &#x27;unsafe-inline&#x27;; style-src", 1).replace("</body>", PROBE)
    path = tmp_path / "frame.html"  # a window has a least width, a frame is as wide as it is told
    path.write_text(f'<iframe srcdoc="{escape(probed)}" style="width: {width}px; height: 900px; border: 0"></iframe>')
    assert CHROMIUM is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000")
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ":CONSOLE" not in done.stderr, done.stderr
    probe = re.search(r'data-found="([^"]*)"', done.stdout)
    assert probe is not None, done.stdout[:2000]
    found = json.loads(unescape(probe.group(1)))
    assert found["width"] == width
    assert found["wide"] <= width
    assert found["requests"] == 0
    assert found["outside"] == 0
    assert found["small"] >= 9  # pixels: a label can be read
    assert found["drawn"] > 50
    for heading in ("Speedup by size", "Goals", "Scaling", "Share of the physical limit", "Memory", "Whole models"):
        assert found["headings"].count(heading) == 2
