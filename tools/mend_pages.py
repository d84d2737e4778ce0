"""What smalldocs pages still need: formulas set from here, pages under the names that links use, alt texts, and less to load.

Everything works on the text of the built pages; with Quarto none of it is needed.
"""
import base64
import html
import io
import logging
import re
import shutil
import subprocess
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html

CONFIG = get_config()
ROOT = CONFIG.config_path
SHARED = "site_libs"  # the folder of what all pages share


def fetch_katex():
    """The folder of KaTeX, brought by `npm ci` if it is not there; without npm the pages ask a server for it, and we say so."""
    katex = ROOT / "node_modules" / "katex" / "dist"
    if not katex.exists():
        npm = shutil.which("npm")
        if not npm or subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            print("no local KaTeX (is npm installed?): formulas will be loaded from another host when a page is opened")
    return katex


def local(text, up, katex, anchors):
    """What is here is not fetched from elsewhere: KaTeX, and the pages themselves, which nbdev names by their published address.

    nbdev links private names and methods too, to an anchor that no page has: then it is the class, or the page.
    """
    def link(m):
        page, name = m[1], m[2]
        while name and name not in anchors.get(page, ()):
            name = name.rpartition(".")[0]
        return f'href="{up}{page}{"#" if name else ""}{name or ""}"'

    if katex:
        text = re.sub(r"https://cdn\.jsdelivr\.net/npm/katex@[^/]+/dist", f"{up}{SHARED}/katex", text)
    return re.sub(f'href="{re.escape(CONFIG.doc_host + CONFIG.doc_baseurl)}/([^"#]*)(?:#([^"]*))?"', link, text)


