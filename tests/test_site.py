"""The docs site, built without Quarto and looked at in a browser that has no outside network to lean on."""
import fcntl
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from _browser import Watch, launch

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_docs"
EXPLORERS = ["labs/explorer.html", "labs/loss_curves.html", "labs/loss_maps.html", "labs/loss_race.html",
             "labs/loss_results.html", "compare_losses.html"]

pytestmark = pytest.mark.timeout(900)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def chromium():
    with launch() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(chromium, tmp_path_factory):
    if not (ROOT / "node_modules/katex").exists() and not shutil.which("npm"):
        pytest.skip("formulas need KaTeX, and npm is not here to bring it")
    own = tmp_path_factory.getbasetemp()
    ours = own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own  # of all processes of this test run
    with open(ours / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others wait and look
        if not (ours / "site.built").exists():
            build = [sys.executable, "tools/docs.py", "site", "--backend", "smalldocs"]
            done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            (ours / "site.built").touch()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    yield page
    page.close()


def test_pages_load_without_errors_and_without_outside_requests(site, page):
    watch = Watch(page, (site,))
    pages = sorted(p for p in SITE.rglob("*.html") if "site_libs" not in p.parts)
    assert len(pages) > 30
    for file in pages:
        assert page.goto(f"{site}/{file.relative_to(SITE)}", wait_until="load").ok
        assert not page.locator(".cell-output-error").count(), file
    watch.check()


def test_formulas_are_set(site, page):
    page.goto(f"{site}/losses/contract.html")
    page.locator(".katex").first.wait_for(timeout=10_000)


def picture_of(box):
    return box.evaluate("e => [...e.querySelectorAll('img, svg')].map(x => x.src || x.innerHTML).join()")


@pytest.mark.parametrize("name", EXPLORERS)
def test_explorers_move_by_keyboard(site, page, name):
    watch = Watch(page, (site,))
    page.goto(f"{site}/{name}", wait_until="load")
    boxes = page.locator(".mlms-explorer:has(input, select)")  # a table without controls may stand in the same frame
    assert boxes.count(), f"{name} shows no explorer"
    for k in range(boxes.count()):
        box = boxes.nth(k)
        before = picture_of(box)
        moved = box.locator("input:not([disabled]), select").first
        moved.focus()
        kind = moved.get_attribute("type")
        moved.press("Space" if kind == "checkbox" else "ArrowRight" if kind == "range" else "ArrowDown")
        if kind == "range" and picture_of(box) == before:  # it stood at its end
            moved.press("ArrowLeft")
        assert picture_of(box) != before, f"{name}: explorer {k} does not move"
        assert all(alt for alt in box.evaluate("e => [...e.querySelectorAll('img')].map(i => i.alt)"))
    watch.check()


@pytest.mark.parametrize("name", EXPLORERS)
def test_explorers_fit_a_phone(site, chromium, name):
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    page.goto(f"{site}/{name}", wait_until="load")
    for box in page.locator(".mlms-explorer").all():
        assert box.evaluate("e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().right <= innerWidth + 1")
    page.close()


def test_search_finds_a_loss(site, page):
    page.goto(f"{site}/index.html")
    box = page.locator("input[type=search]").first
    box.click()
    box.press_sequentially("lovasz_softmax", delay=15)
    page.locator("a[href*='lovasz']").first.wait_for(timeout=10_000)
