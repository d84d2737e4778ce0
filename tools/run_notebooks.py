"""Run notebooks top to bottom through a real kernel, store their outputs, clean them, and record what was run.

    python tools/run_notebooks.py [NOTEBOOK ...]            default: all of nbs/
    python tools/run_notebooks.py --check [NOTEBOOK ...]    runs nothing: are the stored outputs those of the code beside them?
    python tools/run_notebooks.py --stale [NOTEBOOK ...]    runs those of which they are not

Cells flagged in settings.ini (`tst_flags`) are skipped and keep the outputs they had, for example from a GPU.
No widget state is saved (its ids are random), so two runs give the same file.

The record is `.outputs.json` in the notebook's folder: one line per notebook, with a hash of its code cells, one of their outputs, and
one of each record below results/ that a cell opened. Only a run that went through to the end writes it, so an edited cell, a retouched
output or a newer record shows up. What a notebook imports from elsewhere is not in its hash: that it still runs is seen by the tests,
which run every notebook.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: one run at a time, please
    fcntl = None

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbformat.v4 import new_code_cell

from mlmsnet.core import atomic_write

SKIP = "skip-execution"
CONFIG = get_config()
FLAGGED = re.compile(r"^#\s*\|\s*(" + "|".join(map(re.escape, CONFIG.tst_flags.split())) + r"|eval:\s*false)\b", re.M)
RECORD = ".outputs.json"
RESULTS = Path(__file__).resolve().parent.parent / "results"
WATCH = """import os as _os, sys as _sys
_opened = set()
def _note(event, args):
    if event == "open" and isinstance(args[0], str): _opened.add(_os.path.abspath(args[0]))
_sys.addaudithook(_note)"""  # runs in the kernel before the first cell; a file is named by where it was at that moment
TELL = "print(*(p for p in sorted(_opened) if p.startswith({!r})), sep=chr(10))"  # and after the last one
LIVE_VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path, timeout=600):
    """Run one notebook; returns it with fresh outputs, the number of cells that were skipped, and the names of the records it opened."""
    nb = nbformat.read(path, as_version=4)
    skipped = flagged(nb)
    then = load_record(path).get("skipped", {})
    old = {c.id: c.outputs if then.get(c.id, _hash(c.source)) == _hash(c.source) else [] for c in skipped}  # [] if it was edited since
    for c in skipped:
        c.metadata.setdefault("tags", []).append(SKIP)
    resources = {"metadata": {"path": str(Path(path).parent)}}
    watch, tell = new_code_cell(WATCH), new_code_cell(TELL.format(f"{RESULTS}{os.sep}"))
    nb.cells = [watch, *nb.cells, tell]
    NotebookClient(nb, timeout=timeout, kernel_name="python3", resources=resources, skip_cells_with_tag=SKIP).execute()
    nb.cells = nb.cells[1:-1]
    reads = sorted({record_name(line) for out in tell.outputs for line in out.text.split("\n") if line})
    for c in skipped:
        c.metadata.tags.remove(SKIP)
        if not c.metadata.tags:
            del c.metadata["tags"]
        c.outputs = old[c.id]
    nb.metadata.pop("widgets", None)
    for c in nb.cells:
        for out in c.get("outputs", []):
            data = out.get("data", {})
            if "text/html" in data or "image/png" in data:
                data.pop(LIVE_VIEW, None)
        c.outputs = _merge_streams(c.outputs) if c.cell_type == "code" else None
        if c.cell_type != "code":
            del c["outputs"]
    return nb, len(skipped), reads


def record_name(file):
    """The record that a file below results/ belongs to: a folder of runs, one file, or one benchmark."""
    parts = Path(file).relative_to(RESULTS).parts
    return "/".join(parts[:2] if parts[0] == "benchmarks" else parts[:1])


@functools.lru_cache(None)
def _record_hash(name):
    top = RESULTS / name
    files = sorted(f for f in (top.rglob("*") if top.is_dir() else [top]) if f.is_file() and not f.name.startswith("."))
    return _hash([[f.relative_to(RESULTS).as_posix(), hashlib.sha256(f.read_bytes()).hexdigest()] for f in files])


def _merge_streams(outputs):
    """Neighbouring pieces of one stream become one, with what a carriage return overwrote removed."""
    merged = []
    for o in outputs:
        if o.output_type == "stream" and merged and merged[-1].get("name") == o.name:
            merged[-1].text += o.text
        else:
            merged.append(o)
    for o in merged:
        if o.output_type == "stream":
            o.text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in o.text.split("\n"))
    return merged


def flagged(nb):
    return [c for c in nb.cells if c.cell_type == "code" and FLAGGED.search(c.source)]


def _hash(what):
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(path):
    """What the record says of a notebook as it lies there, or None if it holds no output."""
    nb = nbformat.read(path, as_version=4)
    cells = [c for c in nb.cells if c.cell_type == "code"]
    if not any(c.outputs for c in cells):
        return None
    outputs = [[{k: v for k, v in o.items() if k != "execution_count"} for o in c.outputs] for c in cells]
    found = {"code": _hash([c.source for c in cells]), "outputs": _hash(outputs)}
    kept = {c.id: _hash(c.source) for c in flagged(nb) if c.outputs}
    return {**found, "skipped": kept} if kept else found


def load_record(path):
    """The entry of one notebook in the record of its folder; {} if there is none."""
    file = Path(path).parent / RECORD
    return json.loads(file.read_text()).get(Path(path).name, {}) if file.exists() else {}


@contextlib.contextmanager
def _locked(folder):
    """One process at a time; the lock is on the folder itself, so no file is left behind."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write_record(path, reads=()):
    """Note that `path` holds the outputs of a run of its code, and the records it read; entries of notebooks that are gone leave."""
    path = Path(path)
    file, entry = path.parent / RECORD, fingerprint(path)
    if entry and reads:
        entry["reads"] = {name: _record_hash(name) for name in reads}
    with _locked(path.parent):
        old = json.loads(file.read_text()) if file.exists() else {}
        new = {k: v for k, v in old.items() if (path.parent / k).exists() and k != path.name} | ({path.name: entry} if entry else {})
        if new != old:
            with atomic_write(file) as f:
                f.write("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(new.items())) + "\n}\n")


