"""The docs site: the sidebar, and every built page, read as text and then looked at in a browser that has no outside network.

The site is built first, without Quarto. MLMSNET_SITE=FOLDER looks at one that is built already.
"""
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from _browser import Watch, launch

ROOT = Path(__file__).resolve().parent.parent
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
SLOW = 120_000  # milliseconds that a busy machine may take for a page
HOME_BYTES, PAGE_BYTES = 1_000_000, 3_000_000
TEN_PAGES = ["index", "tutorials/pixels_and_classes", "tutorials/receptive_field", "explanations/glossary", "compare_losses",
             "labs/loss_curves", "experiments/e_fusion", "reference/api", "losses/region", "networks/mlmsnet"]
FINDS = {"lovasz_softmax": "losses/lovasz", "MiniCity": "data/minicity", "create_model": "networks/mlmsnet",
         "ConfusionMatrix": "training/metrics", "receptive field": "tutorials/receptive_field"}
sys.path.insert(0, str(ROOT / "tools"))

pytestmark = pytest.mark.timeout(900)


def notebooks():
    return [p.relative_to(ROOT / "nbs") for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


# ---------------------------------------------------------------- the sidebar

def test_sidebar_is_what_the_folders_make():
    import docs
    assert (ROOT / "nbs/sidebar.yml").read_text() == docs.sidebar(), "run `make export`"


def test_sidebar_holds_every_notebook_once():
    contents = yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]

    def hrefs(items):
        return [h for i in items for h in (hrefs(i["contents"]) if "section" in i else [i["href"]])]
    assert sorted(hrefs(contents)) == sorted(map(str, notebooks()))
    sections = [i["section"] for i in contents if "section" in i]
    assert sections == [s for s in ("The path", "Explanations", "Labs", "Experiments", "Reference", "Components") if s in sections]
    path = hrefs(contents[1]["contents"])
    assert contents[1]["section"] == "The path" and path == sorted(path) and path[0].startswith("tutorials/01_")


# ---------------------------------------------------------------- the pages as text

class Page(HTMLParser):
    """What a page holds: ids, links, what it loads, pictures without words"""
    def __init__(self, file):
        super().__init__()
        self.ids, self.links, self.loads, self.unsaid = set(), [], [], []
        self.text = file.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids.update(x for x in (a.get("id"), a.get("name") if tag == "a" else None) if x)
        if tag == "a" and "href" in a and a["href"] != "":
            self.links.append(a["href"])
        if tag in ("img", "script", "source", "video", "iframe") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and a.get("href"):
            self.loads.append(a["href"])
        if tag == "img" and not (a.get("alt") or "").strip():
            self.unsaid.append((a.get("src") or "")[:60])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site"""
    if os.environ.get("MLMSNET_SITE"):
        return Path(os.environ["MLMSNET_SITE"]).resolve()
    if not (ROOT / "node_modules/katex").exists() and not shutil.which("npm"):
        pytest.skip("formulas need KaTeX, and npm is not here to bring it")
    build = [sys.executable, "tools/docs.py", "site", "--backend", "smalldocs"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return ROOT / "_docs"


@pytest.fixture(scope="module")
def pages(site):
    """Path in the site -> what the page holds"""
    return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob("*.html")) if "site_libs" not in p.parts}


def test_every_notebook_has_its_page(pages):
    from nbdev.doclinks import _nbpath2html
    assert {_nbpath2html(p).as_posix() for p in notebooks()} == pages.keys()


def test_no_cell_failed(pages):
    assert not [name for name, page in pages.items() if "cell-output-error" in page.text]


def test_no_markdown_is_left(pages):
    """A link in a link, say, which nbdev makes of `[`name`](page)`"""
    words = {name: re.sub(r"<(script|style|pre|code)\b.*?</\1>|<[^>]+>", "", page.text, flags=re.S) for name, page in pages.items()}
    assert not {name: m[0] for name, text in words.items() if (m := re.search(r".{0,40}\]\([^)]{0,60}|.{0,20}^:::.*", text, re.M))}


def test_pictures_have_words(pages):
    assert not {name: page.unsaid for name, page in pages.items() if page.unsaid}


def local(site, name, href):
    """The file of the site that a link on a page means, or None for another host"""
    parts = urlsplit(href)
    if parts.scheme or parts.netloc:
        return None
    file = (site / name).parent / unquote(parts.path) if parts.path else site / name
    return file / "index.html" if file.is_dir() else file


def source_line(href):
    """For a link to this project's own source on its host: what is wrong with it, or None"""
    from nbdev.config import get_config
    host = re.escape(get_config().git_url)
    m = re.match(host + r"/(?:blob|tree|edit)/[^/]+/([^#?]+)(?:#L(\d+))?", href)
    if not m:
        return None
    file = ROOT / unquote(m[1])
    if not file.exists():
        return "no such file"
    return "no such line" if m[2] and int(m[2]) > len(file.read_text().splitlines()) else None


