"""Images kept on the device, and numbers that come from it one step late; on a CPU, where both must hold as on a GPU."""
import json
import math

import numpy as np
import pytest
import torch

from mlmsnet.core import ConfigError, DataError, load_checkpoint
from mlmsnet.data import device
from mlmsnet.data.datasets import Sample, create_dataset
from mlmsnet.data.device import DeviceLoader, DevicePixels, blur5, device_batches, source_grid, warp_batch
from mlmsnet.data.loaders import EpochBatches, train_loader
from mlmsnet.data.minicity import MiniCityConfig, write_minicity
from mlmsnet.data.transforms import AugmentConfig, Draw, TrainTransform, crop_matrix
from mlmsnet.training import loop
from mlmsnet.training.config import parse_config
from mlmsnet.training.loop import Trainer, TrainingError, fit


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("device") / "city"
    write_minicity(root, train=10, val=5, cfg=MiniCityConfig(height=64, width=96), progress=False)
    return root


@pytest.fixture(scope="module")
def streets(root):
    return create_dataset("minicity", root, "train")


def config(root, *more):
    return parse_config("minicity_demo", ["--data.root", str(root), "--augment.crop", "[48,64]", "--train.epochs", "3",
                                          "--train.batch_size", "4", "--model.backbone", "mobilenetv3_small",
                                          "--train.ema", "0.9", "--device", "cpu", *more])


class Pictures:
    """A data set made of arrays."""
    has_labels = True

    def __init__(self, *pairs):
        self.pairs, self.names = pairs, [str(i) for i in range(len(pairs))]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return Sample(*self.pairs[i], self.names[i])


def some(n=4, h=20, w=31, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, (h, w, 3), np.uint8), rng.integers(0, 5, (h, w), np.uint8)) for _ in range(n)]


DRAWS = {  # no scale that puts a place exactly between two pixels: there the two may choose differently
    "nothing": Draw(top=.5, left=.5),
    "larger": Draw(scale=1.7, top=.2, left=.9), "smaller": Draw(scale=.63), "flip": Draw(flip=True, left=.3),
    "turn": Draw(angle=9.3, scale=1.1), "blur": Draw(blur=True, scale=1.31, top=1., left=1.),
    "all": Draw(1.37, -7.7, True, True, .4, .8, (.8, 1.3, .6, -9.)),
    "colour": Draw(color=(1.4, .7, 1.3, 12.))}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("crop", [(12, 17), (33, 25)], ids=str)
def test_agrees_with_opencv(name, crop, streets):
    """For each kind of draw alone, on a real picture, with crops smaller and larger than the image."""
    data = Pictures(*[(s.image[:28, :40], s.mask[:28, :40]) for s in (streets[0], streets[1])])
    cfg = AugmentConfig(crop=crop, photometric=1.0)
    x, y = DeviceLoader(DevicePixels(data, "cpu"), cfg, EpochBatches(2, 2)).make(torch.tensor([0, 1]), [DRAWS[name]] * 2)
    reference = TrainTransform(cfg)
    for i in range(2):
        image, mask = reference.pixels(data[i], DRAWS[name])
        ours = (x[i] * torch.tensor(cfg.std).view(3, 1, 1) + torch.tensor(cfg.mean).view(3, 1, 1)) * 255
        apart = (ours.permute(1, 2, 0) - torch.from_numpy(image).float()).abs()
        assert apart.max() < 6 and apart.mean() < 0.8, (apart.max(), apart.mean())  # OpenCV rounds to bytes, once to three times
        assert (y[i].numpy() == mask).mean() > 0.99
        assert ((y[i] == 255).numpy() == (mask == 255)).mean() > 0.99


def test_identity_is_exact():
    pairs = some()
    loader = DeviceLoader(DevicePixels(Pictures(*pairs), "cpu"), AugmentConfig(crop=(20, 31)), EpochBatches(4, 4))
    x, y = loader.make(torch.arange(4), [Draw()] * 4)
    back = (x * torch.tensor(AugmentConfig().std).view(3, 1, 1) + torch.tensor(AugmentConfig().mean).view(3, 1, 1)) * 255
    for i, (image, mask) in enumerate(pairs):
        np.testing.assert_allclose(back[i].permute(1, 2, 0).numpy(), image, atol=0.02)
        assert (y[i].numpy() == mask).all()


