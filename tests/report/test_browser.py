"""The page in headless Chromium: no script error, no overflow, no accessibility violation, in every form it takes.

Needs Chromium and axe-core (`npm install axe-core`, or AXE_CORE=path of axe.min.js); skipped without them.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlora.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=20000",
]  # fmt: skip
PROBE = """
<script>window.errors = []; window.addEventListener("error", e => errors.push(e.message));</script>
<script>%s</script>
<script>window.addEventListener("load", async () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const found = await axe.run(document, {resultTypes: ["violations"]});
  const describe = v => v.id + ": " + v.nodes.slice(0, 3).map(n => n.html.slice(0, 120)).join(" | ");
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify({
    errors, scroll: document.documentElement.scrollWidth, inner: window.innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches, violations: found.violations.map(describe),
  });
  document.body.append(pre);
});</script>
"""
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there: npm install axe-core, or set AXE_CORE"),
]


def probe(page: Path, work: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What the browser says of the page in a frame of this width."""
    inside = page.read_text(encoding="utf-8").replace("</head>", PROBE % AXE.read_text(encoding="utf-8") + "</head>")
    (work / "inside.html").write_text(inside, encoding="utf-8")
    frame = f"<iframe src='inside.html' width='{width}' height='2000' style='border:0'></iframe>"
    read = (
        "new MutationObserver(() => 0); setInterval(() => { const d = document.querySelector('iframe').contentDocument;"
    )
    read += "const p = d && d.getElementById('probe'); if (p) document.title = p.textContent; }, 50);"
    (work / "outside.html").write_text(f"<!doctype html><body>{frame}<script>{read}</script>", encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={work / 'profile'}"]
    command += ["--force-dark-mode"] * dark + [
        "--window-size=1600,2100",
        "--dump-dom",
        (work / "outside.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title, dom[:2000]
    found: dict[str, Any] = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return found


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "bare"])
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_the_page_fits_and_is_accessible(
    make_run: Callable[..., Path], tmp_path: Path, width: int, dark: bool, evaluated: bool
) -> None:
    page = write_report(make_run(evaluated=evaluated))
    found = probe(page, tmp_path, width, dark=dark)
    assert (found["errors"], found["inner"], found["dark"]) == ([], width, dark)
    assert found["scroll"] <= width
    assert found["violations"] == []