def test_links_and_anchors_hold(site, pages):
    wrong = {}  # target and fault -> the pages it stands on
    for name, page in pages.items():
        for href in page.links + page.loads:
            if href.startswith(("data:", "mailto:", "javascript:")):
                continue
            file = local(site, name, href)
            anchor = unquote(urldefrag(href).fragment)
            if file is None:
                fault = source_line(href)
            elif not file.is_file():
                fault = "no such file"
            elif anchor and file.suffix == ".html":
                target = pages[os.path.relpath(os.path.normpath(file), site).replace(os.sep, "/")]
                fault = None if anchor in target.ids else "no such anchor"
            else:
                fault = None
            if fault:
                target = href if file is None else f"{os.path.relpath(file, site)}#{anchor}"
                wrong.setdefault(f"{target}: {fault}", []).append(name)
    assert not wrong, "\n".join([f"{len(wrong)} links", *(f"{k} (on {v[0]} and {len(v) - 1} more)" for k, v in wrong.items())])


def weight(site, name, page):
    """Bytes that a browser loads for a page: the page, style sheets, scripts, and what the style sheets name (one form of each font)"""
    files = {(site / name).resolve()}
    for href in page.loads:
        if not href.startswith("data:") and (file := local(site, name, href)) and file.is_file():
            files.add(file.resolve())
            if file.suffix == ".css" and "katex" not in file.parts:
                urls = re.findall(r"url\([\"']?([^)\"'?#]+)", file.read_text())
                fonts = [u for u in urls if u.endswith(".woff2")] or urls
                files |= {(file.parent / u).resolve() for u in fonts if not u.startswith("data:") and (file.parent / u).is_file()}
    return sum(f.stat().st_size for f in files)


def test_pages_are_light(site, pages):
    sizes = {name: weight(site, name, page) for name, page in pages.items()}
    assert sizes["index.html"] <= HOME_BYTES, f"{sizes['index.html'] / 1e6:.2f} MB"
    assert not {name: f"{size / 1e6:.2f} MB" for name, size in sizes.items() if size > PAGE_BYTES}


# ---------------------------------------------------------------- the pages in a browser

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def home(site):
    """The address of the site, served from this machine"""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def chromium():
    with launch() as browser:
        yield browser


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(SLOW)
    yield page
    page.close()


