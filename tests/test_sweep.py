"""Sweeps: every factor with every seed, each run once, whatever is killed; broken records are named; executors give the same table.

The long form, a sweep of 2 x 2 x 3 that is killed five times: MLMSNET_FULL=1 pytest tests/test_sweep.py -k killed
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from _tiny import settings, write_data

from mlmsnet.cli import main
from mlmsnet.comparing.compare import load_plugin
from mlmsnet.comparing.sweep import Sweep, journal, load_sweep, read_sweep, run_sweep, sweep_table
from mlmsnet.core import ConfigError, DataError
from mlmsnet.training.config import config_hash, parse_config
from mlmsnet.training.loop import Trainer, build_dataset

FULL = os.environ.get("MLMSNET_FULL") == "1"
SEEDS, KILLS = ([0, 1, 2], 5) if FULL else ([0, 1], 2)

PLUGIN = '''
import os, signal
import torch
from mlmsnet.losses.contract import register_loss

@register_loss("brittle", summary="cross entropy; kills its process once, if BRITTLE names a folder that can be made")
def brittle(logits, target):
    brittle.calls = getattr(brittle, "calls", 0) + 1
    if brittle.calls == 4 and "BRITTLE" in os.environ:
        try:
            os.mkdir(os.environ["BRITTLE"])
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=255)

@register_loss("sour", summary="turns to nan, unless SWEET is set")
def sour(logits, target):
    sour.calls = getattr(sour, "calls", 0) + 1
    loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
    return loss if "SWEET" in os.environ or sour.calls < 3 else loss * float("nan")
'''
SMALL = {"data.size": [64, 128], "augment.crop": [64, 64], "model.output_stride": 32, "model.dilations": [1, 2], "model.width_mult": 0.75,
         "train.epochs": 2, "train.batch_size": 2, "train.warmup_steps": 0, "train.ema": 0.0, "train.val_batch": 1,
         "train.keep_memory": False, "device": "cpu"}
SWEEP = {"name": "two by two", "base": "minicity_losses", "settings": SMALL,
         "grid": {"loss": ["brittle", "dice:smooth=1"], "model.msf": [True, False]},
         "seeds": SEEDS, "images": [4, 2]}
QUIET = {"progress": False, "pictures": 1, "cpus_per_run": 1, "say": lambda text: None}


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory):
    from mlmsnet.losses.contract import LOSSES
    path = tmp_path_factory.mktemp("plugin") / "mine.py"
    path.write_text(PLUGIN)
    names = load_plugin(path)
    yield path
    for name in names:
        del LOSSES[name]


@pytest.fixture
def no_page(monkeypatch):
    "Drawing the pages takes longer than training these networks"
    for name in ("write_report", "write_markdown"):
        monkeypatch.setattr(f"mlmsnet.comparing.report.{name}", lambda *a, **k: None)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "ablation.yaml"
    path.write_text(yaml.safe_dump(SWEEP))
    return path


@pytest.fixture(scope="module")
def undisturbed(file, tmp_path_factory):
    "The sweep, run in this process from end to end"
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as m:
        for name in ("write_report", "write_markdown"):
            m.setattr(f"mlmsnet.comparing.report.{name}", lambda *a, **k: None)
        run_sweep(file, out, **QUIET)
    losses = [row["loss"] for *_, history in scores(out).values() for row in history]
    assert len(set(losses)) == len(losses) == 8 * len(SEEDS)  # every epoch of every run is one of its own
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Settings of a network that is trained in a second, on six pictures"
    root = write_data(tmp_path_factory.mktemp("data"))
    return settings(root, train={"epochs": 1, "save_steps": 0, "ema": 0.0})


def scores(out):
    "What a sweep found: scores of each run, and the losses of its epochs to the last digit"
    def learnt(path):
        rows = [json.loads(line) for line in (Path(out) / path / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    runs = read_sweep(out)["runs"]
    return {(r["label"], r["seed"]): (r["hash"], r["status"], r.get("iou"), r.get("class_boundary_iou"), learnt(r["path"])) for r in runs}


def redone(sweep, out):
    run_sweep(sweep, out, **QUIET)
    return scores(out)


def once(out, result):
    "Every run is on record, was scored once, and no epoch of it was trained twice"
    events = Counter((e["event"], e["run"], e.get("epoch")) for e in journal(out))
    assert [r["status"] for r in result["runs"]] == ["finished"] * len(result["runs"])
    assert all(n == 1 for (event, *_), n in events.items() if event in ("scored", "epoch")), events
    return events


# --- expansion -------------------------------------------------------------------------------------------------------------------

def test_expansion_and_hashes(base):
    arms = [{"name": "a"}, {"name": "b", "train.epochs": 2}]
    sweep = Sweep(base, {"train.lr": [0.001, 0.01], "model.msf": [True, False]}, seeds=(3, 1), arms=arms)
    runs = sweep.runs("out")
    assert len(runs) == 16 == len({r.hash for r in runs})
    assert [r.seed for r in runs] == [3] * 8 + [1] * 8
    first = [["a", .001, True], ["a", .001, False], ["a", .01, True], ["a", .01, False], ["b", .001, True]]
    assert [list(r.factors.values()) for r in runs[:5]] == first
    flat = parse_config(base, ["--train.lr", "0.01", "--model.msf", "false", "--seed", "1", "--train.epochs", "2"])
    last = runs[-1]
    assert last.cfg == flat and last.path == Path("out/runs") / config_hash(flat) and last.name == "b, lr=0.01, msf=false, seed 1"
    again = Sweep(base, {"model.msf": [False, True], "train.lr": [0.01, 0.001]}, seeds=(1, 3), arms={"a": {}, "b": {"train.epochs": 2}})
    assert {r.hash for r in again.runs()} == {r.hash for r in runs}  # a run's name does not depend on who asks


@pytest.mark.parametrize("change, parts", [
    ({"grid": {"train.epoch": [1]}}, ["grid", "'train.epoch'", "Did you mean train.epochs"]),
    ({"grid": {"bogus": [1]}}, ["no setting 'bogus'"]),
    ({"grid": {"train.epochs": [1, "many"]}}, ["factor train.epochs, value 'many'", "expected int"]),
    ({"grid": {"train.lr": [0.1, True]}}, ["factor train.lr, value True", "expected float"]),
    ({"grid": {"train.epochs": [1, None]}}, ["value None", "cannot be null"]),
    ({"grid": {"train.epochs": [1, 0]}}, ["value 0", "at least 1"]),
    ({"grid": {"eval.mode": ["sliding"]}}, ["factor eval.mode", "whole or slide"]),
    ({"grid": {"loss": ["cross_entropi"]}}, ["factor loss, value 'cross_entropi'", "Did you mean cross_entropy"]),
    ({"grid": {"loss": [3]}}, ["factor loss, value 3", "is no loss"]),
    ({"grid": {"train.lr": 0.1}}, ["factor train.lr", "give a list"]),
    ({"grid": {"train.lr": []}}, ["factor train.lr", "give a list"]),
    ({"grid": {}}, ["nothing to vary"]),
    ({"grid": {"train.lr": [1, 1.0]}}, ["are the same run"]),
    ({"grid": {"device": ["cpu", "cuda"]}}, ["are the same run", "is a setting"]),
    ({"grid": {"seed": [1, 2]}}, ["under `seeds`"]),
    ({"arms": [{"name": "x"}, {"name": "x", "train.lr": 1}]}, ["two arms are called x"]),
    ({"arms": [{"name": "x", "train.rl": 1}]}, ["arm x", "train.rl"]),
    ({"arms": [{"name": "x", "train.lr": "fast"}]}, ["arm x", "expected float"]),
    ({"arms": [{"name": "x", "model.msf": True}]}, ["in the grid and in the arms"]),
    ({"settings": {"model.msf": True}}, ["a setting and a factor"]),
    ({"settings": {"train.lr": "fast"}}, ["base and settings", "expected float"]),
    ({"seeds": [0, 0]}, ["different whole numbers"]),
    ({"seeds": [-1]}, ["different whole numbers"]),
    ({"seeds": ["a"]}, ["different whole numbers"]),
    ({"seeds": []}, ["different whole numbers"]),
    ({"base": "camvid_cpuu"}, ["Did you mean camvid_cpu"]),
    ({"base": None}, ["base"]),
    ({"sedes": [1]}, ["a sweep has no 'sedes'", "Did you mean seeds"]),
    ({"format": 99}, ["newer mlmsnet"]),
    ({"images": [4]}, ["images"]),
])
def test_refused(tmp_path, base, capfd, change, parts):
    file = tmp_path / "ablation.yaml"
    d = {"base": base, "grid": {"model.msf": [True, False]}, **change}
    file.write_text(yaml.safe_dump(d))
    code = main(["compare", str(file), "--out", str(tmp_path / "out"), "--quiet"])
    err = capfd.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "ablation.yaml" in err or "base" in change, err
    for part in parts:
        assert part in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more, parts", [
    (["--losses", "dice"], ["--losses does not go with a sweep"]),
    (["--train.lr", "fast"], ["expected float"]),
    (["--model.msf", "true"], ["--model.msf is a factor"]),
    (["--seed", "1"], ["--seeds"]),
    (["--seeds", "0,0"], ["different whole numbers"]),
    (["--jobs", "0"], ["jobs is 0"]),
    (["--executor", "serial", "--jobs", "2"], ["one run at a time"]),
    (["--jobs", "2", "--gpus-per-run", "3"], ["a number from 0 to 1"]),
    (["--ray"], ["pip install 'mlmsnet[ray]'"]),
])
def test_refused_on_the_command_line(file, tmp_path, capfd, monkeypatch, more, parts):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert main(["compare", str(file), "--out", str(tmp_path / "out"), *more]) == 2
    err = capfd.readouterr().err
    assert all(p in err for p in parts) and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_refused_under_torchrun(base, tmp_path, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="under torchrun: start it alone"):
        run_sweep(Sweep(base, {"model.msf": [True, False]}), tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_found_before_anything_is_trained(base, tmp_path):
    for grid, part in (({"model.backbone": ["mobilenetv3_small", "mobilenetv3_smal"]}, "mobilenetv3_smal"),
                       ({"model.weights": ["none.pth"]}, "none.pth"),
                       ({"loss": ["cross_entropy:class_weight=[1,2]"]}, "class_weight has 2 numbers"),
                       ({"data.train": ["train.txt", "train2.txt"]}, "train2.txt")):
        with pytest.raises((ConfigError, DataError), match=part.replace("[", r"\[")):
            run_sweep(Sweep(base, grid), tmp_path / "out", **QUIET)
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match="mlmsnet compare --config"):
        (tmp_path / "plain.yaml").write_text(yaml.safe_dump(base))
        load_sweep(tmp_path / "plain.yaml")


def test_dry_run(file, tmp_path, capfd):
    assert main(["compare", str(file), "--dry-run", "--out", str(tmp_path / "out"), "--train.lr", "0.01", "--seeds", "7"]) == 0
    out = capfd.readouterr().out
    runs = load_sweep(file, ["--train.lr", "0.01"], seeds=[7]).runs()
    assert len(runs) == 4
    assert all(f"| {r.hash} | {r.factors['loss']} | {json.dumps(r.factors['model.msf'])} | 7 | open |" in out for r in runs)
    assert not (tmp_path / "out").exists()


# --- what runs share -------------------------------------------------------------------------------------------------------------

def test_order_and_augmentation_depend_on_the_seed_alone(base):
    factors = {"loss": ["cross_entropy", "dice"], "model.msf": [True, False], "train.lr": [0.001, 0.01]}
    seen = {}
    for run in Sweep(base, factors, seeds=(0, 1)).runs():
        trainer = Trainer(run.cfg, build_dataset(run.cfg, run.cfg.data.train), progress=False)
        for epoch in range(2):
            trainer.loader.set_epoch(epoch)
            seen.setdefault((run.seed, epoch), []).append([(i.tolist(), x, y) for x, y, i in trainer.loader])
    for batches in seen.values():
        assert len(batches) == 8
        for other in batches[1:]:
            assert all(i == j and torch.equal(x, u) and torch.equal(y, v) for (i, x, y), (j, u, v) in zip(batches[0], other, strict=True))
    orders = {key: tuple(i for b, *_ in batches[0] for i in b) for key, batches in seen.items()}
    assert len(set(orders.values())) == 4, orders  # another seed or epoch, another order


def test_scoring_alone_is_not_trained_again(base, no_page, tmp_path):
    arms = {"plain": {}, "flipped": {"eval.flip": True, "eval.scales": [0.5, 1.0]}}
    sweep = Sweep(base, {"model.msf": [True, False]}, arms=arms)
    result = run_sweep(sweep, tmp_path / "a", **QUIET)
    events = once(tmp_path / "a", result)
    assert sum(n for (event, *_), n in events.items() if event == "epoch") == 2 == result["cost"]["trainings"] and len(result["runs"]) == 4
    one = Sweep(base, {"eval.flip": [True]}, settings={"model.msf": False, "eval.scales": [0.5, 1.0]})
    alone = run_sweep(one, tmp_path / "b", **QUIET)["runs"][0]
    shared = next(r for r in result["runs"] if r["hash"] == alone["hash"])
    assert shared["iou"] == alone["iou"] and shared["trained_in"] != shared["hash"] and "trained_in" not in alone
    folder = tmp_path / "a" / shared["path"]
    assert main(["evaluate", str(folder), "--quiet"]) == 0  # an ordinary run: its own protocol is in its checkpoint
    assert next(r for r in read_sweep(tmp_path / "a")["runs"] if r["hash"] == alone["hash"])["iou"] == alone["iou"]


# --- the folder ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    "A small sweep that is done; copy it before you break it"
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as m:
        for name in ("write_report", "write_markdown"):
            m.setattr(f"mlmsnet.comparing.report.{name}", lambda *a, **k: None)
        run_sweep(small(base), out, **QUIET)
    return out


def small(base, **more):
    return Sweep(base, {"model.msf": [True, False]}, **more)


def files(out):
    found = (p for p in sorted(Path(out).rglob("*")) if p.is_file() and not p.name.endswith((".claim", ".lock")))
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in found}


@pytest.mark.parametrize("other, parts", [
    (dict(settings={"train.lr": 0.5}), ["train.lr: 0.001 → 0.5"]),
    (dict(seeds=(1,)), [r"seeds: \[0\] → \[1\]"]),
    (dict(grid={"loss": ["dice"]}), ["loss: null → ", "model.msf"]),
    (dict(arms=[{"name": "x", "train.ema": 0.5}]), ["arm: null → "]),
])
def test_another_sweep_is_refused(base, finished, other, parts):
    before = files(finished)
    for part in parts:
        with pytest.raises(ConfigError, match=f"belongs to another sweep .*{part}"):
            run_sweep(replace(small(base), **other), finished, **QUIET)
    assert files(finished) == before


def test_a_sweep_grows(base, finished, no_page, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("evaluation_*.json")}
    grown = run_sweep(replace(small(base), seeds=(0, 1), settings={}), out, **QUIET)
    assert len(grown["runs"]) == 4 and all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    before = scores(out)
    part = run_sweep(small(base), out, **QUIET)  # the old command still works, on its part
    assert part == grown and yaml.safe_load((out / "sweep.yaml").read_text())["seeds"] == [0, 1]
    (out / "sweep.yaml").unlink()  # the runs are found again by their names
    assert redone(replace(small(base), seeds=(0, 1)), out) == before
    (out / "sweep.yaml").unlink()
    with pytest.raises(ConfigError, match="runs that are not of this sweep"):
        run_sweep(small(base), out, **QUIET)


def _edit(change):
    def edit(path):
        d = yaml.safe_load(path.read_text())
        change(d)
        path.write_text(yaml.safe_dump(d) if path.suffix == ".yaml" else json.dumps(d))
    return edit


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("name, spoil, parts", [
    ("evaluation_val.json", cut, ["not valid JSON", "scored again, not trained again"]),
    ("evaluation_val.json", _edit(lambda d: d["config"].update(flip=True)), ["scored with other settings", "delete it"]),
    ("evaluation_val.json", lambda p: p.write_text("[]"), ["not a record"]),
    ("summary.json", cut, ["not valid JSON", "delete it"]),
    ("summary.json", _edit(lambda d: d.update(format=99)), ["newer mlmsnet", "upgrade"]),
    ("metrics.jsonl", cut, ["line 1 is no JSON", "delete it"]),
    ("config.yaml", _edit(lambda d: d["train"].update(lr=0.5)), ["does not fit the name of its folder", "train.lr: 0.001 → 0.5"]),
    ("config.yaml", _edit(lambda d: d["model"].update(future=1)), ["cannot be read", "model.future", "another version"]),
    ("config.yaml", lambda p: p.write_text("{"), ["cannot be read", "written again"]),
])
def test_a_broken_record_is_named_and_kept(base, finished, no_page, tmp_path, name, spoil, parts):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / read_sweep(out)["runs"][1]["path"] / name
    spoil(path)
    before = files(out)
    with pytest.raises(DataError) as e:
        run_sweep(small(base), out, **QUIET)
    text = str(e.value)
    assert all(p in text for p in parts) and str(path) in text and "\n" not in text, text
    assert files(out) == before
    if "delete" in text or "written again" in text:  # the mend that it names
        path.unlink()
        assert redone(small(base), out) == scores(finished)
        assert not [e for e in journal(out)[len(journal(finished)):] if e["event"] == "epoch"]  # nothing was trained again


def test_other_versions_and_halves(base, finished, no_page, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    runs = [out / r["path"] for r in read_sweep(out)["runs"]]
    for place in (out, runs[0]):
        (place / ".summary.json.abc.tmp").write_text("{half")
    assert redone(small(base), out) == scores(finished)  # halves of files are nothing
    old = shutil.copytree(runs[0], runs[0].with_name("0123abcd"))  # named by a version that hashes otherwise
    with pytest.raises(DataError, match="0123abcd.*another version"):
        run_sweep(small(base), out, **QUIET)
    shutil.rmtree(old)
    _edit(lambda d: d.update(format=99))(out / "sweep.yaml")
    with pytest.raises(DataError, match="sweep.yaml: written by a newer mlmsnet"):
        run_sweep(small(base), out, **QUIET)


# --- failures --------------------------------------------------------------------------------------------------------------------

def test_failed_run_is_kept_and_retried(base, no_page, tmp_path, plugin, capfd, monkeypatch):
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"base": base, "grid": {"loss": ["sour", "dice"], "train.batch_size": [2, 100]}}))
    command = ["compare", str(file), "--out", str(out), "--quiet"]  # the plugin is loaded already
    assert main(command) == 0
    text, rows = capfd.readouterr().out, {r["label"]: r for r in json.loads((out / "sweep.json").read_text())["runs"]}
    assert rows["sour, batch_size=2"]["status"] == "failed" and "loss became nan" in rows["sour, batch_size=2"]["reason"]
    assert "batch" in rows["dice, batch_size=100"]["reason"] and rows["dice, batch_size=2"]["miou"] >= 0
    assert "sour, batch_size=2, seed 0: failed: TrainingError" in text
    assert "TrainingError" in (out / rows["sour, batch_size=2"]["path"] / "failure.txt").read_text()
    monkeypatch.setenv("SWEET", "1")
    assert main(command) == 0 and "3 failed before and kept (--retry tries again)" in capfd.readouterr().out
    assert main([*command, "--retry"]) == 0
    after = {r["label"]: r for r in read_sweep(out)["runs"]}
    assert [after[k]["status"] for k in after] == ["finished", "failed", "finished", "failed"]
    assert after["dice, batch_size=2"] == rows["dice, batch_size=2"]
    assert not (out / after["sour, batch_size=2"]["path"] / "failure.txt").exists()


def test_a_failed_training_fails_its_kin(base, no_page, tmp_path):
    result = run_sweep(Sweep(base, {"loss": ["sour"], "eval.flip": [False, True]}), tmp_path, **QUIET)
    first, second = result["runs"]
    assert first["status"] == second["status"] == "failed" and f"its training failed in {first['hash']}" in second["reason"]


# --- killed, shared, elsewhere ---------------------------------------------------------------------------------------------------

def test_killed_again_and_again(file, plugin, undisturbed, tmp_path):
    "SIGKILL at random moments; the same command goes on, and the table is that of an undisturbed run"
    out, rng = tmp_path / "out", random.Random(7)
    command = [sys.executable, "-m", "mlmsnet", "compare", str(file), "--out", str(out), "--plugin", str(plugin), "--quiet",
               "--pictures", "1", "--cpus-per-run", "1"]
    about = dict(env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    whole = read_sweep(undisturbed)
    per_kill, kept = 4 * len(whole["runs"]) // (KILLS + 1), {}
    for k in range(KILLS):
        p, moment = subprocess.Popen(command, **about), rng.randint(k * per_kill + 1, (k + 1) * per_kill)
        while p.poll() is None and len(journal(out)) < moment:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        p.send_signal(signal.SIGKILL)
        p.communicate()
        now = {f: f.read_bytes() for f in out.rglob("evaluation_*.json")}
        assert all(now.get(f) == b for f, b in kept.items())  # nothing is lost or written anew
        kept = now
    p = subprocess.run(command, timeout=300, **about)
    result = read_sweep(out)
    assert p.returncode == 0 and scores(out) == scores(undisturbed), p.stdout
    assert sweep_table(result) == sweep_table(whole) and sweep_table(result) in p.stdout
    assert all(f.read_bytes() == b for f, b in kept.items())
    events = once(out, result)
    assert sum(n for (event, *_), n in events.items() if event == "start") <= len(result["runs"]) + KILLS
    assert (out / "report.html").stat().st_size > 10_000 and (out / "report.md").exists() and list((out / "figures").glob("*.svg"))


def test_processes_and_one_is_killed(file, plugin, undisturbed, no_page, tmp_path, monkeypatch):
    monkeypatch.setenv("BRITTLE", str(tmp_path / "killed"))
    said, sweep = [], load_sweep(file, seeds=[0])
    result = run_sweep(sweep, tmp_path / "out", executor="processes", jobs=2, plugins=[plugin], **{**QUIET, "say": said.append})
    assert (tmp_path / "killed").exists() and any("a worker was killed at brittle" in s for s in said), said
    once(tmp_path / "out", result)
    assert scores(tmp_path / "out") == {k: v for k, v in scores(undisturbed).items() if k[1] == 0}
    done = [e for e in journal(tmp_path / "out") if e["event"] == "scored"]
    assert len(done) == 4 and all(e["pid"] != os.getpid() for e in done)
    assert sum("mIoU" in s for s in said) == 4  # a line for each run, whoever made it


def test_ray_and_a_worker_is_killed(file, plugin, undisturbed, no_page, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    monkeypatch.setenv("BRITTLE", str(tmp_path / "killed"))
    try:
        result = run_sweep(file, tmp_path / "out", executor="ray", jobs=2, plugins=[plugin], **QUIET)
    except ConfigError as e:
        if "no Ray cluster" in str(e):
            pytest.skip(str(e))
        raise
    assert (tmp_path / "killed").exists()
    once(tmp_path / "out", result)
    assert scores(tmp_path / "out") == scores(undisturbed)
    starts = Counter(e["run"] for e in journal(tmp_path / "out") if e["event"] == "start")
    assert sum(starts.values()) == len(result["runs"]) + 1  # the killed one began twice
