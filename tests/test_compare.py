"""`mlmsnet compare`: nothing is lost when it is killed, nothing is trained twice, failures are kept, tables hold what records say."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from _tiny import CLASSES, write_config, write_data

from mlmsnet.cli import main
from mlmsnet.comparing.compare import markdown_table, read_comparison
from mlmsnet.training.loop import Trainer
from mlmsnet.training.records import load_run

PLUGIN = """
import torch
from mlmsnet.losses.contract import register_loss

@register_loss("sour", summary="turns to nan after a while")
def sour(logits, target):
    sour.calls = getattr(sour, "calls", 0) + 1
    loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
    return loss if sour.calls < 4 else loss * float("nan")
"""


@pytest.fixture
def config(tmp_path):
    write_data(tmp_path / "data")
    return write_config(tmp_path / "c.yaml", tmp_path / "data")


@pytest.fixture(autouse=True)
def forget_plugins():
    from mlmsnet.losses.contract import LOSSES, available_losses
    before = set(available_losses())
    yield
    for name in set(LOSSES) - before:
        del LOSSES[name]


@pytest.fixture
def no_page(monkeypatch):
    "Drawing the page takes longer than training these networks"
    monkeypatch.setattr("mlmsnet.comparing.report.write_report", lambda *a, **k: None)


def arguments(config, losses, *more, out="out"):
    return ["compare", "--losses", losses, "--config", str(config), "--out", str(config.parent / out), "--quiet", *map(str, more)]


def counts(out):
    return {str(p.parent.relative_to(out)): json.loads(p.read_text())["counts"] for p in Path(out).rglob("evaluation_val.json")}


def refused(capfd, code, *parts):
    out, err = capfd.readouterr()
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, (code, err)
    for part in parts:
        assert part in err, err
    return out


# --- what it leaves --------------------------------------------------------------------------------------------------------------

def test_tables_are_means_and_sds_of_records(config, capfd):
    assert main(arguments(config, "cross_entropy,dice:smooth=1", "--seeds", "0,1,2", "--train.epochs", 1)) == 0
    out = config.parent / "out"
    result = json.loads((out / "comparison.json").read_text())
    assert [r["loss"] for r in result["runs"]] == ["cross_entropy", "dice:smooth=1"] * 3
    assert [r["seed"] for r in result["runs"]] == [0, 0, 1, 1, 2, 2]
    assert {p.name for p in out.iterdir()} >= {"cross_entropy", "dice-smooth=1", "comparison.json", "comparison.md", "report.html"}
    for row in result["losses"]:
        records = [json.loads((out / r["path"] / "evaluation_val.json").read_text()) for r in result["runs"] if r["loss"] == row["loss"]]
        for key, values in {"miou": [r["metrics"]["miou"] for r in records], "macc": [r["metrics"]["macc"] for r in records],
                            "boundary_iou": [r["boundary"]["miou"] for r in records]}.items():
            assert row[key]["n"] == 3
            np.testing.assert_allclose([row[key]["mean"], row[key]["sd"]], [np.mean(values), np.std(values, ddof=1)], atol=1e-12)
        iou = np.array([r["metrics"]["iou"] for r in records], float)
        np.testing.assert_allclose(list(row["iou"].values()), iou.mean(0))
        c = np.array(records[0]["counts"], float)  # rows target: the IoU of the record is that of its own counts
        np.testing.assert_allclose(iou[0], np.diag(c) / (c.sum(0) + c.sum(1) - np.diag(c)))
        best = row["miou"]
        assert f"| `{row['loss']}` | {100 * best['mean']:.1f} ± {100 * best['sd']:.1f} |" in (out / "comparison.md").read_text()
        assert f"{100 * best['mean']:.2f} ± {100 * best['sd']:.2f}" in (out / "report.html").read_text()
    assert read_comparison(out) == result and markdown_table(result) in capfd.readouterr().out
    assert len({r["config_hash"] for r in result["runs"]}) == 6


def test_equal_seeds_see_equal_images(config, no_page, monkeypatch):
    seen, real = {}, Trainer.train_step

    def step(self, batches):
        key = self.cfg.loss.name, self.cfg.seed
        seen.setdefault(key, []).extend((x.sum().item(), tuple(i.tolist())) for x, _, i in batches)
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    assert main(arguments(config, "cross_entropy,dice", "--seeds", "0,1", "--train.epochs", 1)) == 0
    assert list(seen) == [("cross_entropy", 0), ("dice", 0), ("cross_entropy", 1), ("dice", 1)]  # by seed, then by loss
    assert seen["cross_entropy", 0] == seen["dice", 0] != seen["cross_entropy", 1] == seen["dice", 1]


# --- interrupted, killed, shared -------------------------------------------------------------------------------------------------

def test_interrupted_and_asked_again(config, no_page, monkeypatch, capfd):
    assert main(arguments(config, "cross_entropy,dice", out="whole")) == 0
    real, steps = Trainer.train_step, []

    def step(self, batches):
        steps.append((self.cfg.loss.name, self.step))
        if len(steps) == 14:  # in the second epoch of the second loss
            raise KeyboardInterrupt
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    assert main(arguments(config, "cross_entropy,dice")) == 130
    first = (config.parent / "out/cross_entropy/seed0/evaluation_val.json").stat().st_mtime_ns
    assert load_run(config.parent / "out/dice/seed0").summary["status"] == "running"
    assert main(arguments(config, "cross_entropy,dice")) == 0
    assert steps[14] == steps[13] == ("dice", 4)  # goes on where it stopped
    assert (config.parent / "out/cross_entropy/seed0/evaluation_val.json").stat().st_mtime_ns == first
    assert "cross_entropy, seed 0: recorded already" in capfd.readouterr().out
    assert counts(config.parent / "out") == counts(config.parent / "whole")


def test_two_processes_share_the_work_and_one_is_killed(config):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    brief = ["--train.epochs", "4", "--train.val_every", "4"]
    command = [sys.executable, "-m", "mlmsnet", *arguments(config, "cross_entropy,dice", "--seeds", "0,1", *brief)]
    pipes = dict(env=env, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = config.parent / "out"
    first, second = (subprocess.Popen(command, **pipes) for _ in range(2))
    try:
        until = time.time() + 120
        while not any(out.rglob("last.pt")) and time.time() < until:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        text = second.communicate(timeout=200)[0]
    finally:
        for p in (first, second):
            p.kill()
    assert second.returncode == 0, text
    assert len(counts(out)) == 4 and all(load_run(p.parent).finished for p in out.rglob("config.yaml"))
    done = first.communicate()[0].count("mIoU 0.") + text.count("mIoU 0.")
    assert done == 4, text  # every run was trained to its end by one of them, none by both
    alone = [*command[:3], *arguments(config, "cross_entropy", "--seeds", "1", *brief, out="alone")]  # with as many threads
    assert subprocess.run(alone, env=env, cwd=config.parent, stdout=subprocess.DEVNULL).returncode == 0
    assert counts(config.parent / "alone")["cross_entropy/seed1"] == counts(out)["cross_entropy/seed1"]


def test_failed_loss_is_kept_with_its_reason(config, capfd, monkeypatch):
    plugin = config.parent / "mine.py"
    plugin.write_text(PLUGIN)
    more = ["--plugin", plugin, "--train.epochs", 1]
    assert main(arguments(config, "sour,dice", *more)) == 0
    out = capfd.readouterr().out
    assert "failed: TrainingError: the loss became nan" in out and "| `sour` | – |" in out
    runs = {r["loss"]: r for r in read_comparison(config.parent / "out")["runs"]}
    assert runs["sour"]["status"] == "failed" and "nan in epoch 1, step 2" in runs["sour"]["reason"] and runs["dice"]["miou"] is not None
    assert "failed" in (config.parent / "out/report.html").read_text()
    monkeypatch.setattr("mlmsnet.comparing.report.write_report", lambda *a, **k: None)  # seen once
    assert main(arguments(config, "sour,dice", *more)) == 0
    assert "sour, seed 0: failed before (TrainingError: the loss became nan" in capfd.readouterr().out
    plugin.write_text(PLUGIN.replace("< 4", "< 99"))
    assert main(arguments(config, "sour,dice", *more, "--retry")) == 0
    assert all(r["status"] == "finished" for r in read_comparison(config.parent / "out")["runs"])


def test_nothing_but_failures(config, capfd):
    plugin = config.parent / "mine.py"
    plugin.write_text(PLUGIN.replace("< 4", "< 2"))
    refused(capfd, main(arguments(config, "sour", "--plugin", plugin)), "every run failed", "comparison.json")


# --- mistakes, all before anything is trained ------------------------------------------------------------------------------------

@pytest.mark.parametrize("losses, more, parts", [
    ("dice,cross_entropi", [], ["Did you mean cross_entropy"]),
    ("focal:gama=1", [], ["Did you mean gamma"]),
    ("focal:gamma=200000", [], ["focal", "must lie between"]),
    ("dice,dice", [], ["given twice"]),
    ("dice", ["--seeds", "0,zero"], ["--seeds '0,zero'", "for example 0,1,2"]),
    ("dice", ["--seeds", "0,0"], ["different whole numbers"]),
    ("dice", ["--seed", "1"], ["--seed is not for a comparison", "--seeds"]),
    ("dice", ["--loss.name", "focal"], ["use --losses"]),
    ("dice", ["--plugin", "nowhere.py"], ["nowhere.py: no such file"]),
    ("dice", ["--train.epoch", "3"], ["Did you mean", "train.epochs"]),
    ("dice", ["--images", "many"], ["--images 'many'"]),
    ("dice", ["--rarity", "0.5"], ["rarity is for scenes that are drawn here"]),
    ("cross_entropy:class_weight=[1,2]", [], ["class_weight has 2 numbers", f"{CLASSES} classes"]),
])
def test_refused(config, capfd, losses, more, parts):
    refused(capfd, main(arguments(config, losses, *more)), *parts)
    assert not list(config.parent.rglob("*.pt"))


def test_missing_or_other_settings(config, no_page, capfd):
    out = refused(capfd, main(["compare"]), "name the losses")
    assert "dice_ce" in out
    refused(capfd, main(arguments(config, "dice", "--data.root", "nowhere")), "nowhere")
    assert main(arguments(config, "dice", "--train.epochs", 1)) == 0
    capfd.readouterr()
    refused(capfd, main(arguments(config, "dice,ohem", "--train.epochs", 2)), "train.epochs: 1 → 2", "--out")
    assert main(arguments(config, "dice,ohem", "--train.epochs", 1)) == 0  # more losses may join


def test_minicity_is_drawn(tmp_path, no_page, capfd):
    tiny = ["--data.size", "[64,96]", "--augment.crop", "[64,64]", "--model.output_stride", "32", "--model.dilations", "[1,2]",
            "--train.epochs", "1", "--train.batch_size", "2", "--device", "cpu", "--quiet"]
    command = ["compare", "--losses", "dice", "--out", str(tmp_path / "out"), "--images", "4,2", "--rarity", "0.5", *tiny]
    assert main(command) == 0
    assert read_comparison(tmp_path / "out")["minicity"]["rarity"] == 0.5
    config = yaml.safe_load((tmp_path / "out/dice/seed0/config.yaml").read_text())
    assert config["data"]["root"] == str(tmp_path / "out/minicity") and config["data"]["size"] == [64, 96]
    assert "drawing 4 + 2 street scenes" in capfd.readouterr().out
