"""Run notebooks top to bottom through a real kernel and store their outputs.

    python tools/run_notebooks.py [NOTEBOOK ...]      default: all of nbs/

Cells flagged in settings.ini (`tst_flags`) are skipped and keep the outputs they had, for example from a GPU.
No widget state is saved (its ids are random), so two runs give the same file.
"""
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config

SKIP = "skip-execution"
CONFIG = get_config()
FLAGGED = re.compile(r"^#\s*\|\s*(" + "|".join(map(re.escape, CONFIG.tst_flags.split())) + r"|eval:\s*false)\b", re.M)
LIVE_VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path, timeout=600):
    """Run one notebook; returns it with fresh outputs, and the number of cells that were skipped."""
    nb = nbformat.read(path, as_version=4)
    skipped = [c for c in nb.cells if c.cell_type == "code" and FLAGGED.search(c.source)]
    old = {c.id: c.outputs for c in skipped}
    for c in skipped:
        c.metadata.setdefault("tags", []).append(SKIP)
    resources = {"metadata": {"path": str(Path(path).parent)}}
    NotebookClient(nb, timeout=timeout, kernel_name="python3", resources=resources, skip_cells_with_tag=SKIP).execute()
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
    return nb, len(skipped)


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


def main(paths):
    paths = [Path(p) for p in paths] or sorted(p for p in Path(CONFIG.nbs_path).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    for path in paths:
        start = time.time()
        nb, skipped = execute(path)
        nbformat.write(nb, path)
        print(f"{path}: {time.time() - start:.1f} s" + (f", {skipped} cells skipped" if skipped else ""), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
