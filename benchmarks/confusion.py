"""Confusion matrix of one 2048x1024 frame with 19 classes, beside the three histograms of semseg and the plain NumPy bincount.

    python benchmarks/confusion.py [--quick] [--json OUT]

The histograms give three vectors (intersection, prediction, target); ours gives the whole table, from which the same vectors are read.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _bench import record, table, timed

from mlmsnet.training.metrics import ConfusionMatrix

CLASSES, VOID = 19, 255


def frame(seed=0):
    """A target with street-like areas and 5 % void, and a prediction that is right on most of it."""
    rng = np.random.default_rng(seed)
    target = np.kron(rng.integers(0, CLASSES, (32, 64)), np.ones((32, 32), int)).astype(np.uint8)
    target[rng.random(target.shape) < 0.05] = VOID
    wrong = rng.random(target.shape) < 0.15
    pred = np.where(wrong | (target == VOID), rng.integers(0, CLASSES, target.shape), target).astype(np.uint8)
    return pred, target


def three_histograms(pred, target):
    """semseg's intersectionAndUnion in our words."""
    pred, target = pred.reshape(-1).copy(), target.reshape(-1)
    pred[target == VOID] = VOID
    bins = np.arange(CLASSES + 1)
    intersection = np.histogram(pred[pred == target], bins=bins)[0]
    output = np.histogram(pred, bins=bins)[0]
    true = np.histogram(target, bins=bins)[0]
    return intersection, output, true


def numpy_bincount(pred, target):
    """The usual one-liner: mask, combine, count."""
    valid = target < CLASSES
    return np.bincount(CLASSES * target[valid].astype(int) + pred[valid], minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", help="write a record")
    args = parser.parse_args()
    pred, target = frame()
    tensors = [torch.from_numpy(x) for x in (pred, target)]
    matrix = ConfusionMatrix(CLASSES)
    t = timed({"three np.histogram": lambda: three_histograms(pred, target), "numpy bincount": lambda: numpy_bincount(pred, target),
               "ours": lambda: matrix.update(*tensors), "ours, from int64": lambda: matrix.update(tensors[0].long(), tensors[1].long())},
              repeats=5 if args.quick else 25, warmup=2)
    counts = matrix.reset().update(*tensors).counts.numpy()
    for ours, theirs in zip((np.diag(counts), counts.sum(0), counts.sum(1)), three_histograms(pred, target)):
        assert (ours == theirs).all()
    assert (counts == numpy_bincount(pred, target)).all()
    hist = t["three np.histogram"]
    rows = [{"way": k, "ms": round(1000 * s, 2), "times as fast as the histograms": round(hist / s, 1)} for k, s in t.items()]
    table(rows)
    if args.json:
        record(args.json, "confusion", rows)


if __name__ == "__main__":
    main()
