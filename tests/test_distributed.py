"""A training by several processes is the training of one: same gradients, weights, statistics and scores; and it ends together.

Most checks run in processes forked from one that has torch loaded (this file run as a script), in float64 so that "the same" can be
strict; two torchrun launchers on the loopback device stand for two machines.
"""
import functools
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _tiny import settings, write_config, write_data

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SHAPE = {"model": {"width_mult": 0.35, "dilations": [1]},
         "augment": {"crop": [64, 64], "scale_min": 0.8, "scale_max": 1.2},
         "train": {"epochs": 2, "batch_size": 4, "optimizer": "sgd", "lr": 0.02, "ema": 0.9, "save_steps": 1, "clip_grad": 1.0}}
LONGER = {**SHAPE, "train": {**SHAPE["train"], "epochs": 6, "lr": 0.005}}  # so that there is time to kill it
VAL = 101
# Exact for sums over pixels. ohem is, as long as its threshold selects; its minimum (min_fraction) is counted among a process's own pixels.
LOSSES = {"cross_entropy": {}, "ohem": {"min_fraction": 0.0}, "dice_ce": {}}


def free_port() -> int:
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- in the driver ---------------------------------------------------------------------------------------------------------------

def config(folder, **sections):
    from mlmsnet.training.config import parse_config
    parts = {name: {**SHAPE.get(name, {}), **sections.get(name, {})} for name in {**SHAPE, **sections}}
    return parse_config(settings(folder / "data", **parts))


def trainer(cfg):
    from mlmsnet.training.loop import Trainer, build_dataset
    return Trainer(cfg, build_dataset(cfg, cfg.data.train), build_dataset(cfg, cfg.data.val), progress=False)


def steps(cfg, n=2):
    "Two optimiser steps: the first one's gradients, the state after both, the losses"
    t = trainer(cfg)
    t.model.train()
    t.loader.set_epoch(0)
    batches, shown, k = iter(t.loader), [], cfg.train.accumulate
    grads = None
    for _ in range(n):
        shown.append(t.train_step([next(batches) for _ in range(k)]))
        grads = grads or {name: p.grad.clone() for name, p in t.model.named_parameters() if p.grad is not None}
        t.step_in_epoch += 1
    return {"grads": grads, "state": t.model.state_dict(), "ema": t.ema.model.state_dict() if t.ema else {}, "shown": shown}


def job_steps(folder, out):
    "Every loss, accumulated gradients, an auxiliary head that the loss does not reach, and dropout"
    cases = {name: {"loss": {"name": name, "params": kw}} for name, kw in LOSSES.items()}
    cases["aux, accumulated"] = {"loss": {"name": "dice_ce", "aux_weight": 0.4}, "model": {"name": "mlms_s"},
                                 "train": {"accumulate": 2, "batch_size": 2}}
    cases["idle aux"] = {"model": {"name": "mlms_s", "params": {"aux": True}}}
    return {name: steps(config(folder, **parts)) for name, parts in cases.items()}


class Stop(Exception):
    pass


def stop(t):
    raise Stop


def job_first_epoch(folder, out):
    from mlmsnet.training.distributed import setup
    from mlmsnet.training.loop import fit
    size = setup("cpu").size
    try:
        fit(config(folder), out / f"from_{size}", progress=False, on_epoch=stop)
    except Stop:
        return size


def job_finish(folder, out):
    "An undisturbed run, and the rest of the one that another number of processes has begun"
    from mlmsnet.training.distributed import setup
    from mlmsnet.training.loop import fit
    size, cfg = setup("cpu").size, config(folder)
    records = [fit(cfg, out / run, progress=False) for run in (f"whole_{size}", f"from_{3 - size}")]
    return [{"finished": r.finished, "processes": r.summary["environment"]["processes"], "cost": r.summary["cost"]} for r in records]


def job_validate(folder, out):
    from mlmsnet.evaluation.evaluate import evaluate
    from mlmsnet.training import loop
    seen = []
    class Spy(loop.ConfusionMatrix):
        def result(self, *args):
            seen.append(self.counts.clone())
            return super().result(*args)
    original, loop.ConfusionMatrix = loop.ConfusionMatrix, Spy
    t = trainer(config(folder, data={"val": "val101.txt"}, train={"batch_size": 6}))
    scores = t.validate()
    loop.ConfusionMatrix = original
    torch.set_default_dtype(torch.float32)
    result = evaluate(t.ema.model.float(), t.val_data, progress=False, report=False)
    torch.set_default_dtype(torch.float64)
    return {"counts": seen[0], "scores": scores, "images": result.images, "evaluated": torch.tensor(result.counts)}


