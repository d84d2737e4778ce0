"""The pages that explain: the citation file is sound, and links into the glossary and the decisions hit an entry."""
import configparser
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PAGES = sorted((NBS / "explanations").glob("*.ipynb"))


def markdown(path):
    return "\n\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(path):
    return re.findall(r'<a id="([\w-]+)"></a>', markdown(path))


@pytest.fixture(scope="module")
def citation():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_citation_has_what_the_format_requires(citation):
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    assert citation["type"] == "software" and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "The mlmsnet authors"}]
    for entry in citation["references"]:
        assert entry["title"] and entry["type"] in ("software", "article", "conference-paper")
        assert entry["authors"] and all("name" in a or "family-names" in a for a in entry["authors"])


def test_citation_has_the_version_of_the_package(citation):
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert str(citation["version"]) == settings["DEFAULT"]["version"]
    owner = settings["DEFAULT"]["user"]
    assert citation["repository-code"] == f"https://github.com/{owner}/{settings['DEFAULT']['repo']}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_linked_notebooks_exist(page):
    missing = [t for t in re.findall(r"\]\(([\w./-]+\.ipynb)[#)]", without_code(markdown(page))) if not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem in ("glossary", "decisions")], ids=lambda p: p.name)
def test_anchors_are_hit(page):
    """Every link `…/glossary.ipynb#word` of any notebook, whatever folder it stands in."""
    own = anchors(page)
    assert len(own) == len(set(own)) > 15
    wrong = []
    for nb in sorted(NBS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in nb.parts:
            continue
        for target, word in re.findall(r"\]\(([\w./-]*\.ipynb|)#([\w-]+)\)", without_code(markdown(nb))):
            if (nb.parent / target if target else nb).resolve() == page and word not in own:
                wrong.append(f"{nb.relative_to(NBS)}: #{word}")
    assert not wrong


def test_network_pages_say_what_was_not_checked():
    """Each page on published networks names its sources and what could not be looked up."""
    pages = [p for p in PAGES if p.stem.startswith("networks_")]
    assert len(pages) >= 4
    for page in pages:
        text = markdown(page)
        assert "**Not checked" in text and "**References.**" in text and "What we built differently" in text, page.name
