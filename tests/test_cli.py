"""Every mistake that a user can make costs one line that names the thing and the mend, exit code 2, and nothing that was written before."""
import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from _tiny import CLASSES, SIZE, draw, settings, write_config, write_data, write_pair

from mlmsnet.cli import _load, main
from mlmsnet.core import load_checkpoint

ONE_EPOCH = ["--train.epochs", "1"]
VOID = np.full(SIZE, 255, np.uint8)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


@pytest.fixture
def root(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A finished run; tests do not write into it"
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder / "config.yaml", write_data(folder / "data"))
    assert main(["train", str(config), "--run", str(folder / "run"), "--quiet", *ONE_EPOCH]) == 0
    return folder / "run"


def train(root, *flags, run=None, **sections):
    "`mlmsnet train` on the data in `root`; the exit code"
    config = write_config(root.parent / "config.yaml", root, **sections)
    return main(["train", str(config), "--run", str(run or root.parent / "run"), "--quiet", *map(str, flags)])


def the_line(capfd, code) -> str:
    "The one line on stderr of a command that failed; nothing else may be there"
    err = capfd.readouterr().err
    assert code == 2 and err.endswith("\n") and err.count("\n") == 1 and err.startswith("mlmsnet: error: "), (code, err)
    return err


def refused(capfd, code, *says):
    line = the_line(capfd, code)
    for part in says:
        assert str(part) in line, line


def png(mask) -> bytes:
    return cv2.imencode(".png", mask)[1].tobytes()


# --- data ------------------------------------------------------------------------------------------------------------------------

def test_missing_root(root, capfd):
    refused(capfd, train(root, "--data.root", root / "nowhere"), root / "nowhere", "no such folder; give")
    for name in ("cityscapes", "camvid", "minicity"):
        config = root.parent / "c.yaml"
        config.write_text(yaml.safe_dump({"data": {"name": name, "root": str(root / "nowhere")}}))
        refused(capfd, main(["train", str(config), "--run", str(root / "r")]), root / "nowhere", f"mlmsnet data prepare {name}")


def test_empty_list(root, capfd):
    (root / "train.txt").write_text("# nothing yet\n\n")
    refused(capfd, train(root), root / "train.txt", "the list is empty; write")


def test_image_without_label(root, capfd):
    (root / "labels/train3.png").unlink()
    refused(capfd, train(root), root / "labels/train3.png", "is missing", "restore it or take the sample out of the list")
    with open(root / "train.txt", "a") as f:
        f.write("images/val100.png\n")
    refused(capfd, train(root), "train.txt, line 7", "val100.png has no label", "add it or drop the line")


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_without_labels(root, capfd, split):
    (root / f"{split}.txt").write_text("images/train0.png\nimages/train1.png\n")
    refused(capfd, train(root), f"'{split}.txt' has no labels", "choose another", f"--data.{split}")


def test_label_of_another_size(root, capfd):
    (root / "labels/train3.png").write_bytes(png(VOID[:40]))
    refused(capfd, train(root, *ONE_EPOCH), root / "labels/train3.png", "64x40", "64x48", "resize it with nearest")


def test_label_value_33(root, capfd):
    (root / "labels/train3.png").write_bytes(png(np.full(SIZE, 33, np.uint8)))
    refused(capfd, train(root, *ONE_EPOCH), root / "labels/train3.png", "label value 33", f"classes are 0..{CLASSES - 1} and void is 255")


