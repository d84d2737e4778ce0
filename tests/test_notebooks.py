"""Every notebook runs top to bottom at smoke scale, in its own kernel; and what is committed is fit to be read."""
import ast
import json
import sys
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
sys.path.insert(0, str(ROOT / "tools"))


def name(path):
    return str(path.relative_to(ROOT / "nbs"))


@contextmanager
def in_turn():
    """One process of the test run at a time."""
    fcntl = pytest.importorskip("fcntl")
    lock = ROOT / "runs/notebooks/.in_turn"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go of it when the process ends, however it ends
        yield


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_runs(path, monkeypatch):
    from run_notebooks import execute, load_record
    monkeypatch.setenv("MLMSNET_SCALE", "smoke")
    monkeypatch.chdir(ROOT)
    share_a_run = name(path) in ("train.ipynb", "evaluate.ipynb", "predict.ipynb")
    with in_turn() if share_a_run else nullcontext():
        nb, _, reads = execute(path)
    known = load_record(path).get("reads", {})
    assert not set(reads) - set(known), f"reads records that its run did not note: python tools/run_notebooks.py {path.relative_to(ROOT)}"
    if path.parent.name == "reference":  # these pages are made from the code
        was, now = (_text(cells) for cells in (json.loads(path.read_text())["cells"], nb.cells))
        assert now == was, f"the code says something else by now: python tools/run_notebooks.py {path.relative_to(ROOT)}"


