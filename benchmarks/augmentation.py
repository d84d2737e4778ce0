"""Training augmentation of an already decoded 2048x1024 frame into a 713x713 crop: one warp against the sequential chain.

The peer is the usual chain in OpenCV float32, step by step on the whole frame: resize by 0.5-2, rotate by +-10 degrees (half of
the time), 5x5 Gaussian blur (half of the time), flip (half of the time), pad and crop, to a tensor, normalise. Both get the same
draws, both run on one thread.

    python benchmarks/augmentation.py [--quick] [--json OUT]
"""
import argparse

import cv2
import numpy as np
import torch
from _bench import record, table, timed

from mlmsnet.core import rng_for
from mlmsnet.data.datasets import Sample
from mlmsnet.data.transforms import AugmentConfig, TrainTransform, draw_augment, normalize

TARGET = 10.0


def frame(height=1024, width=2048):
    """A frame with structure at all sizes, and a label map of 19 classes in regions."""
    rng = np.random.default_rng(0)
    image = sum(cv2.resize(rng.random((height // k, width // k, 3), dtype=np.float32), (width, height)) for k in (1, 8, 64)) / 3
    mask = cv2.resize(rng.integers(0, 19, (height // 64, width // 64), dtype=np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return (255 * image).astype(np.uint8), mask


def chain(image, mask, cfg, d):
    """The sequential chain; the decoded image is converted to float32 first, as its data set does."""
    mean, std = [255 * m for m in cfg.mean], [255 * s for s in cfg.std]
    image = np.float32(image)
    image = cv2.resize(image, None, fx=d.scale, fy=d.scale, interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, None, fx=d.scale, fy=d.scale, interpolation=cv2.INTER_NEAREST)
    h, w = mask.shape
    if d.angle:
        turn = cv2.getRotationMatrix2D((w / 2, h / 2), d.angle, 1)
        image = cv2.warpAffine(image, turn, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=mean)
        mask = cv2.warpAffine(mask, turn, (w, h), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=255)
    if d.blur:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if d.flip:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    ch, cw = cfg.crop
    if h < ch or w < cw:
        ph, pw = max(0, ch - h), max(0, cw - w)
        pad = ph // 2, ph - ph // 2, pw // 2, pw - pw // 2
        image = cv2.copyMakeBorder(image, *pad, cv2.BORDER_CONSTANT, value=mean)
        mask = cv2.copyMakeBorder(mask, *pad, cv2.BORDER_CONSTANT, value=255)
        h, w = mask.shape
    y, x = int(d.top * (h - ch + 1)), int(d.left * (w - cw + 1))
    image, mask = image[y:y + ch, x:x + cw], mask[y:y + ch, x:x + cw]
    x = torch.from_numpy(image.transpose(2, 0, 1)).float()
    y = torch.from_numpy(mask).long()
    for channel, m, s in zip(x, mean, std, strict=True):
        channel.sub_(m).div_(s)
    return x, y


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer draws")
    parser.add_argument("--json", help="write a record here")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    image, mask = frame()
    cfg = AugmentConfig()
    ours = TrainTransform(cfg)
    draws = [draw_augment(cfg, rng_for(0, 0, i)) for i in range(12 if args.quick else 64)]
    sample = Sample(image, mask, "frame")

    def one_warp():
        for d in draws:
            x, y = ours.pixels(sample, d)
            normalize(x, cfg.mean, cfg.std), torch.from_numpy(y).long()

    def sequential():
        for d in draws:
            chain(image, mask, cfg, d)

    seconds = timed({"sequential": sequential, "one warp": one_warp}, repeats=3 if args.quick else 5)
    ratio = seconds["sequential"] / seconds["one warp"]
    rows = [{"augmentation": name, "ms per frame": 1000 * s / len(draws), "times faster": seconds["sequential"] / s}
            for name, s in seconds.items()]
    table(rows)
    print(f"one warp is {ratio:.1f} times as fast as the chain ({len(draws)} draws, one thread; target {TARGET:g}): "
          f"{'met' if ratio >= TARGET else 'MISSED'}")
    if args.json:
        record(args.json, "augmentation", rows, ratio=ratio, target=TARGET, met=ratio >= TARGET, draws=len(draws), opencv=cv2.__version__)


if __name__ == "__main__":
    main()