def plain(markup):
    """The words of a piece of HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).split())


def describe(text):
    """Every picture without an alt text gets one from the caption behind it, or else from the heading above it."""
    heading, out, at = "", [], 0
    for m in re.finditer(r"<h[1-6]\b[^>]*>(.*?)</h[1-6]>|<img\b[^>]*>|<script\b.*?</script>", text, re.S):
        out.append(text[at:m.start()])
        at, tag = m.end(), m[0]
        if m[1] is not None:
            heading = plain(m[1])
        elif tag.startswith("<img") and not re.search(r'\salt="[^"]', tag):
            caption = re.match(r"\s*(?:</p>)?\s*<figcaption[^>]*>(.*?)</figcaption>", text[m.end():m.end() + 2000], re.S)
            words = plain(caption[1]) if caption else f"Figure: {heading}"
            tag = re.sub(r'\salt=""|\salt(?=[\s>])', "", tag).replace("<img", f'<img alt="{html.escape(words)}"', 1)
        out.append(tag)
    return "".join(out) + text[at:]


def rules(css):
    """The top-level statements of a style sheet: (what stands before the brace, what stands inside, or None for a statement without)."""
    at, depth, start, head = 0, 0, 0, ""
    for m in re.finditer(r'"[^"]*"|\'[^\']*\'|/\*.*?\*/|url\([^)"\']*\)|[{};]', css, re.S):
        if m[0] == "{":
            depth += 1
            if depth == 1:
                head, start = css[at:m.start()], m.end()
        elif m[0] == "}":
            depth -= 1
            if depth == 0:
                yield head, css[start:m.start()]
                at = m.end()
        elif m[0] == ";" and depth == 0:
            yield css[at:m.end()], None
            at = m.end()


def classes(selector):
    """The class names that a selector asks for."""
    return set(re.findall(r"\.(-?[A-Za-z_][\w-]*)", re.sub(r"\[[^]]*\]", "", selector)))


def only_used(css, used):
    """The style sheet without the selectors whose classes occur in no page and no script."""
    out = []
    for head, body in rules(css):
        bare = re.sub(r"/\*.*?\*/", "", head, flags=re.S).strip()
        if body is None:
            out.append(head)
        elif bare.startswith(("@media", "@supports")):
            inside = only_used(body, used)
            out.append(f"{bare}{{{inside}}}" if inside else "")
        elif bare.startswith("@"):
            out.append(f"{bare}{{{body}}}")
        else:
            kept = [s for s in re.split(r",(?![^(]*\))", bare) if classes(s) <= used]
            out.append(f"{','.join(kept)}{{{body}}}" if kept else "")
    return "".join(out)


def small_icons(folder, used):
    """Of two thousand icons the pages use a dozen: the style sheet and the font of those, or all where fontTools is missing."""
    try:
        from fontTools import subset, ttLib
    except ImportError:
        return
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    css = folder / "bootstrap-icons.min.css"
    text = css.read_text()
    own = (folder.parent / "smalldocs.css").read_text()  # names glyphs by number
    glyphs = dict(re.findall(r'\.(bi-[\w-]+)::?before\{content:"\\(f[0-9a-f]+)"\}', text))
    wanted = {name: code for name, code in glyphs.items() if name in used}
    codes = {int(c, 16) for c in [*wanted.values(), *re.findall(r'content: ?"\\(f[0-9a-f]{3})"', own)]}
    font = ttLib.TTFont(folder / "fonts" / "bootstrap-icons.woff")
    cut = subset.Subsetter(subset.Options(notdef_outline=True))
    cut.populate(unicodes=codes)
    cut.subset(font)
    data = io.BytesIO()
    font.flavor = "woff"
    font.save(data)
    general = next(body for head, body in rules(text) if re.search(r'\.bi::?before', head) or "[class^=bi-]" in head)
    css.write_text('@font-face{font-display:block;font-family:"bootstrap-icons";src:url(data:font/woff;base64,'
                   + base64.b64encode(data.getvalue()).decode() + ') format("woff")}'
                   + f'.bi::before,[class^="bi-"]::before,[class*=" bi-"]::before{{{general}}}'
                   + "".join(f'.{n}::before{{content:"\\{c}"}}' for n, c in wanted.items()))
    shutil.rmtree(folder / "fonts")


def lighten(out, pages):
    """Style sheets and icons of what the site uses, and nothing else: a tenth of the bytes of the first page."""
    libs = out / SHARED
    texts = [p.read_text() for p in [*pages, *libs.rglob("*.js"), libs / "smalldocs.css", *out.glob("*.css")] if "katex" not in p.parts]
    used = set().union(*(re.findall(r"[A-Za-z_-][\w-]*", re.sub(r"base64,[\w+/=]+", "", t)) for t in texts))
    for css in (libs / "themes").glob("*.css"):
        css.write_text(only_used(re.sub(r"@import url\(https://fonts\.googleapis\.com[^)]*\);?", "", css.read_text()), used))
    small_icons(libs / "bootstrap-icons", used)


def mend(out):
    """Change the pages that smalldocs wrote into `out`."""
    out = Path(out)
    katex = fetch_katex()
    if katex.exists():
        keep = shutil.ignore_patterns("*.mjs", "*.ttf", "*.woff", "*.md", "katex.js", "katex.css", "katex-swap*")
        shutil.copytree(katex, out / SHARED / "katex", dirs_exist_ok=True, ignore=keep)
    pages = [p for p in out.rglob("*.html") if SHARED not in p.parts]
    lighten(out, pages)
    names = {p.name: _nbpath2html(Path(p.name)).name for p in pages}  # 01_pixels.html -> pixels.html
    names = {k: v for k, v in names.items() if k != v}
    pattern = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, names)) + ")") if names else None
    texts = {p: p.read_text() for p in [*pages, *out.glob("search.json"), *out.glob("sitemap.xml")]}
    anchors = {_nbpath2html(p.relative_to(out)).as_posix(): set(re.findall(r'\sid="([^"]+)"', texts[p])) for p in pages}
    for p, text in texts.items():
        if p.suffix == ".html":
            text = describe(local(text, "../" * (len(p.relative_to(out).parts) - 1), katex.exists(), anchors))
        p.write_text(pattern.sub(lambda m: names[m[1]], text) if pattern else text)
    for p in pages:
        if p.name in names:
            p.rename(p.with_name(names[p.name]))