PICTURE = "e => [...e.querySelectorAll('img, svg, output')].map(x => x.src || x.innerHTML).join()"
WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 4).map(e => e.tagName + '.' + e.className)"""


def moves(box):
    """Whether an explorer answers to the keyboard, and says in words what it then shows"""
    before = box.evaluate(PICTURE)
    moved = box.locator("input:not([disabled]), select").first
    moved.focus()
    kind = moved.get_attribute("type")
    moved.press("Space" if kind == "checkbox" else "ArrowRight" if kind == "range" else "ArrowDown")
    if kind == "range" and box.evaluate(PICTURE) == before:  # it stood at its end
        moved.press("ArrowLeft")
    return box.evaluate(PICTURE) != before and all(box.evaluate("e => [...e.querySelectorAll('img')].map(i => i.alt)"))


@pytest.fixture(scope="module")
def walk(home, pages, chromium):
    """One walk over all pages, on the screen of a phone: what goes wrong on each"""
    tab = chromium.new_page(viewport={"width": 390, "height": 800})
    tab.set_default_timeout(SLOW)
    watch = Watch(tab, (home,))
    found = {"errors": [], "outside": [], "still": [], "wide": [], "explorers": 0, "formulas": []}
    for name in pages:
        answer = tab.goto(f"{home}/{name}", wait_until="load")
        if not answer.ok:
            found["errors"].append(f"{name}: {answer.status}")
        boxes = tab.locator(".mlms-explorer:has(input, select)")  # a table without controls may stand in the same frame
        for k in range(boxes.count()):
            found["explorers"] += 1
            if not moves(boxes.nth(k)):
                found["still"].append(f"{name}: explorer {k}")
        if tab.locator("span.math").count() and not tab.locator(".katex").count():
            found["formulas"].append(name)
        if wide := tab.evaluate(WIDE):
            found["wide"].append(f"{name}: {wide}")
        found["errors"] += [f"{name}: {e}" for e in watch.errors]
        found["outside"] += [f"{name}: {u}" for u in watch.outside]
        watch.errors.clear()
        watch.outside.clear()
    tab.close()
    return found


def test_no_script_error(walk):
    assert not walk["errors"]


def test_no_outside_request(walk):
    assert not walk["outside"]


def test_explorers_move_by_keyboard(walk):
    assert not walk["still"]
    assert walk["explorers"] >= 10


def test_formulas_are_set(walk):
    assert not walk["formulas"]


def test_no_sideways_scroll_on_a_phone(walk):
    assert not walk["wide"]


def test_search_finds(home, page):
    page.goto(f"{home}/index.html")
    box = page.locator("input[type=search]").first
    for words, target in FINDS.items():
        box.fill("")
        box.press_sequentially(words, delay=5)
        page.locator(f".smalldocs-search-results a[href*='{target}']").first.wait_for()


def test_sidebar_opens_by_keyboard(home, page):
    page.goto(f"{home}/index.html")
    link = page.locator("#quarto-sidebar a[href$='losses/region.html']")
    assert not link.is_visible()
    for section in ("Components", "Losses"):
        page.locator("#quarto-sidebar [data-bs-toggle=collapse]", has_text=re.compile(f"^{section}$")).press("Enter")
    link.wait_for()
    link.press("Enter")
    page.wait_for_url("**/losses/region.html")


def brightness(page):
    r, g, b = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    return (r + g + b) / 3


def test_theme_switch_is_kept(home, page):
    page.goto(f"{home}/index.html")
    assert brightness(page) > 200
    page.locator(".quarto-color-scheme-toggle").first.press("Enter")
    page.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
    assert brightness(page) < 60
    page.goto(f"{home}/losses/region.html")
    assert brightness(page) < 60


def faults(page, rules=None):
    """Serious and critical findings of axe-core on the page as it stands"""
    options = {"resultTypes": ["violations"], **({"runOnly": {"type": "rule", "values": rules}} if rules else {})}
    found = page.evaluate("o => axe.run(document, o)", options)["violations"]
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {n['html'][:120]} {n['failureSummary'][-160:]}" for v in grave for n in v["nodes"][:3]]


def test_nobody_is_locked_out(home, pages, chromium):
    if not AXE.exists():
        if not shutil.which("npm"):
            pytest.skip("axe-core is not here, nor npm to bring it")
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=ROOT, check=True, capture_output=True)
    wrong, tab = [], chromium.new_page(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")  # no colour half way
    tab.set_default_timeout(SLOW)
    for name in TEN_PAGES:
        assert tab.goto(f"{home}/{name}.html", wait_until="load").ok, name
        tab.add_script_tag(path=str(AXE))
        wrong += [f"{name}: {f}" for f in faults(tab)]
        if name == TEN_PAGES[0]:  # what search finds lies over the page, in its own colours
            tab.locator("input[type=search]").first.fill("dice")
            tab.locator(".smalldocs-search-results .search-result-text").first.wait_for()
            wrong += [f"{name}, search: {f}" for f in faults(tab, ["color-contrast"])]
            tab.locator("input[type=search]").first.fill("")
        tab.evaluate("smalldocsToggleScheme()")
        tab.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
        wrong += [f"{name}, dark: {f}" for f in faults(tab, ["color-contrast", "link-in-text-block"])]
        tab.evaluate("localStorage.clear()")
    tab.close()
    assert not wrong, "\n".join([f"{len(wrong)} faults", *wrong[:40]])
