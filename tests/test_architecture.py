"""The architecture page shows the imports that are there now, and every name on it exists."""
import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import architecture  # noqa: E402

MEND = "python tools/run_notebooks.py nbs/explanations/architecture.ipynb"


def shown(kind):
    cells = json.loads((ROOT / "nbs" / "explanations" / "architecture.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(o["data"][kind]).strip() for c in cells for o in c.get("outputs", []) if kind in o.get("data", {})]


def test_order_of_rooms():
    """No room imports from one that comes after it; each has a place and a purpose."""
    for room, needs in architecture.room_imports().items():
        after = [n for n in needs if architecture.ORDER.index(n) > architecture.ORDER.index(room)]
        assert not after, f"{room} imports from {after}, which come after it"
    assert set(architecture.ORDER) - {"__main__"} == set(architecture.PURPOSE)
    assert all(architecture.rooms().values()), "a room without a module"
    found = [m for m in architecture.modules() if m and "__" not in m]
    leaves = {m for m in found if not any(n.startswith(f"{m}.") for n in found)}
    assert leaves == {m for own in architecture.rooms().values() for m in own}


def test_page_shows_what_the_script_finds():
    assert architecture.table() in shown("text/markdown"), f"the imports changed: {MEND}"


@pytest.mark.parametrize("draw", [architecture.draw_rooms, architecture.draw_flow])
def test_drawings_are_of_today(draw):
    assert draw() in shown("image/svg+xml"), f"the drawing is out of date: {MEND}"


def test_drawn_layers():
    """Arrows lead down, and those that were left out follow from the others."""
    edges = architecture.room_imports()
    level, direct = architecture.layers(edges), architecture.direct(edges)
    assert all(level[a] > level[b] for a, below in edges.items() for b in below)
    for room, needs in edges.items():
        seen, left = set(), list(direct[room])
        while left:
            r = left.pop()
            seen.add(r)
            left += direct[r]
        assert set(needs) <= seen


@pytest.mark.parametrize("name, module, gives", architecture.TRAINING + architecture.EVALUATION)
def test_flow_names_exist(name, module, gives):
    assert hasattr(importlib.import_module(f"mlmsnet.{module}"), name) and gives
    assert name in importlib.import_module(f"mlmsnet.{module}").__all__