def stale(path):
    """Why the outputs of a notebook are not those of its code, in words; None if they are."""
    now, then = fingerprint(path), load_record(path)
    if now is None and not then:
        return None
    if now is None:
        return "was recorded with outputs, but holds none"
    if not then:
        return "holds outputs, but no run of it is recorded"
    if now["code"] != then["code"]:
        return "a code cell was edited after the run"
    then = dict(then)
    other = [name for name, was in then.pop("reads", {}).items() if _record_hash(name) != was]
    if other:
        return f"results/{other[0]} has changed since the run"
    return None if now == then else "an output was changed by something else than a run"


def check(paths):
    """Print what is stale; returns how many notebooks are."""
    wrong = {p: why for p in paths if (why := stale(p))}
    for p, why in wrong.items():
        print(f"{why}: python tools/run_notebooks.py {os.path.relpath(p)}")
    print(f"{len(paths) - len(wrong)} of {len(paths)} notebooks hold the outputs of their own code")
    return len(wrong)


def run(path):
    """Execute, store, clean, record."""
    start = time.time()
    nb, skipped, reads = execute(path)
    nbformat.write(nb, path)
    nbdev_clean(fname=str(path))
    write_record(path, reads)
    print(f"{path}: {time.time() - start:.1f} s" + (f", {skipped} cells skipped" if skipped else ""), flush=True)


def main(args=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("notebooks", nargs="*", type=Path)
    ap.add_argument("--check", action="store_true", help="run nothing, compare with the records")
    ap.add_argument("--stale", action="store_true", help="run only what differs from the records")
    args = ap.parse_args(args)
    paths = args.notebooks or sorted(p for p in Path(CONFIG.nbs_path).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if args.check:
        return check(paths)
    for path in paths:
        if not args.stale or stale(path):
            run(path)


if __name__ == "__main__":
    sys.exit(bool(main()))