def _text(cells):
    """All Markdown that the cells show, joined."""
    found = [o["data"]["text/markdown"] for c in cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    return "\n".join("".join(text) for text in found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_imports_stand_alone(path):
    """The docs step executes every cell that holds an import; other code in such a cell would run too, without what it needs."""
    from split_imports import mixed
    cells = json.loads(path.read_text())["cells"]
    wrong = ["".join(c["source"])[:60] for c in cells if c["cell_type"] == "code" and mixed("".join(c["source"]))]
    assert not wrong, "run tools/split_imports.py"


def _draws(source):
    """Does a cell call matplotlib, as far as one can tell from its names?"""
    try:
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    except SyntaxError:  # a magic of IPython
        return False
    return any(c.startswith("plt.") or c == "show_grid" or c.endswith(".imshow") for c in calls)


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
    shows = any(_draws("".join(c["source"])) for c in nb["cells"] if c["cell_type"] == "code")
    assert not shows or pictures or any("text/html" in o.get("data", {}) for o in outputs), "draws, but holds no picture: run it and commit"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_are_of_this_code(path):
    """The hashes that the last whole run wrote are those of the code and the outputs that lie here now."""
    from run_notebooks import stale
    assert not stale(path), f"{stale(path)}: python tools/run_notebooks.py {path.relative_to(ROOT)}"


def test_records_have_notebooks():
    records = {f: json.loads(f.read_text()) for f in (ROOT / "nbs").rglob(".outputs.json")}
    assert not [f.parent / n for f, r in records.items() for n in r if not (f.parent / n).exists()]


def test_edits_are_noticed(tmp_path):
    """An edited cell, a retouched output and a hand-made notebook are told from a run; prose may change."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
    from run_notebooks import load_record, run, stale
    path = tmp_path / "a.ipynb"

    def write(*codes, prose="words"):
        cells = [new_markdown_cell(prose, id="m"), *[new_code_cell(c, id=f"c{i}") for i, c in enumerate(codes)]]
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}}), path)

    def edit(change):
        nb = nbformat.read(path, 4)
        change(nb.cells)
        nbformat.write(nb, path)
    write("1 + 1")
    assert stale(path) is None  # nothing shown, nothing to prove
    run(path)
    assert stale(path) is None and load_record(path)
    edit(lambda cells: cells[0].update(source="other words"))
    assert stale(path) is None
    edit(lambda cells: cells[1].outputs[0].data.update({"text/plain": "3"}))
    assert "output was changed" in stale(path)
    run(path)
    edit(lambda cells: cells[1].update(source="1 + 2"))
    assert "edited after" in stale(path)
    run(path)
    edit(lambda cells: cells.append(new_code_cell("#| gpu\n7", id="g", outputs=cells[1].outputs)))
    run(path)
    assert stale(path) is None and len(nbformat.read(path, 4).cells[2].outputs) == 1  # from a GPU, say: kept
    edit(lambda cells: cells[2].update(source="#| gpu\n8"))
    run(path)
    assert stale(path) is None and not nbformat.read(path, 4).cells[2].outputs  # not of this code any more: dropped
    (tmp_path / ".outputs.json").unlink()
    assert "no run" in stale(path)


def test_records_from_several_runs_at_once(tmp_path):
    """Two processes that record in one folder at the same time both leave their lines."""
    import subprocess

    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook, new_output
    for i in range(12):
        cell = new_code_cell(str(i), id="c", outputs=[new_output("execute_result", {"text/plain": str(i)})])
        nbformat.write(new_notebook(cells=[cell]), tmp_path / f"{i}.ipynb")
    code = ("import sys; sys.path.insert(0, 'tools'); from pathlib import Path; from run_notebooks import write_record\n"
            "for p in sys.argv[1:]: write_record(Path(p))")
    shares = [[str(tmp_path / f"{i}.ipynb") for i in range(k, 12, 2)] for k in (0, 1)]
    jobs = [subprocess.Popen([sys.executable, "-c", code, *share], cwd=ROOT) for share in shares]
    assert [j.wait() for j in jobs] == [0, 0]
    assert len(json.loads((tmp_path / ".outputs.json").read_text())) == 12


def test_a_newer_record_is_noticed(tmp_path, monkeypatch):
    """The record that a cell opened, through whatever function and relative path, is in the notebook's entry; others are not."""
    import nbformat
    import run_notebooks
    from nbformat.v4 import new_code_cell, new_notebook
    results, path = tmp_path / "results", tmp_path / "nbs/a.ipynb"
    for name, text in {"e_one/seed0/run.json": "1", "e_two/run.json": "2", "benchmarks/x.json": "3", "benchmarks/y.json": "4"}.items():
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(text)
    path.parent.mkdir()
    cells = [new_code_cell("from pathlib import Path", id="a"),
             new_code_cell("Path('../results/e_one/seed0/run.json').read_text() + open('../results/benchmarks/x.json').read()", id="b")]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}}), path)
    monkeypatch.setattr(run_notebooks, "RESULTS", results)
    run_notebooks.run(path)
    assert sorted(run_notebooks.load_record(path)["reads"]) == ["benchmarks/x.json", "e_one"]
    assert [len(c.outputs) for c in nbformat.read(path, 4).cells] == [0, 1]  # what watches is not in the notebook
    (results / "e_two/run.json").write_text("20")
    run_notebooks._record_hash.cache_clear()
    assert run_notebooks.stale(path) is None
    (results / "e_one/seed0/more.json").write_text("5")
    run_notebooks._record_hash.cache_clear()
    assert "results/e_one has changed" in run_notebooks.stale(path)


def test_links_open_in_jupyterlab():
    """Pages link to notebooks, which both JupyterLab and the site can open; a link to a built page works in one of them only."""
    import re
    wrong = []
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                links = re.findall(r"\]\(([^)\s]+)\)", "".join(cell["source"]))
                wrong += [(name(path), link) for link in links if "://" not in link and link.split("#")[0].endswith(".html")]
    assert not wrong


def test_solutions_are_closed_in_jupyterlab():
    """A folded cell of the page is folded in JupyterLab, too, the output of a solution with it; its first line says what it is."""
    seen = 0
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            options = list(takewhile(lambda line: line.startswith("#|"), source.splitlines()))
            if cell["cell_type"] == "code" and "#| code-fold: true" in options:
                solution = "Solution" in source.splitlines()[0]
                hidden = cell["metadata"].get("jupyter", {})
                first = "#| code-summary:" if any("code-summary" in o for o in options) else "#|"
                assert source.startswith(first) and hidden.get("source_hidden"), (name(path), source[:60])
                assert hidden.get("outputs_hidden") or not solution, (name(path), source[:60])
                seen += solution
    assert seen > 40
