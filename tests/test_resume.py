"""A run that is killed at any moment and started again ends with the very same weights.

The kills happen in children forked from one process that has torch loaded (this file run as a script), so that each restart costs a
moment and not a start of Python; a last one goes through the real command and comes from outside.
"""
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _tiny import write_config, write_data

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# (moment, file or None, steps done at that moment); 3 epochs of 3 steps, a checkpoint after each step. In the order in which they strike.
KILLS = [
    ("before rename", "summary.json", 0),  # nothing is there but the settings
    ("in step", None, 0),  # weights have moved, their average has not, no checkpoint yet
    ("half written", "last.pt", 1),
    ("before rename", "last.pt", 2),
    ("half written", "best.pt", 3),
    ("after rename", "best.pt", 3),  # best.pt is one epoch ahead of last.pt
    ("after rename", "last.pt", 3),  # the epoch is saved, its line in metrics.jsonl is not
    ("in step", None, 4),
    ("in validation", None, 6),
    ("half written", "metrics.jsonl", 6),
    ("half written", "last.pt", 8),
    ("half written", "summary.json", 9),  # all is done but the last word
]


# --- in the driver ---------------------------------------------------------------------------------------------------------------

def arm(moment: str, file: str | None, step: int):
    "Patch this process so that it kills itself at one moment"
    from mlmsnet.training import loop
    real = {"fsync": os.fsync, "replace": os.replace, "validate": loop.Trainer.validate, "update": loop.ModelEma.update}
    trainers = []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def due(name=None):
        return name == file and (trainers[-1].step if trainers else 0) == step

    def fsync(fd):  # the whole file has been written; cut it to half, as a kill in the middle would leave it
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        if moment == "half written" and name.startswith(f".{file}.") and due(file):
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            die()
        real["fsync"](fd)

    def replace(a, b):
        name = Path(b).name
        if moment == "before rename" and due(name):
            die()
        real["replace"](a, b)
        if moment == "after rename" and due(name):
            die()

    def update(self, model, at):
        if moment == "in step" and at == step:
            die()
        real["update"](self, model, at)

    def validate(self):
        if moment == "in validation" and due():
            die()
        return real["validate"](self)

    def init(self, *args, _init=loop.Trainer.__init__, **kwargs):
        _init(self, *args, **kwargs)
        trainers.append(self)

    os.fsync, os.replace = fsync, replace
    loop.Trainer.__init__, loop.Trainer.validate, loop.ModelEma.update = init, validate, update


def in_child(cfg, run, kill=None, delay=None) -> int:
    "`fit` in a forked child that dies at `kill`, or is killed `delay` seconds after its first step; the signal that ended it, or 0"
    from mlmsnet.training import loop
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill:
                arm(*kill)
            step = loop.Trainer.train_step
            loop.Trainer.train_step = lambda self, batches: (os.write(tell, b"."), step(self, batches))[1]
            loop.fit(cfg, run, progress=False)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(tell)
    if delay is not None:
        os.read(ready, 1)  # the first step begins, or the child has ended
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(ready)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the child failed at {kill or delay}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def drive(config: str, folder: str):
    "An undisturbed run, one that is killed at each of KILLS in turn, and one killed by the clock; prints what ended each child"
    import cv2
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    from mlmsnet.core import load_checkpoint
    from mlmsnet.training.config import parse_config
    from mlmsnet.training.loop import Trainer, build_dataset
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")  # here once, and not in each child
    cfg, folder, ends = parse_config(config), Path(folder), []
    Trainer(cfg, build_dataset(cfg, cfg.data.train), build_dataset(cfg, cfg.data.val))  # loads what is loaded late
    assert in_child(cfg, folder / "undisturbed") == 0
    for kill in KILLS:
        run = folder / "killed"
        end = in_child(cfg, run, kill)
        left = sorted({p.name.split(".")[1] for p in run.glob(".*.tmp")})
        at = load_checkpoint(run / "last.pt") if (run / "last.pt").exists() else None
        ends.append({"kill": kill, "signal": end, "halves": left, "step": at and at["epoch"] * 3 + at["step_in_epoch"]})
    ends.append({"kill": None, "signal": in_child(cfg, folder / "killed"), "halves": [p.name for p in (folder / "killed").glob(".*.tmp")]})
    clock = [in_child(cfg, folder / "clock", delay=d) for d in (0.03, 0.11, 0.19, 0.4)]
    clock.append(in_child(cfg, folder / "clock"))
    print(json.dumps({"ends": ends, "clock": clock}))


# --- in pytest -------------------------------------------------------------------------------------------------------------------

def same(a, b, where=""):
    "Assert that two nested states are bitwise equal"
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, (where, a, b)


def assert_same_run(a: Path, b: Path):
    "Checkpoints bitwise, records but for the seconds"
    def load(path):
        return torch.load(path, weights_only=True)
    def rows(run):
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = load(a / "last.pt"), load(b / "last.pt")
    for part in ("model", "ema", "optimizer", "scaler", "epoch", "step_in_epoch", "sums", "best", "config"):
        same(last[0][part], last[1][part], part)
    same(load(a / "best.pt"), load(b / "best.pt"), "best.pt")
    assert rows(a) == rows(b) and len(rows(a)) == 3
    summaries = [json.loads((r / "summary.json").read_text()) for r in (a, b)]
    assert all(s["status"] == "finished" for s in summaries)
    assert summaries[0]["results"] == summaries[1]["results"]
    assert not list(b.glob(".*.tmp"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    config = write_config(folder / "config.yaml", write_data(folder / "data"))
    done = subprocess.run([sys.executable, __file__, str(config), str(folder)], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_killed_at_twelve_moments(runs):
    folder, told = runs
    *ends, finish = told["ends"]
    assert len(ends) >= 10 and all(e["signal"] == signal.SIGKILL for e in ends), ends
    for e in ends:
        moment, file, step = e["kill"]
        assert (file.split(".")[0] in e["halves"]) == (moment in ("half written", "before rename")) if file else not e["halves"], e
        # what is saved is the last finished write: of this step if last.pt came through, else of the one before
        saved = step if moment in ("in step", "in validation") or file != "last.pt" or moment == "after rename" else step - 1
        saved -= (file == "best.pt") + (moment == "in validation")  # the epoch's own checkpoint comes after these
        assert (e["step"] or 0) == saved, e
    assert finish["signal"] == 0 and not finish["halves"]
    assert_same_run(folder / "undisturbed", folder / "killed")


def test_killed_by_the_clock(runs):
    folder, told = runs
    assert told["clock"].count(signal.SIGKILL) >= 2 and told["clock"][-1] == 0
    assert_same_run(folder / "undisturbed", folder / "clock")


def test_killed_from_outside_through_the_command(runs):
    folder, _ = runs
    run = folder / "command"
    command = [sys.executable, "-m", "mlmsnet", "train", str(folder / "config.yaml"), "--run", str(run), "--quiet"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(rows) < 3 and torch.load(run / "last.pt", weights_only=True)["epoch"] < 3
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder / "undisturbed", run)


if __name__ == "__main__":
    drive(*sys.argv[1:])