def test_grid_against_a_loop():
    """Each place of the grid, taken back to pixels, is the matrix times (x, y, 1)."""
    m = torch.tensor(np.stack([crop_matrix((20, 31), (5, 7), d) for d in DRAWS.values()]))
    grid = source_grid(m, (20, 31), (5, 7), rim=2)
    for n in range(len(m)):
        for i in range(9):
            for j in range(11):
                place = m[n].numpy() @ [j - 2, i - 2, 1]
                found = (grid[n, i, j].numpy() + 1) / 2 * [31, 20] - 0.5
                np.testing.assert_allclose(found, place, atol=1e-9)


def test_blur_is_the_binomial():
    x = torch.zeros(1, 2, 9, 9)
    x[0, 1, 4, 4] = 256.0
    row = torch.tensor([1.0, 4, 6, 4, 1])
    out = blur5(x)
    assert torch.equal(out[0, 1], torch.outer(row, row)) and not out[0, 0].any()


def test_only_the_blurred_are_blurred(streets):
    data = Pictures(*[(streets[i].image, streets[i].mask) for i in range(3)])
    m = torch.from_numpy(np.stack([crop_matrix((64, 96), (40, 50), DRAWS["larger"])] * 3)).float()
    pixels = DevicePixels(data, "cpu")
    sharp, _ = warp_batch(pixels.images, pixels.masks, m, (40, 50))
    mixed, labels = warp_batch(pixels.images, pixels.masks, m, (40, 50), [False, True, False])
    assert torch.allclose(mixed[[0, 2]], sharp[[0, 2]], atol=1e-3) and (mixed[1] - sharp[1]).abs().mean() > 0.5
    assert torch.equal(labels, warp_batch(pixels.images, pixels.masks, m, (40, 50))[1])


def test_batches_are_those_of_the_other_loader(streets):
    """The same images in the same order with the same draws; an epoch can start anywhere; processes share it."""
    cfg = AugmentConfig(crop=(40, 56), photometric=0.4)
    pixels = DevicePixels(streets, "cpu")
    for epoch in (0, 5):
        ours, theirs = DeviceLoader(pixels, cfg, EpochBatches(10, 3, seed=2)), train_loader(streets, TrainTransform(cfg), 3, seed=2)
        for loader in (ours, theirs):
            loader.set_epoch(epoch, start_batch=1)
        pairs = list(zip(ours, theirs, strict=True))
        assert len(pairs) == 2 and len(ours) == len(theirs) == 3
        for (x, y, i), (x0, y0, i0) in pairs:
            assert torch.equal(i, i0) and (x - x0).abs().mean() < 0.02 and (y == y0).float().mean() > 0.995
            assert ours.names(i) == theirs.names(i0)
    loaders = [DeviceLoader(pixels, cfg, EpochBatches(10, 2, rank=r, world=2)) for r in range(2)]
    shares = [[i for *_, index in loader for i in index.tolist()] for loader in loaders]
    assert len(set(shares[0] + shares[1])) == 8 and not set(shares[0]) & set(shares[1])


def test_whole_images_once_over_all_processes(streets):
    pixels = DevicePixels(streets, "cpu")
    seen = [i for r in range(3) for *_, index in device_batches(pixels, (.5,) * 3, (.2,) * 3, 2, r, 3) for i in index.tolist()]
    assert sorted(seen) == list(range(10))


