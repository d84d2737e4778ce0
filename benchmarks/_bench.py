"""What all benchmarks share: interleaved timing of peers in one run, the machine in words, and a record."""
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def timed(functions: dict, repeats: int = 5, warmup: int = 1) -> dict:
    """Median seconds of each function; the functions take turns, so that a slow moment of the machine hits all alike."""
    seconds = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, fn in functions.items():
            start = time.perf_counter()
            fn()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def machine() -> dict:
    """The machine and the versions in words."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, "python": platform.python_version(), "torch": torch.__version__}


def record(path, name: str, rows: list, **notes):
    """Write the rows of a benchmark with its command, commit and machine as JSON."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    data = {"benchmark": name, "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]), "commit": commit,
            "machine": machine(), **notes, "rows": rows}
    Path(path).write_text(json.dumps(data, indent=1) + "\n")
    print(f"record: {path}")


def table(rows: list):
    """Print dictionaries with the same keys as a table."""
    keys = list(rows[0])
    cells = [[f"{r[k]:.4g}" if isinstance(r[k], float) else str(r[k]) for k in keys] for r in rows]
    width = [max(len(k), *(len(c[i]) for c in cells)) for i, k in enumerate(keys)]
    for row in [keys, *cells]:
        print("  ".join(c.ljust(w) for c, w in zip(row, width)))


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