def job_norm(folder, out):
    "Our batch norm by itself, in half precision too, with one value per channel and process"
    from mlmsnet.networks.layers import BatchNorm2d
    from mlmsnet.training.distributed import setup, sync_batchnorm
    world, found = setup("cpu"), {}
    for name, shape, dtype in (("plain", (4, 3, 5, 6), torch.float64), ("single", (2, 3, 1, 1), torch.float64),
                               ("bf16", (4, 3, 5, 6), torch.bfloat16)):
        g = torch.Generator().manual_seed(5)
        x = (3 + torch.randn(shape, generator=g)).to(dtype)[world.rank::world.size].requires_grad_()
        pull = torch.randn(shape, generator=g).to(dtype)[world.rank::world.size]
        holder = torch.nn.Sequential(BatchNorm2d(3, dtype=torch.float32 if dtype == torch.bfloat16 else dtype))
        norm = sync_batchnorm(holder)[0]
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, 1, 2]))
        y = norm(x)
        (y * pull).sum().backward()
        found[name] = {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "db": norm.bias.grad, "mean": norm.running_mean,
                       "var": norm.running_var, "evaluated": holder.eval()(x).detach()}
    return found


def job_errors(folder, out):
    "What each process raises, and whether it would print it"
    from mlmsnet.core import DataError, MlmsError
    from mlmsnet.training import loop
    from mlmsnet.training.distributed import agreed, setup, tells
    world, found = setup("cpu"), {}

    def attempt(name, fn):
        try:
            fn()
            found[name] = None
        except MlmsError as e:
            found[name] = {"kind": type(e).__name__, "text": str(e), "tells": tells(e)}

    class NanOnOne(torch.nn.Module):
        calls = 0
        def forward(self, logits, target):
            self.calls += 1
            return logits.mean() * (float("nan") if self.calls == 2 and world.rank == 1 else 1.0)

    def one_fails():
        with agreed():
            if world.rank == 1:
                raise DataError("only here")

    original = loop.create_loss
    loop.create_loss = lambda *a, **k: NanOnOne()
    attempt("nan", lambda: loop.fit(config(folder), out / "nan", progress=False))
    loop.create_loss = original
    attempt("batch", lambda: loop.fit(config(folder, train={"batch_size": 5}), out / "batch", progress=False))
    attempt("few images", lambda: trainer(config(folder, train={"batch_size": 64})))
    attempt("one fails", one_fails)
    attempt("settings", lambda: loop.fit(replace(config(folder), seed=world.rank), out / "settings", progress=False))
    attempt("other run", lambda: loop.fit(replace(config(folder), seed=9), out / "whole_1", progress=False))
    return found


def job_float32(folder, out):
    from mlmsnet.training.loop import fit
    torch.set_default_dtype(torch.float32)
    fit(config(folder, train=LONGER["train"]), out / "float32", progress=False)


def job_lost(folder, out):
    "Process 1 fails alone in the middle of an epoch"
    from mlmsnet.core import DataError, MlmsError
    from mlmsnet.training import loop
    from mlmsnet.training.distributed import setup, tells
    world, step = setup("cpu"), loop.Trainer.train_step
    def train_step(self, batches):
        if self.step == 1 and world.rank == 1:
            raise DataError("a broken image")
        return step(self, batches)
    loop.Trainer.train_step = train_step
    try:
        loop.fit(config(folder), out / "lost", progress=False)
    except MlmsError as e:
        return {"kind": type(e).__name__, "tells": tells(e), "status": json.loads((out / "lost" / "summary.json").read_text())["status"]}


def together(jobs, size, folder):
    "Run the jobs in `size` forked processes; each leaves `JOB_SIZE_RANK.pt`"
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if size > 1:
                    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                                      MASTER_PORT=str(port))
                for job in jobs:
                    torch.save(globals()[f"job_{job}"](folder, folder / "runs"), folder / f"{job}_{size}_{rank}.pt")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{jobs} on {size} processes failed")


