"""The git hooks: two people edit one notebook, and the merge is a notebook."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_conflicting_notebooks_stay_notebooks(tmp_path, monkeypatch):
    home, repo = tmp_path / "home", tmp_path / "a project"
    home.mkdir()
    (repo / "nbs").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    book = repo / "nbs" / "a.ipynb"

    def git(*args, ok=True):
        done = subprocess.run(["git", *args], cwd=repo, capture_output=True, text=True)
        assert done.returncode == 0 or not ok, done.stderr
        return done.stdout

    def commit(*sources):
        cells = [new_code_cell(s, id=f"c{i}") for i, s in enumerate(sources)]
        nbformat.write(new_notebook(cells=cells), book)
        git("add", ".")
        git("commit", "-qm", "x")
    git("init", "-q", "-b", "main")
    git("config", "user.email", "a@example.com")
    git("config", "user.name", "a")
    shutil.copy(ROOT / "settings.ini", repo)
    commit("a = 1", "b = 1", "c = 1")
    subprocess.run([sys.executable, ROOT / "tools" / "hooks.py"], cwd=repo, check=True, capture_output=True)
    for name in (".gitattributes", ".gitconfig"):
        assert (repo / name).read_text() == (ROOT / name).read_text(), f"commit what nbdev_install_hooks writes: {name}"
    git("add", ".")
    git("commit", "-qm", "hooks")
    git("checkout", "-qb", "other")
    commit("a = 1", "b = 2", "c = 1")
    git("checkout", "-q", "main")
    commit("a = 1", "b = 3", "c = 1")
    git("merge", "other", ok=False)
    merged = "\n".join("".join(c["source"]) for c in json.loads(book.read_text())["cells"])  # git alone would leave <<<<<<< in the JSON
    assert "b = 2" in merged and "b = 3" in merged and merged.count("a = 1") == 1
