"""The order of the rooms: who may import whom, and what the library does not pull in."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from architecture import imports, modules, rank  # noqa: E402

MODULES = modules()
LIGHT = ["networks.mlmsnet", "losses.contract", "training.loop", "evaluation.evaluate"]
HEAVY = {"matplotlib", "IPython", "jupyter_client", "ipykernel", "ipywidgets", "nbdev", "execnb", "nbformat", "yaml", "jsonargparse",
         "tensorboard"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_rooms_above(module):
    upward = [n for n in imports(module) if rank(n) > rank(module)]
    assert not upward, f"mlmsnet.{module} imports {upward}, which come after it"


@pytest.mark.parametrize("module", MODULES)
def test_no_star_imports(module):
    assert not [n for n in ast.walk(MODULES[module]) if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)]


def test_no_circles():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle of imports: {' -> '.join([*path[path.index(module):], module])}"
        if module not in done:
            path.append(module)
            for n in sorted(imports(module) & MODULES.keys()):
                visit(n)
            done.add(path.pop())
    for module in MODULES:
        visit(module)


def test_library_pulls_in_neither_notebooks_nor_matplotlib():
    code = f"import sys, {', '.join(f'mlmsnet.{m}' for m in LIGHT)}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    assert "torch" in loaded
    assert not HEAVY.intersection(loaded)