def drive(folder):
    import cv2
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.set_default_dtype(torch.float64)
    from mlmsnet.data import loaders
    from mlmsnet.training import loop
    iterate = loaders.SegLoader.__iter__
    loaders.SegLoader.__iter__ = lambda self: ((x.to(torch.get_default_dtype()), y, i) for x, y, i in iterate(self))
    loop._tensorboard = lambda *a: None  # takes seconds to load
    folder = Path(folder)
    steps(config(folder), 1)  # loads what is loaded late
    together(["steps", "norm", "validate", "first_epoch"], 1, folder)
    together(["steps", "norm", "first_epoch", "finish"], 2, folder)
    together(["finish", "float32"], 1, folder)
    together(["errors", "lost"], 2, folder)
    together(["validate"], 3, folder)


# --- in pytest -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    data = write_data(folder / "data", train=8, val=VAL)
    names = (data / "val.txt").read_text().splitlines(keepends=True)
    (data / "val101.txt").write_text("".join(names))
    (data / "val.txt").write_text("".join(names[:2]))
    done = subprocess.run([sys.executable, __file__, str(folder)], env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@functools.cache
def found(folder, job, size):
    return [torch.load(folder / f"{job}_{size}_{rank}.pt", weights_only=False) for rank in range(size)]


def close(a, b, tol, where=""):
    "Nested numbers and tensors agree"
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            close(a[k], b[k], tol, f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            close(x, y, tol, f"{where}[{i}]")
    elif isinstance(a, (float, torch.Tensor)):
        a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        error = (a - b).abs().max().item() / max(1e-3, a.abs().max().item()) if a.numel() else 0
        assert error < tol, f"{where}: {error:.1e}"
    else:
        assert a == b, (where, a, b)


@pytest.mark.parametrize("case", [*LOSSES, "aux, accumulated", "idle aux"])
def test_two_processes_do_the_steps_of_one(folder, case):
    """Gradients, weights, running statistics, the averaged network and the losses, with dropout and clipping"""
    (one,), two = found(folder, "steps", 1), found(folder, "steps", 2)
    for rank in range(2):
        close(one[case], two[rank][case], 1e-6, f"{case} on process {rank}")
    moved = max((two[0][case]["state"][k] - two[0][case]["ema"][k]).abs().max() for k in two[0][case]["grads"])
    assert moved > 1e-4  # it did learn
    for part in ("state", "ema"):  # and both hold the very same numbers
        assert all(torch.equal(a, b) for a, b in zip(two[0][case][part].values(), two[1][case][part].values()))


def test_batch_norm(folder):
    """Values, gradients and running statistics of the whole batch"""
    (one,), two = found(folder, "norm", 1), found(folder, "norm", 2)
    for name, tol in (("plain", 1e-12), ("bf16", 2e-2)):
        for part in ("y", "dx", "evaluated"):
            whole = one[name][part]
            close(whole, torch.stack([t[name][part] for t in two], 1).reshape(whole.shape), tol, f"{name}.{part}")
        for part in ("dw", "db"):
            close(one[name][part], two[0][name][part] + two[1][name][part], tol, f"{name}.{part}")
        for part in ("mean", "var"):
            close(one[name][part], two[0][name][part], tol, f"{name}.{part}")
    close(one["single"], {k: v if k in ("mean", "var") else torch.cat([t["single"][k] for t in two]) if k in ("y", "dx", "evaluated")
                          else two[0]["single"][k] + two[1]["single"][k] for k, v in two[0]["single"].items()}, 1e-9)


def test_every_validation_image_counts_once(folder):
    (one,), three = found(folder, "validate", 1), found(folder, "validate", 3)
    for r in three:
        assert torch.equal(r["counts"], one["counts"]) and torch.equal(r["evaluated"], one["evaluated"])
        assert r["scores"] == one["scores"] and r["images"] == one["images"] == VAL
    assert one["counts"].sum() == VAL * 47 * 64  # the top row is void


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_goes_on_with_another_number_of_processes(folder, first, then):
    whole, rest = found(folder, "finish", then)[0]
    assert rest["finished"] and rest["processes"] == then and whole["cost"]["images"] == rest["cost"]["images"] == 16
    runs = {name: torch.load(folder / "runs" / name / "last.pt", weights_only=True) for name in (f"from_{first}", "whole_1", "whole_2")}
    for other in ("whole_1", "whole_2"):
        for part in ("model", "ema", "optimizer", "epoch", "config", "sums"):
            close(runs[other][part], runs[f"from_{first}"][part], 1e-6, f"{other} {part}")
    close(rows(folder / "runs" / "whole_1"), rows(folder / "runs" / f"from_{first}"), 1e-5)


def rows(run):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_files_are_of_the_main_process(folder):
    names = {p.name for p in (folder / "runs" / "whole_2").iterdir()}
    assert names == {".lock", "config.yaml", "summary.json", "metrics.jsonl", "last.pt", "best.pt"}


def test_errors_stop_all_with_one_message(folder):
    zero, one = found(folder, "errors", 2)
    expected = {"nan": ("TrainingError", "the loss became nan in epoch 1, step 1, images train"),
                "batch": ("ConfigError", "such as 4 or 6"), "few images": ("ConfigError", "needs 64 images, but the set has 8"),
                "one fails": ("DataError", "process 1 of 2: only here"),
                "settings": ("ConfigError", "differ in their settings"), "other run": ("ConfigError", "holds a run with other settings")}
    for name, (kind, words) in expected.items():
        assert zero[name]["kind"] == kind and words in zero[name]["text"], (name, zero[name])
        assert zero[name]["text"] == one[name]["text"] and zero[name]["tells"] and not one[name]["tells"], name
    assert zero["nan"]["text"].count("train") >= 4, "all images of the batch are named"
    assert "finite" not in zero["batch"]["text"] and not (folder / "runs" / "batch").exists()
    assert json.loads((folder / "runs" / "nan" / "summary.json").read_text())["status"] == "failed"


def test_who_fails_alone_tells_and_the_others_end(folder):
    zero, one = found(folder, "lost", 2)
    assert (zero["kind"], one["kind"]) == ("ProcessLost", "DataError") and one["tells"]
    assert zero["status"] == "failed"


# --- torchrun --------------------------------------------------------------------------------------------------------------------

def launch(node, port, command):
    where = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *where, *command]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(true, seconds=200):
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.02)


