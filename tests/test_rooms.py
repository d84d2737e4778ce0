"""The order of the rooms: who may import whom, and what the library does not pull in."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlmsnet"
# A room imports from its own and from those before it. The label tables come before viz, which draws in their colours;
# evaluation.inference comes before training, whose config holds its settings.
ORDER = ["core", "data.labels", "viz", "data", "networks", "losses", "evaluation.inference", "training", "evaluation", "comparing",
         "labs", "cli", "__main__"]
LIGHT = ["networks.mlmsnet", "losses.contract", "training.loop", "evaluation.evaluate"]
HEAVY = {"matplotlib", "IPython", "jupyter_client", "ipykernel", "ipywidgets", "nbdev", "execnb", "nbformat", "yaml", "jsonargparse",
         "tensorboard"}


def rank(module):
    """The place in ORDER of the longest entry that `module` belongs to; -1 for the package itself"""
    fits = [r for r in ORDER if module == r or module.startswith(f"{r}.")]
    return ORDER.index(max(fits, key=len)) if fits else -1 if module == "" else pytest.fail(f"mlmsnet.{module} has no place in ORDER")


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py"}


def absolute(module, node):
    """The full name that `from X import …` speaks of"""
    if not node.level:
        return node.module
    here = ["mlmsnet", *module.split(".")][:-node.level]
    return ".".join([*here, *([node.module] if node.module else [])])


def imports(module):
    """The modules of mlmsnet that `module` imports, inside functions too"""
    found = set()
    for node in ast.walk(MODULES[module]):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            names = [f"{base}.{a.name}" if f"{base}.{a.name}".removeprefix("mlmsnet.") in MODULES else base for a in node.names]
        found |= {n.removeprefix("mlmsnet").removeprefix(".") for n in names if n.split(".")[0] == "mlmsnet"}
    return found - {module}


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
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True).stdout.split()
    assert "torch" in loaded
    assert not HEAVY.intersection(loaded)
