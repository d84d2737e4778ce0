"""Sliding-window evaluation of one 2048x1024 frame (713 windows, stride 2/3, mirrored), beside the way of semseg and the original MLMSNet.

    python benchmarks/sliding.py [--quick] [--json OUT] [--model mlms_l]

Three questions, each answered in one run:
  1. How many seconds with a network that costs nothing (it returns logits that exist already)?
  2. How much does it add to the bare forward passes of a real network?
  3. How much memory does it take? (each way in a process of its own: highest resident size, less the size before)
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _bench import record, table, timed

from mlmsnet.core import keep_freed_memory
from mlmsnet.evaluation.inference import IMAGENET_MEAN, IMAGENET_STD, InferenceConfig, predict, window_starts

HEIGHT, WIDTH, CLASSES, CROP = 1024, 2048, 19, 713
CFG = InferenceConfig(mode="slide", crop=(CROP, CROP), flip=True, batch=2)
FLOAT64 = HEIGHT * WIDTH * CLASSES * 8


class Free(torch.nn.Module):
    """A network that costs nothing: one tensor, expanded to the batch."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(1, CLASSES, 1, 1))

    def forward(self, x):
        return {"out": self.logits.expand(len(x), CLASSES, *x.shape[-2:])}


class StandIn(torch.nn.Module):
    """A small real network, for --quick."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, 2, 1), torch.nn.ReLU(),
                                        torch.nn.Conv2d(32, CLASSES, 1))

    def forward(self, x):
        return {"out": F.interpolate(self.body(x), x.shape[-2:], mode="bilinear", align_corners=True)}


def semseg_way(model, image):
    """The steps of semseg's tool/test.py in our words: a float64 volume height x width x classes in NumPy, filled window by window."""
    mean, std = 255 * np.float32(IMAGENET_MEAN), 255 * np.float32(IMAGENET_STD)
    image = np.float32(image)
    h, w, _ = image.shape
    total = np.zeros((h, w, CLASSES), dtype=float)
    sums, count = np.zeros((h, w, CLASSES), dtype=float), np.zeros((h, w), dtype=float)
    for y in window_starts(h, CROP, 2 / 3):
        for x in window_starts(w, CROP, 2 / 3):
            window = torch.from_numpy(image[y:y + CROP, x:x + CROP].transpose(2, 0, 1)).float()
            for plane, m, s in zip(window, mean, std):
                plane.sub_(m).div_(s)
            both = torch.stack([window, window.flip(2)])
            with torch.no_grad():
                prob = F.softmax(model(both)["out"], dim=1)
            prob = ((prob[0] + prob[1].flip(2)) / 2).numpy().transpose(1, 2, 0)
            count[y:y + CROP, x:x + CROP] += 1
            sums[y:y + CROP, x:x + CROP, :] += prob
    sums /= np.expand_dims(count, 2)
    total += cv2.resize(sums, (w, h), interpolation=cv2.INTER_LINEAR)
    total /= 1
    return np.argmax(total, axis=2)


class Stopwatch(torch.nn.Module):
    """Adds up the seconds inside a network, so that one run says what lies outside it."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seconds = net, 0.0

    def forward(self, x):
        start = time.perf_counter()
        out = self.net(x)
        self.seconds += time.perf_counter() - start
        return out


def outside(way, net, repeats=3):
    """Seconds outside the network as a share of those inside it, within the same run: the median."""
    shares = []
    for _ in range(repeats):
        watched = Stopwatch(net).eval()
        start = time.perf_counter()
        way(watched)
        shares.append((time.perf_counter() - start) / watched.seconds - 1)
    return sorted(shares)[repeats // 2]


def forwards(model, batches):
    """The bare network on the same windows."""
    with torch.inference_mode():
        for x in batches:
            model(x)


def frame():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def status(key):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def peak(way):
    """In a process of its own: highest resident size while one frame is labelled, less the size before."""
    model, image = Free().eval(), frame()
    small = image[:CROP, :CROP]  # first use of every library function, on one window
    if way == "ours":
        predict(model, small, CFG)
    else:
        globals()["HEIGHT"], globals()["WIDTH"] = CROP, CROP
        cv2.resize(np.zeros((8, 8, CLASSES)), (8, 8))
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest size so far
    before = status("VmRSS")
    predict(model, image, CFG) if way == "ours" else semseg_way(model, image)
    print(json.dumps(status("VmHWM") - before))


def measured_peak(way):
    out = subprocess.run([sys.executable, __file__, "--peak", way], capture_output=True, text=True, check=True,
                         env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small stand-in network and fewer repeats")
    parser.add_argument("--json", help="write a record")
    parser.add_argument("--model", default="mlms_l", help="network for question 2")
    parser.add_argument("--peak", choices=["ours", "semseg"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return peak(args.peak)

    kept = keep_freed_memory()  # for all sides alike: else page faults, which come as they like, drown what is to be measured
    image, free = frame(), Free().eval()
    t = timed({"ours": lambda: predict(free, image, CFG), "semseg": lambda: semseg_way(free, image)}, repeats=3 if args.quick else 5)
    agree = float((predict(free, image, CFG) == semseg_way(free, image)).mean())
    rows = [{"what": f"network that costs nothing, {k} (s)", "value": round(t[k], 3)} for k in t]

    if args.quick:
        name, net = "stand-in", StandIn().eval()
    else:
        from mlmsnet.networks.mlmsnet import create_model
        name, net = args.model, create_model(args.model, CLASSES).eval()
    starts = [(y, x) for x in window_starts(WIDTH, CROP, 2 / 3) for y in window_starts(HEIGHT, CROP, 2 / 3)]
    batches = [torch.randn(2, 3, CROP, CROP) for _ in starts]
    seconds = {"bare": lambda: forwards(net, batches), "ours": lambda: predict(net, image, CFG), "semseg": lambda: semseg_way(net, image)}
    start = time.perf_counter()
    t2 = timed(seconds, repeats=3, warmup=1)
    print(f"{len(starts)} windows, mirrored; classes agree with semseg's way on {100 * agree:.3f} % of the pixels "
          f"({time.perf_counter() - start:.0f} s for question 2)")
    rows += [{"what": f"{name}, {k} (s)", "value": round(v, 3)} for k, v in t2.items()]
    bare = t2["bare"]
    rows += [{"what": f"{name}: {k} adds to the bare passes (%)", "value": round(100 * (t2[k] / bare - 1), 2)} for k in t]
    rows += [{"what": f"free-network seconds of {k} as a share of them (%)", "value": round(100 * t[k] / bare, 2)} for k in t]

    ways = {"ours": lambda m: predict(m, image, CFG), "semseg": lambda m: semseg_way(m, image)}
    rows += [{"what": f"{name}: {k}, outside the network in the same run (%)", "value": round(100 * outside(way, net), 2)}
             for k, way in ways.items()]

    if Path("/proc/self/clear_refs").exists():
        memory = {k: measured_peak(k) for k in ("ours", "semseg")}
        rows += [{"what": f"peak memory, {k} (MB)", "value": round(m / 1e6, 1)} for k, m in memory.items()]
        rows += [{"what": "one float64 volume (MB)", "value": round(FLOAT64 / 1e6, 1)},
                 {"what": "ours as a share of that volume", "value": round(memory["ours"] / FLOAT64, 3)}]
    table(rows)
    if args.json:
        record(args.json, "sliding", rows, model=name, quick=args.quick, agreement=agree, freed_memory_kept=kept)


if __name__ == "__main__":
    main()