def running(run):
    "The processes whose command names the run"
    def read(path):
        try:
            return path.read_bytes()
        except OSError:
            return b""
    return [p.name for p in Path("/proc").glob("[0-9]*") if str(run).encode() in read(p / "cmdline") and b") Z " not in read(p / "stat")]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_two_machines_one_of_which_is_cut_off(folder):
    """Two torchrun launchers; one is killed, nobody is left hanging; started again, they end where one process ends."""
    cfg, run = write_config(folder / "config.yaml", folder / "data", **LONGER), folder / "runs" / "machines"
    command = ["-m", "mlmsnet", "train", str(cfg), "--quiet", "--run-dir"]
    port = free_port()
    nodes = [launch(node, port, [*command, str(run)]) for node in range(2)]
    wait_until(lambda: (run / "last.pt").exists() or any(n.poll() is not None for n in nodes))
    nodes[1].kill()
    assert nodes[0].wait(100) != 0
    wait_until(lambda: not running(run), 60)
    error = nodes[0].stderr.read()
    assert not running(run) and "lost another process" in error, error
    state = torch.load(run / "last.pt", weights_only=True)
    assert 2 * state["epoch"] + state["step_in_epoch"] < 12
    port = free_port()
    nodes = [launch(node, port, [*command, str(run)]) for node in range(2)]
    for node in nodes:
        assert node.wait(300) == 0, node.stderr.read()
    assert [n.stdout.read().count("best val mIoU") for n in nodes] == [1, 0]
    # float32 and small maps, whose batch norms enlarge rounding from step to step
    close([r["loss"] for r in rows(folder / "runs" / "float32")], [r["loss"] for r in rows(run)], 2e-3, "loss")
    a, b = (torch.load(folder / "runs" / name / "last.pt", weights_only=True)["model"] for name in ("machines", "float32"))
    a, b = (torch.cat([t.double().flatten() for t in x.values()]) for x in (a, b))
    apart = ((a - b).norm() / a.norm()).item()
    print(f"weights of two machines and of one process: {apart:.1e} apart")
    assert apart < 2e-3


if __name__ == "__main__":
    drive(*sys.argv[1:])