def test_images_that_do_not_fit(streets, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")
    monkeypatch.setattr(device.torch, "empty", full)
    with pytest.raises(ConfigError, match="10 images of 96x64 need 0.0 GB on cpu.*--data.size, or --data.cache ram"):
        DevicePixels(streets, "cpu")


def test_images_of_two_sizes():
    with pytest.raises(DataError, match="1: 31x21 pixels, but the first image has 31x20.*--data.size"):
        DevicePixels(Pictures(*some(1), *some(1, h=21)), "cpu")


def test_no_labels(root):
    data = Pictures(*[(image, None) for image, _ in some()])
    pixels = DevicePixels(data, "cpu")
    assert (pixels.masks == 255).all()
    data.has_labels, data.root = False, root
    with pytest.raises(DataError, match="no labels"):
        DeviceLoader(pixels, AugmentConfig(), EpochBatches(4, 2))


def test_training_learns_the_same_and_resumes_to_the_bit(root, tmp_path, monkeypatch):
    """A run with `cache: device` follows the one with loaders closely, scores whole images alike, and goes on after a cut."""
    plain = fit(config(root), tmp_path / "plain", progress=False)
    whole = fit(config(root, "--data.cache", "device"), tmp_path / "whole", progress=False)
    for a, b in zip(plain.history, whole.history, strict=True):
        assert abs(a["loss"] - b["loss"]) < 0.1
    step = Trainer.train_step

    def cut(self, batches):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self, batches)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Trainer, "train_step", cut)
        fit(config(root, "--data.cache", "device", "--train.save_steps", "1"), tmp_path / "cut", progress=False)
    fit(config(root, "--data.cache", "device", "--train.save_steps", "1"), tmp_path / "cut", progress=False)
    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])


def test_validation_is_the_same(root):
    train, val = (create_dataset("minicity", root, split) for split in ("train", "val"))
    score = {cache: Trainer(config(root, "--data.cache", cache), train, val, False).validate() for cache in ("none", "device")}
    assert score["none"] == score["device"]


def late(monkeypatch):
    """Numbers arrive one step late, as on a GPU."""
    real = Trainer.arrived
    monkeypatch.setattr(Trainer, "arrived", lambda self, **now: real(self, keep=1) if now else real(self))


def test_late_numbers_change_nothing(root, tmp_path, monkeypatch):
    at_once = fit(config(root), tmp_path / "at_once", progress=False)
    late(monkeypatch)
    later = fit(config(root), tmp_path / "later", progress=False)
    assert [{**h, "seconds": 0} for h in at_once.history] == [{**h, "seconds": 0} for h in later.history]


@pytest.mark.parametrize("bad_step", [2, 3, 5])
def test_a_bad_loss_is_named_though_it_arrives_late(root, tmp_path, monkeypatch, bad_step):
    """In the middle and in the last step of an epoch; the step and the images are those of the loss, and no NaN is saved."""
    late(monkeypatch)
    add, seen = Trainer.add_gradients, {}

    def spoil(self, x, y, index, n=1):
        losses = add(self, x, y, index, n)
        if self.step == bad_step:
            seen["names"] = self.loader.names(index)
            losses["loss"] = losses["loss"] * math.nan
        return losses
    monkeypatch.setattr(Trainer, "add_gradients", spoil)
    with pytest.raises(TrainingError, match=f"the loss became nan in epoch {bad_step // 2 + 1}, step {bad_step}, ") as e:
        fit(config(root, "--train.save_steps", "1"), tmp_path / "run", progress=False)
    assert all(name in str(e.value) for name in seen["names"])
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def test_average_is_that_of_the_formula():
    """Collected once or anew each time, the moving average is the same."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    ema, slow = loop.ModelEma(model, 0.7), {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(2, 3, 5, 5))
        ema.update(model, step)
        d = min(0.7, (1 + step) / (10 + step))
        slow = {k: d * slow[k] + (1 - d) * v if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}
    for k, v in ema.model.state_dict().items():
        torch.testing.assert_close(v, slow[k])


def test_the_benchmark_of_throughput_runs(tmp_path):
    """Each step of the ladder is a row of the record, against the floor that was given; no figure of it is asserted."""
    import os
    import subprocess
    import sys
    from pathlib import Path
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "benchmarks/throughput.py", "--quick", "--peak", "0.05", "--json", str(tmp_path / "record.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert [r["step"] for r in record["rows"]] == ["plain", "+ decoded in memory", "+ on the device", "+ channels_last", "+ bf16"]
    for row in record["rows"]:
        assert row["images/s"] > 0 and 0 <= row["waits"] < 1
        assert row["of the floor"] == pytest.approx(row["images/s"] * 3 * record["macs"] / 0.05e12)