@pytest.mark.parametrize("file", ["images/train3.png", "labels/train3.png", "images/train3.jpg"])
def test_truncated(root, capfd, file):
    if file.endswith("jpg"):
        write_pair(root, "train3", *draw(3), ending="jpg")
        (root / "train.txt").write_text((root / "train.txt").read_text().replace("images/train3.png", file))
    data = (root / file).read_bytes()
    (root / file).write_bytes(data[:len(data) // 2])
    refused(capfd, train(root, *ONE_EPOCH), root / file, "is cut short", "copy it again")


def test_broken_image_in_evaluation_and_prediction(trained, root, capfd):
    data = (root / "images/val100.png").read_bytes()
    (root / "images/val100.png").write_bytes(data[:len(data) // 2])
    refused(capfd, main(["evaluate", str(trained), "--data.root", str(root), "--quiet"]), root / "images/val100.png", "cut short")
    command = ["predict", str(trained), str(root / "images"), "--out", str(root / "out")]
    refused(capfd, main(command), root / "images/val100.png", "cut short")
    refused(capfd, main(["predict", str(trained), str(root / "nowhere.png")]), root / "nowhere.png", "no such image")


@pytest.mark.parametrize("line", ["../x.png labels/train0.png", "/etc/hostname labels/train0.png", "images/train0.png images/../../x.png"])
def test_path_that_leaves_the_root(root, capfd, line):
    with open(root / "train.txt", "a") as f:
        f.write(line + "\n")
    refused(capfd, train(root), "train.txt, line 7", "leaves the root", "must stay below it")


# --- settings --------------------------------------------------------------------------------------------------------------------

def test_unknown_key(root, capfd):
    refused(capfd, train(root, train={"weigth_decay": 0.1}), "config.yaml", "'train.weigth_decay'", "Did you mean train.weight_decay")
    refused(capfd, train(root, trian={"lr": 0.1}), "'trian'", "Did you mean train")
    refused(capfd, train(root, "--train.epohcs", 1), "'train.epohcs'", "Did you mean train.epochs")
    refused(capfd, train(root, "--epochs", 1), "--epochs", "Did you mean --train.epochs?")


@pytest.mark.parametrize("section,key,value", [("train", "epochs", "many"), ("train", "epochs", 2.5), ("train", "lr", "fast"),
                                               ("augment", "crop", 100), ("train", "optimizer", "adam"), ("eval", "flip", "perhaps")])
def test_wrong_type(root, capfd, section, key, value):
    refused(capfd, train(root, **{section: {key: value}}), "config.yaml", f"{section}.{key}", value, "expected")
    refused(capfd, train(root, f"--{section}.{key}", value), f"{section}.{key}", value, "expected")


def test_wrong_value(root, capfd):
    refused(capfd, train(root, "--train.epochs", 0), "epochs is 0; it must be at least 1")
    refused(capfd, train(root, "--model.name", "mlms_x"), "unknown model 'mlms_x'. Did you mean mlms_s", "baseline")
    refused(capfd, train(root, "--loss.name", "ohme"), "unknown loss 'ohme'. Did you mean ohem?")
    refused(capfd, train(root, "--data.name", "kitti"), "unknown data set 'kitti'", "cityscapes")
    refused(capfd, train(root, "--data.num_classes", "null"), "--data.num_classes")
    refused(capfd, train(root, "--train.batch_size", 7), "batch size 7", "6", "lower the batch size")
    refused(capfd, main(["train", "camvid_ohem_smal"]), "Did you mean camvid_ohem_small")


def test_unreadable_config(root, capfd):
    bad = root / "bad.yaml"
    for content, says in ((b"data: [1,\n a: 2", "not valid YAML (line 2)"), (b"- 1\n", "expected sections"),
                          (b"\x00\xff\xfe", "not a text file"), (b"data: minicity\n", "data is a section")):
        bad.write_bytes(content)
        refused(capfd, main(["train", str(bad)]), bad, says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(root, capfd):
    refused(capfd, train(root, "--device", "cuda"), "'cuda' was asked for", "0 CUDA GPUs", "use --device cpu")


# --- checkpoints -----------------------------------------------------------------------------------------------------------------

def test_checkpoint_of_another_network(trained, root, capfd, tmp_path):
    other = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), other)
    refused(capfd, train(root, "--model.init", other), other, "another network", "missing", "not in this network: weight, bias")
    refused(capfd, train(root, "--model.weights", other), other, "not MobileNetV3 weights")
    refused(capfd, main(["evaluate", str(other), "--config", str(root.parent / "config.yaml")]), other, "another network")
    refused(capfd, main(["evaluate", str(other)]), other, "no settings inside", "--config")
    flags = ["--model.init", trained / "best.pt", "--model.name", "mlms_small", "--model.backbone", "null"]
    refused(capfd, train(root, *flags), "another network")


def test_checkpoint_with_a_pickled_object(trained, root, capfd, tmp_path):
    bad = tmp_path / "pickled.pt"
    torch.save({"model": torch.nn.Linear(2, 2)}, bad)
    for code in (train(root, "--model.init", bad), main(["evaluate", str(bad)]),
                 main(["evaluate", str(bad), "--config", str(root.parent / "config.yaml")])):
        assert code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(str(bad) in x and "pickled object" in x and "state_dict" in x for x in lines), lines


def test_damaged_checkpoint_of_a_run(trained, capfd, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = trained.parent / "config.yaml"
    (run / "config.yaml").write_text((trained / "config.yaml").read_text())
    data = (trained / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(data[:len(data) // 2])
    code = main(["train", str(config), "--run", str(run), "--quiet", *ONE_EPOCH])
    refused(capfd, code, run / "last.pt", "not a readable checkpoint", "--overwrite")
    assert (run / "last.pt").stat().st_size == len(data) // 2


# --- the run's folder ------------------------------------------------------------------------------------------------------------

def test_two_processes_in_one_folder(root, capfd, tmp_path):
    from mlmsnet.training.config import parse_config
    from mlmsnet.training.records import RunFolder
    with RunFolder(tmp_path / "run", parse_config(settings(root))):
        other = shell("train", write_config(tmp_path / "c.yaml", root), "--run", tmp_path / "run", cwd=tmp_path)
    assert other.returncode == 2 and other.stderr.count("\n") == 1, other.stderr
    assert "another process is writing this run" in other.stderr and "--run" in other.stderr


def test_folder_with_other_settings(trained, capfd):
    before = {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()}
    code = main(["train", str(trained.parent / "config.yaml"), "--run", str(trained), "--quiet"])
    refused(capfd, code, trained, "other settings", "train.epochs: 1 → 3", "--overwrite")
    assert before == {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()}


def test_run_is_a_file(root, capfd):
    refused(capfd, train(root, run=root / "train.txt"), root / "train.txt", "is a file", "--run")


def test_no_such_run(capfd, tmp_path):
    for command in (["evaluate", "nowhere"], ["predict", "nowhere", __file__], ["report", str(tmp_path)]):
        refused(capfd, main(command), "a run is a folder that `mlmsnet train` wrote")


def test_settings_that_a_run_has_fixed(trained, capfd):
    refused(capfd, main(["evaluate", str(trained), "--model.wide", "true"]), "--model.wide was fixed", "--eval.*")
    refused(capfd, main(["evaluate", str(trained), "--eval.flop", "true"]), "Did you mean eval.flip")


# --- while training --------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def no_more_space(limit=100_000):
    "No file of this process may grow beyond `limit` bytes: a write fails with an error of the system, as on a full disk"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def after_epoch(monkeypatch, epoch, do):
    from mlmsnet.training import loop
    real = loop._report
    def report(row, *args):
        real(row, *args)
        if row["epoch"] == epoch:
            do()
    monkeypatch.setattr(loop, "_report", report)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = write_data(tmp_path_factory.mktemp("undisturbed") / "data")
    assert train(root) == 0
    return root.parent / "run"


def finishes_like(undisturbed, run, root):
    "The run goes on, and ends with the weights of one that nothing happened to"
    assert train(root, run=run) == 0
    a, b = (load_checkpoint(r / "last.pt") for r in (run, undisturbed))
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in b[part])
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_disk_full_while_saving(undisturbed, root, capfd, tmp_path, monkeypatch):
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        after_epoch(patch, 1, lambda: stack.enter_context(no_more_space()))
        code = train(root, run=tmp_path / "run")
    refused(capfd, code, "could not be saved (File too large)", "unharmed", "it resumes")
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1 and not list((tmp_path / "run").glob(".*.tmp"))
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"
    finishes_like(undisturbed, tmp_path / "run", root)


def test_disk_full_to_the_last_byte(root, capfd, tmp_path, monkeypatch):
    from mlmsnet import core
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        after_epoch(patch, 1, lambda: patch.setattr(core.os, "fsync", full))
        code = train(root, run=tmp_path / "run")
        refused(capfd, code, "No space left on device", "unharmed")
        refused(capfd, train(root, run=tmp_path / "run"), "No space left on device", "config.yaml", "unharmed")  # still full
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1 and not list((tmp_path / "run").glob(".*.tmp"))
    assert train(root, run=tmp_path / "run") == 0


def test_loss_that_is_not_finite(undisturbed, root, capfd, tmp_path, monkeypatch):
    from mlmsnet.losses.contract import SegLoss
    real = SegLoss.forward
    def forward(self, logits, target):
        return real(self, logits, target) * float("nan")
    with monkeypatch.context() as patch:
        after_epoch(patch, 1, lambda: patch.setattr(SegLoss, "forward", forward))
        code = train(root, run=tmp_path / "run")
    line = the_line(capfd, code)
    for part in ("the loss became nan in epoch 2, step 3", "images train", "mlmsnet data verify", "--train.lr"):
        assert part in line
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["model"].values())
    finishes_like(undisturbed, tmp_path / "run", root)


def test_gradient_that_is_not_finite(root, capfd, tmp_path, monkeypatch):
    from mlmsnet.losses.contract import SegLoss
    real = SegLoss.forward

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    monkeypatch.setattr(SegLoss, "forward", lambda self, logits, target: Spoil.apply(real(self, logits, target)))
    refused(capfd, train(root, run=tmp_path / "run"), "the gradients became nan in epoch 1, step 0", "images train")


# --- what looks like a mistake, and works ----------------------------------------------------------------------------------------

def test_crop_larger_than_the_image(root, trained, capfd):
    assert train(root, *ONE_EPOCH, "--augment.crop", "[80,100]") == 0
    assert main(["evaluate", str(trained), "--eval.mode", "slide", "--eval.crop", "[100,120]", "--eval.flip", "true", "--record",
                 str(root / "e.json")]) == 0
    assert "Eval result: mIoU/mAcc/allAcc 0." in capfd.readouterr().out


@pytest.mark.parametrize("loss", ["cross_entropy", "ohem", "dice_ce", "focal"])
def test_void_images(root, capfd, loss):
    for name in ("train1", "train4"):
        (root / f"labels/{name}.png").write_bytes(png(VOID))
    (root / "labels/val100.png").write_bytes(png(VOID))
    run = root.parent / "run"
    assert train(root, *ONE_EPOCH, "--train.batch_size", 1, loss={"name": loss}) == 0  # some batches are void and nothing else
    assert main(["evaluate", str(run), "--quiet"]) == 0
    for file in ("metrics.jsonl", "summary.json", "evaluation_val.json"):
        assert "NaN" not in (run / file).read_text()
    state = load_checkpoint(run / "last.pt")
    assert all(torch.isfinite(v).all() for part in ("model", "ema") for v in state[part].values())


def test_nothing_but_void(root, capfd):
    for label in (root / "labels").glob("*.png"):
        label.write_bytes(png(VOID))
    assert train(root, *ONE_EPOCH) == 0 and main(["evaluate", str(root.parent / "run")]) == 0
    assert "Eval result: mIoU/mAcc/allAcc 0.0000/0.0000/0.0000." in capfd.readouterr().out
    assert "NaN" not in (root.parent / "run/metrics.jsonl").read_text()


# --- the way through, in real processes ------------------------------------------------------------------------------------------

def shell(*args, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "mlmsnet", *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=180)


def test_real_process_refuses_in_one_line(root, tmp_path):
    (root / "labels/train3.png").write_bytes(png(np.full(SIZE, 33, np.uint8)))
    done = shell("train", write_config(tmp_path / "c.yaml", root), "--run", tmp_path / "run", "--quiet", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "label value 33" in done.stderr, done.stderr


ORIGINAL = """
DATA: {{data_root: {root}, train_list: {root}/train.txt, val_list: {root}/val.txt, classes: 19}}
TRAIN:
  {{arch: mlms, mode: small, width_mult: 1.0, large: False, loss: ohem, train_h: 57, train_w: 57, use_msf: True, use_mlf: True,
   scale_min: 0.5, scale_max: 2.0, rotate_min: -10, rotate_max: 10, zoom_factor: 8, ignore_label: 255, aux_weight: 0, train_gpu: [0, 1],
   workers: 0, batch_size: 2, batch_size_val: 1, base_lr: 0.01, epochs: 1, start_epoch: 0, power: 0.9, momentum: 0.9,
   weight_decay: 0.0001, manual_seed: , print_freq: 10, save_freq: 1, save_path: exp/model, weight: , resume: , evaluate: True}}
Distributed: {{dist_url: "tcp://127.0.0.1:6789", dist_backend: nccl, multiprocessing_distributed: True, world_size: 1, rank: 0}}
TEST:
  {{test_list: {root}/val.txt, split: val, base_size: 64, test_h: 57, test_w: 57, scales: [1.0], has_prediction: False, index_start: 0,
   index_step: 0, test_gpu: [0], model_path: exp/model.pth, save_folder: exp/result, colors_path: data/colors.txt,
   names_path: data/names.txt}}
"""


def by_the_rule(keys, prefix) -> dict:
    "The golden cases' weights, from the names of the keys"
    state = {}
    for name, shape in keys:
        x = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
        if name.endswith("running_var"):
            x = 1 + 0.1 * abs(x)
        elif len(shape) < 2:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
        else:
            x = x * np.sqrt(1.5 / np.prod(shape[1:]))
        state[prefix + name] = torch.tensor(0) if name.endswith("num_batches_tracked") else torch.tensor(x, dtype=torch.float32)
    return state


def test_original_config_and_checkpoint(shared, root, capfd, tmp_path):
    from mlmsnet.evaluation.evaluate import evaluate
    from mlmsnet.networks.weights import from_original_config, load_original
    from mlmsnet.training.config import parse_config
    from mlmsnet.training.loop import build_dataset
    config = tmp_path / "original.yaml"
    config.write_text(ORIGINAL.format(root=root))
    keys = json.loads((shared / "golden/cases.json").read_text())["mlms_small_headS"]["keys"]
    for prefix in ("", "module."):
        torch.save({"epoch": 200, "state_dict": by_the_rule(keys, prefix)}, tmp_path / f"{prefix}pth")
        files = str(tmp_path / f"{prefix}pth"), "--config", str(config), "--record", str(tmp_path / f"{prefix}json")
        assert main(["evaluate", *files, "--quiet"]) == 0
    records = [json.loads((tmp_path / f).read_text()) for f in ("json", "module.json")]
    net = load_original(from_original_config({**yaml.safe_load(config.read_text())["TRAIN"], "classes": 19}), tmp_path / "pth").eval()
    cfg = parse_config(config)
    counts = evaluate(net, build_dataset(cfg, cfg.data.test), cfg.eval, progress=False).counts
    assert counts == records[0]["counts"] == records[1]["counts"]
    x = torch.randn(1, 3, 97, 129, generator=torch.Generator().manual_seed(0))
    own, _ = _load(Namespace(run=str(tmp_path / "module.pth"), config=str(config)), [])
    with torch.no_grad():
        assert torch.equal(own(x)["out"], net(x)["out"])
    assert main(["train", str(config), "--run", str(tmp_path / "run"), "--quiet", "--model.init", str(tmp_path / "pth")]) == 0
    config.write_text(ORIGINAL.format(root=root).replace("base_lr: 0.01", "base_lrr: 0.01"))
    refused(capfd, main(["train", str(config)]), config, "'base_lrr'", "Did you mean base_lr")
    config.write_text(ORIGINAL.format(root=root).replace("base_lr: 0.01, ", ""))
    refused(capfd, main(["train", str(config)]), config, "base_lr")
    config.write_text(ORIGINAL.format(root=root).replace("rotate_max: 10", "rotate_max: ten"))
    refused(capfd, main(["train", str(config)]), config, "rotate_max", "'ten'")


def test_evaluate_predict_report(trained, capfd, tmp_path):
    data = Path(yaml.safe_load((trained / "config.yaml").read_text())["data"]["root"])
    assert main(["evaluate", str(trained), "--save", str(tmp_path / "saved"), "--record", str(tmp_path / "e.json")]) == 0
    assert "Eval result: mIoU/mAcc/allAcc 0." in capfd.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["images"] == 2
    assert main(["predict", str(trained), str(data / "images/val100.png"), "--out", str(tmp_path / "out")]) == 0
    labels = cv2.imread(str(tmp_path / "out/labels/val100.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == SIZE and labels.max() < CLASSES
    assert (labels == cv2.imread(str(tmp_path / "saved/gray/val100.png"), cv2.IMREAD_UNCHANGED)).all()  # predict and evaluate agree
    assert main(["report", str(trained), "--out", str(tmp_path / "report.html")]) == 0
    assert "<html" in (tmp_path / "report.html").read_text()


# --- what two first users stumbled over ------------------------------------------------------------------------------------------

NETWORK = """
from __future__ import annotations
from dataclasses import dataclass
from mlmsnet.networks.mlmsnet import MLMSNet, MLMSOptions, on_backbone, register_model

@dataclass(frozen=True)
class Options(MLMSOptions):
    msf: bool = False

register_model("my_net", Options(), on_backbone(MLMSNet))
"""


def test_network_of_ones_own(root, capfd, tmp_path):
    """A plugin may hold a network alone, and train and evaluate take it; without it the error says how."""
    from mlmsnet.networks.mlmsnet import MODELS
    plugin = tmp_path / "my_net.py"
    plugin.write_text(NETWORK)
    flags = [*ONE_EPOCH, "--model.name", "my_net"]
    refused(capfd, train(root, *flags), "unknown model 'my_net'", "--plugin FILE.py")
    try:
        assert train(root, *flags, "--plugin", plugin) == 0
        MODELS.pop("my_net")
        run = str(root.parent / "run")
        capfd.readouterr()
        refused(capfd, main(["evaluate", run, "--quiet"]), "my_net", "--plugin FILE.py")
        assert main(["evaluate", run, "--quiet", "--plugin", str(plugin)]) == 0
    finally:
        MODELS.pop("my_net", None)


def test_whole_numbers_are_numbers(root, tmp_path):
    """1 and 1.0 are one setting: a config made in Python goes on where one from YAML stopped, to which no other setting was given."""
    from dataclasses import replace

    from mlmsnet.training.config import config_hash, parse_config
    cfg = parse_config(write_config(tmp_path / "config.yaml", root))
    as_int = replace(cfg, augment=replace(cfg.augment, scale_min=1, scale_max=2), train=replace(cfg.train, weight_decay=0))
    as_float = replace(cfg, augment=replace(cfg.augment, scale_min=1.0, scale_max=2.0), train=replace(cfg.train, weight_decay=0.0))
    assert config_hash(as_int) == config_hash(as_float) != config_hash(cfg)


def test_refused_folder_is_free_again(root, tmp_path):
    """A notebook keeps the last error, and with it all that its frames hold: the folder must not stay locked."""
    from mlmsnet.core import ConfigError
    from mlmsnet.training.config import parse_config
    from mlmsnet.training.records import RunFolder
    cfg = parse_config(write_config(tmp_path / "config.yaml", root))
    RunFolder(tmp_path / "run", cfg).close()
    other = parse_config(tmp_path / "config.yaml", ["--train.lr", "0.5"])
    with pytest.raises(ConfigError, match="holds a run with other settings.*overwrite=True") as kept:
        RunFolder(tmp_path / "run", other)
    with RunFolder(tmp_path / "run", other, overwrite=True):
        assert kept.value.__traceback__ is not None


def test_several_numbers_need_brackets(root, capfd):
    refused(capfd, train(root, "--augment.crop", "144,192"), "--augment.crop [144,192]")


def test_a_run_says_what_it_is(root, capfd, tmp_path):
    """One line: the network, its start, the images, and where it goes on."""
    config = write_config(tmp_path / "config.yaml", root)
    assert main(["train", str(config), "--run", str(tmp_path / "run"), *ONE_EPOCH]) == 0
    out = capfd.readouterr().out
    assert "from scratch" in out and "images to learn from" in out and "M parameters, cpu" in out


def test_dry_run_tells_what_would_not_start(root, capfd, tmp_path):
    config = write_config(tmp_path / "config.yaml", root)
    sweep = tmp_path / "sweep.yaml"
    for common, says in (("{data.root: nowhere}", "nowhere"), ("{model.name: my_net}", "unknown model 'my_net'")):
        sweep.write_text(f"base: {config}\nsettings: {common}\ngrid: {{train.lr: [0.1, 0.2]}}\nseeds: [0]\n")
        assert main(["compare", str(sweep), "--dry-run", "--out", str(tmp_path / "out")]) == 2
        said = capfd.readouterr()
        assert says in said.err and "0.1" in said.out, said
