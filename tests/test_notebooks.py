"""Every notebook runs top to bottom at smoke scale, in its own kernel; and what is committed is fit to be read."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
sys.path.insert(0, str(ROOT / "tools"))


def name(path):
    return str(path.relative_to(ROOT / "nbs"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_runs(path, monkeypatch):
    from run_notebooks import execute
    monkeypatch.setenv("MLMSNET_SCALE", "smoke")
    monkeypatch.chdir(ROOT)
    execute(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_imports_stand_alone(path):
    """The docs step executes every cell that holds an import; other code in such a cell would run too, without what it needs."""
    from split_imports import mixed
    cells = json.loads(path.read_text())["cells"]
    wrong = ["".join(c["source"])[:60] for c in cells if c["cell_type"] == "code" and mixed("".join(c["source"]))]
    assert not wrong, "run tools/split_imports.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_committed_outputs(path):
    """No error, no saved widget state, no picture that is heavy, and no code cell was left unrun if its neighbours were run."""
    nb = json.loads(path.read_text())
    assert "widgets" not in nb["metadata"], "saved widget state"
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    pictures = [len(o["data"][kind]) * 3 // 4 for o in outputs for kind in ("image/png", "image/jpeg") if kind in o.get("data", {})]
    assert all(size < 400_000 for size in pictures), f"a picture of {max(pictures) // 1000} kB"
    assert path.stat().st_size < 3_000_000, "a page above 3 MB"
    shows = any(word in "".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code" for word in ("plt.", "show_grid", "imshow"))
    assert not shows or pictures or any("text/html" in o.get("data", {}) for o in outputs), "draws, but holds no picture: run it and commit"
