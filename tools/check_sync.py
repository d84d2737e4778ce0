"""Fail when mlmsnet/ is not what the notebooks export, a notebook is not clean, or README.md is not what nbs/index.ipynb makes.

Works on a copy, so uncommitted changes are neither needed nor touched.
"""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WRITTEN_BY_HAND = {"__init__.py", "__main__.py"}


def run(*command, cwd):
    done = subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(cwd)})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def copy_project(to):
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "nbdev.yml", "sidebar.yml")
    for folder in ("nbs", "mlmsnet", "tools"):
        shutil.copytree(ROOT / folder, to / folder, ignore=skip)
    for name in ("settings.ini", "setup.py", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, to / name)
    if (ROOT / "index_files").exists():
        shutil.copytree(ROOT / "index_files", to / "index_files")


def differing(a, b):
    """Files of `b` that differ from `a`, are new, or are gone."""
    def files(top):
        return {p.relative_to(top) for p in top.rglob("*") if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)
                and p.name not in ("nbdev.yml", "sidebar.yml")}
    fa, fb = files(a), files(b)
    return sorted({str(f) for f in fa ^ fb} | {str(f) for f in fa & fb if not filecmp.cmp(a / f, b / f, shallow=False)})


def main():
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d) / "project"
        copy.mkdir()
        copy_project(copy)
        for module in (copy / "mlmsnet").rglob("*.py"):  # so that a module whose notebook is gone shows up too
            if module.name not in WRITTEN_BY_HAND:
                module.unlink()
        run("nbdev_export", cwd=copy)
        run("nbdev_clean", cwd=copy)
        run("python", "tools/docs.py", "readme", cwd=copy)
        wrong = [f"{folder}/{f}" for folder in ("mlmsnet", "nbs") for f in differing(ROOT / folder, copy / folder)]
        wrong += [] if filecmp.cmp(ROOT / "README.md", copy / "README.md", shallow=False) else ["README.md"]
    if wrong:
        sys.exit("notebooks, library and README are out of step (run `make export`):\n  " + "\n  ".join(wrong))
    print("notebooks, library and README are in step, and the notebooks are clean")


if __name__ == "__main__":
    main()
