"""Inference against a plain loop over windows, evaluation against cityscapesScripts, memory, and what can go wrong with files."""
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from mlmsnet.core import DataError, rng_for
from mlmsnet.data.labels import CITYSCAPES, CITYSCAPES_LABELS, ID_TO_TRAINID
from mlmsnet.evaluation.cost import count_macs, count_params, latency, measure_cost
from mlmsnet.evaluation.evaluate import evaluate, evaluate_predictions
from mlmsnet.evaluation.inference import IMAGENET_MEAN, IMAGENET_STD, InferenceConfig, predict, predict_scores

ROOT = Path(__file__).resolve().parent.parent


class Net(torch.nn.Module):
    "A small network with random weights whose output depends on the place in the window"

    def __init__(self, num_classes=19):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 7, padding=3), torch.nn.BatchNorm2d(6), torch.nn.Tanh(),
                                              torch.nn.Conv2d(6, num_classes, 5, padding=2))
        self.num_classes = num_classes

    def forward(self, x):
        return {"out": 4 * self.layers(x)}


class Split(list):
    table = CITYSCAPES


def picture(seed, h, w):
    small = rng_for(seed).integers(0, 256, (max(h // 7, 1), max(w // 7, 1), 3)).astype(np.uint8)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


def loop(model, image, crop, stride, flip):
    "One window after the other, in float64, on an image that is at least as large as the window or padded with the mean"
    h, w, _ = image.shape
    top, left = max(crop[0] - h, 0) // 2, max(crop[1] - w, 0) // 2
    x = np.zeros((max(h, crop[0]), max(w, crop[1]), 3)) + np.array(IMAGENET_MEAN) * 255
    x[top:top + h, left:left + w] = image
    x = torch.tensor((x / 255 - IMAGENET_MEAN) / IMAGENET_STD, dtype=torch.float32).permute(2, 0, 1)[None]
    sums = torch.zeros(model.num_classes, *x.shape[-2:], dtype=torch.float64)
    count = torch.zeros(x.shape[-2:], dtype=torch.float64)
    steps = [math.ceil(c * stride) for c in crop]
    grid = [math.ceil((n - c) / s) + 1 for n, c, s in zip(x.shape[-2:], crop, steps)]
    for i in range(grid[0]):
        for j in range(grid[1]):
            y1, x1 = min(i * steps[0] + crop[0], x.shape[2]), min(j * steps[1] + crop[1], x.shape[3])
            y0, x0 = y1 - crop[0], x1 - crop[1]
            for mirrored in (False, True)[:1 + flip]:
                part = x[..., y0:y1, x0:x1]
                with torch.no_grad():
                    out = model(part.flip(-1) if mirrored else part)["out"].softmax(1)[0]
                sums[:, y0:y1, x0:x1] += out.flip(-1) if mirrored else out
                count[y0:y1, x0:x1] += 1
    return (sums / count)[:, top:top + h, left:left + w]


@pytest.mark.parametrize("hw", [(64, 97), (97, 64), (20, 90), (90, 20), (13, 11), (33, 33), (34, 33), (1, 50), (48, 48)])
@pytest.mark.parametrize("crop,stride,flip,batch", [((33, 33), 2 / 3, True, 4), ((25, 41), 0.3, False, 3), ((33, 33), 1.0, True, 1)])
def test_sliding_window_is_the_loop(hw, crop, stride, flip, batch):
    net, image = Net(7).eval(), picture(hw[0], *hw)
    cfg = InferenceConfig(mode="slide", crop=crop, stride=stride, flip=flip, batch=batch)
    expected = loop(net, image, crop, stride, flip)
    scores, classes = predict_scores(net, image, cfg), predict(net, image, cfg)
    assert scores.dtype == torch.float32 and classes.dtype == np.uint8 and classes.shape == hw
    assert (scores - expected).abs().max() < 1e-5
    best = expected.topk(2, 0)[0]
    sure = (best[0] - best[1] > 1e-4).numpy()
    assert (classes == expected.argmax(0).numpy())[sure].all()


def test_batches_and_strips_change_nothing():
    net, image = Net(), picture(0, 120, 170)
    maps = [predict(net, image, InferenceConfig(mode="slide", crop=(65, 65), flip=True, batch=b)) for b in (1, 2, 5, 50)]
    assert all((m == maps[0]).mean() > 0.9999 for m in maps)


def test_channels_last_and_bare_tensors_are_fine():
    net, image, cfg = Net(), picture(0, 60, 80), InferenceConfig(flip=True)
    nhwc = Net().to(memory_format=torch.channels_last)
    assert torch.allclose(predict_scores(nhwc, image, cfg), predict_scores(net, image, cfg), atol=1e-5)
    bare = torch.nn.Sequential(net.layers, torch.nn.Identity())
    assert predict(bare, image).shape == (60, 80)

    class Coarse(Net):  # output at half the size: brought to the input's
        def forward(self, x):
            return {"out": torch.nn.functional.avg_pool2d(super().forward(x)["out"], 2)}
    assert predict(Coarse(), image, InferenceConfig(mode="slide", crop=(40, 40))).shape == (60, 80)


def test_modes_weights_and_randomness_are_left_alone():
    net, image = Net().train(), picture(0, 40, 50)
    net.layers[1].eval()
    before, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    predict(net, image, InferenceConfig(mode="slide", crop=(30, 30)))
    count_macs(net, (32, 32)), latency(net, (32, 32), repeats=1, warmup=0)
    assert [m.training for m in net.layers] == [True, False, True, True] and net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()) and torch.equal(rng, torch.random.get_rng_state())


def test_a_model_that_fails_leaves_its_mode():
    class Broken(Net):
        def forward(self, x):
            raise RuntimeError("out of memory")
    net = Broken().train()
    with pytest.raises(RuntimeError):
        predict(net, picture(0, 40, 40))
    assert net.training


@pytest.mark.parametrize("hw", [(33, 45), (64, 50)])
def test_real_network_at_odd_sizes(hw):
    mlmsnet = pytest.importorskip("mlmsnet.networks.mlmsnet")
    net = mlmsnet.create_model("mlms_small", 19)
    for cfg in (InferenceConfig(flip=True), InferenceConfig(mode="slide", crop=(41, 41), batch=8)):
        assert predict(net, picture(0, *hw), cfg).shape == hw
    cost = measure_cost(net, (65, 65), repeats=1)
    assert cost.params == count_params(net) > 1e5 and cost.macs > 1e6 and cost.latency > 0
    json.dumps(cost.to_dict())


def write_official(root, seeds, hw):
    "Images, and label ids of all 34 kinds in the official layout of file names"
    split, files = Split(), []
    for seed in seeds:
        name = f"town_{seed:06d}_000019"
        ids = cv2.resize(rng_for(seed).choice(34, (9, 13)).astype(np.uint8), hw[::-1], interpolation=cv2.INTER_NEAREST)
        path = root / "gt" / f"{name}_gtFine_labelIds.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), ids)
        files.append(str(path))
        split.append(SimpleNamespace(image=picture(seed, *hw), mask=ID_TO_TRAINID[ids], name=name))
    return split, files


def test_every_class_agrees_with_cityscapesscripts(tmp_path):
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    split, truth = write_official(tmp_path, range(4), (90, 130))
    split[3].mask[:] = 255  # one image of nothing but void
    cv2.imwrite(truth[3], np.zeros((90, 130), np.uint8))
    ours = evaluate(Net(), split, save_dir=tmp_path / "out", label_ids=True, report=False)
    official.args.evalInstLevelScore, official.args.JSONOutput, official.args.quiet = False, False, True
    theirs = official.evaluateImgLists([str(tmp_path / "out" / "gray" / f"{s.name}.png") for s in split], truth, official.args)
    compared = 0
    for row in ours.per_class:
        score = theirs["classScores"][row["class"]]
        assert (row["iou"] is None) == math.isnan(score)
        assert row["iou"] is None or abs(row["iou"] - score) < 1e-6
        compared += row["iou"] is not None
    assert compared >= 15 and abs(ours.metrics.miou - theirs["averageScoreClasses"]) < 1e-6
    ids = {x.train_id: x.id for x in CITYSCAPES_LABELS if 0 <= x.train_id < 19}
    assert all(set(np.unique(cv2.imread(str(p), -1))) <= set(ids.values()) for p in (tmp_path / "out" / "gray").iterdir())


def test_random_maps_agree_with_cityscapesscripts(tmp_path):
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    split, truth = write_official(tmp_path, range(10, 13), (64, 64))
    predictions = []
    lookup = np.array([x.id for x in sorted((x for x in CITYSCAPES_LABELS if 0 <= x.train_id < 19), key=lambda x: x.train_id)], np.uint8)
    (tmp_path / "pred").mkdir()
    for i, s in enumerate(split):
        guess = rng_for(i).integers(0, 16, s.mask.shape)  # classes 16 to 18 are never predicted
        guess = np.where((rng_for(i, 1).random(s.mask.shape) < 0.7) & (s.mask < 19), s.mask, guess).astype(np.uint8)
        predictions.append(str(tmp_path / "pred" / f"{s.name}.png"))
        cv2.imwrite(predictions[-1], lookup[guess])
    ours = evaluate_predictions(tmp_path / "pred", split, label_ids=True, report=False)
    official.args.evalInstLevelScore, official.args.JSONOutput, official.args.quiet = False, False, True
    theirs = official.evaluateImgLists(predictions, truth, official.args)["classScores"]
    for row in ours.per_class:
        assert (row["iou"] is None and math.isnan(theirs[row["class"]])) or abs(row["iou"] - theirs[row["class"]]) < 1e-6


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, monkeypatch):
    split = Split(SimpleNamespace(image=picture(i, 40, 40), mask=None, name=f"a_{i}") for i in range(3))
    evaluate(Net(), split, save_dir=tmp_path, report=False)
    files = {p: p.read_bytes() for p in tmp_path.glob("color/*.png")}

    real = os.fsync
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        evaluate(Net(), split, save_dir=tmp_path, report=False)
    assert {p: p.read_bytes() for p in tmp_path.glob("color/*.png")} == files
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_broken_sample_is_named():
    class Files(Split):
        def __getitem__(self, i):
            if i == 1:
                raise DataError("b.png: is cut short")
            return super().__getitem__(i)
    split = Files(SimpleNamespace(image=picture(i, 20, 20), mask=None, name=f"a_{i}") for i in range(4))
    with pytest.raises(DataError, match="b.png"):
        evaluate(Net(), split, report=False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure the resident size")
def test_sliding_memory_is_below_a_third_of_the_float64_volume():
    command = [sys.executable, str(ROOT / "benchmarks" / "sliding.py"), "--peak", "ours"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < json.loads(out.stdout.splitlines()[-1]) < 8 * 19 * 1024 * 2048 / 3


def test_import_stays_light():
    code = ("import sys, mlmsnet.evaluation.evaluate, mlmsnet.evaluation.cost, mlmsnet.training.metrics; "
            "print([m for m in ('matplotlib', 'yaml', 'IPython', 'jsonargparse', 'scipy') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"
