"""Every registered loss beside those of segmentation-models-pytorch, MONAI, kornia and torch: time and memory of forward + backward.

    python benchmarks/losses.py [--quick] [--only NAME ...] [--device cpu|cuda] [--json OUT]

Input: logits 2x19x512x1024, float32, and labels in blocks, 5 % of them void. The libraries are optional
(`pip install segmentation-models-pytorch monai kornia`); one that is not there is left out, with a line that says so.

Time: the ways of one loss take turns in one process; median wall seconds of forward + backward, gradients freed in between.
Memory: each way in a fresh process. It runs the loss on a small input, notes its resident size, resets the kernel's high-water mark
(/proc/self/clear_refs), runs forward + backward once, and reads the mark (VmHWM). There malloc gives freed blocks back at once
(MALLOC_MMAP_THRESHOLD_), so the mark is what was alive. Logits and labels are not in the number; the gradient of the logits is
(76 MiB, which nobody can avoid). On a GPU: torch.cuda.max_memory_allocated, less what was there before.

Is a peer right? Each peer is asked for the same thing as ours (the parameters are in PEERS), and judged by what it does:
  same      its value is ours, and void pixels get no gradient
  no void   it knows no void, but is the same on labels without any (there it runs on labels whose void became class 0)
  other     another definition under the same name; the difference is in the record
Ratios are to the fastest and to the leanest peer that is "same"; in brackets to "no void", where there is no other.
Below 1: ours is faster, leaner.
"""
import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _bench import record, table

from mlmsnet.losses.contract import available_losses, create_loss

VOID, MIB = 255, 2**20
FULL, QUICK = (2, 19, 512, 1024), (2, 19, 64, 96)
LIBRARIES = {"torch": "torch", "smp": "segmentation_models_pytorch", "MONAI": "monai", "kornia": "kornia", "naive": "torch"}
KEEP = 131072  # pixels that OHEM with the rule "prob" keeps at least


# ---- what is measured beside ours ----

@dataclass(frozen=True)
class Peer:
    """One loss of one library: how to make it, and with which parameters ours computes the same."""
    loss: str  # our name
    package: str
    make: object  # its module -> function (logits, target) -> scalar
    ours: dict = field(default_factory=dict)
    void: bool = True  # does it take an ignore_index?
    note: str = ""

    @property
    def key(self):
        return f"{self.package}:{self.loss}" + (f":{self.note}" if self.note else "")


def smp(name, **kw):
    return lambda lib: getattr(lib.losses, name)("multiclass", ignore_index=VOID, **kw)


def monai(name, void=True, one_hot=True, **kw):
    """MONAI wants labels as N 1 H W, and one-hot on request."""
    def make(lib):
        extra = {"ignore_index": VOID} if void else {}
        if name != "FocalLoss":
            extra["softmax"] = True
        loss = getattr(importlib.import_module("monai.losses"), name)(to_onehot_y=True, **extra, **kw)
        return lambda z, y: loss(z, y.unsqueeze(1))
    return make


def kornia(name, scaled=False, **kw):
    def make(lib):
        fn = getattr(importlib.import_module("kornia.losses"), name)
        if scaled:  # its mean divides by C and by void pixels too; with a sum one can do it oneself
            return lambda z, y: fn(z, y, ignore_index=VOID, reduction="sum", **kw) / (y != VOID).sum()
        return lambda z, y: fn(z, y, **kw)
    return make


def plain_ce(z, y, **kw):
    return F.cross_entropy(z, y, ignore_index=VOID, **kw)


def ohem_prob(z, y):
    """OHEM as HRNet, DDRNet and mmseg have it: probabilities of the true class, sorted; written out in our words."""
    losses, valid = plain_ce(z, y, reduction="none").view(-1), y.view(-1) != VOID
    with torch.no_grad():
        prob = F.softmax(z, 1).gather(1, y.masked_fill(y == VOID, 0).unsqueeze(1)).view(-1)[valid]
        ordered = prob.sort().values
        threshold = max(0.7, float(ordered[min(KEEP, len(ordered)) - 1]))
    return losses[valid][prob < threshold].mean()


def ohem_loss(z, y):
    """OHEM as BiSeNet and MLMSNet have it: losses above -ln 0.7, or the n/16 largest; written out in our words."""
    losses = plain_ce(z, y, reduction="none").view(-1)
    keep = int((y != VOID).sum()) // 16
    hard = losses[losses > -math.log(0.7)]
    return (hard if hard.numel() >= keep else losses.topk(keep).values).mean()


def topk(z, y):
    """Cross-entropy of the hardest tenth, as in nnU-Net, on valid pixels."""
    losses = plain_ce(z, y, reduction="none")[y != VOID]
    return losses.topk(len(losses) // 10, sorted=False).values.mean()


def poly1(z, y):
    ce = plain_ce(z, y, reduction="none")[y != VOID]
    return (ce + 1 - torch.exp(-ce)).mean()


def lovasz_per_class(z, y):
    """Lovász-softmax as it is usually written: every class sorts all pixels with torch.sort."""
    valid = (y != VOID).view(-1)
    p, t = z.softmax(1).movedim(1, -1).flatten(0, 2)[valid], y.view(-1)[valid]
    losses = []
    for c in range(z.shape[1]):
        fg = (t == c).to(p.dtype)
        if fg.sum() == 0:
            continue
        error, order = (fg - p[:, c]).abs().sort(descending=True)
        fg = fg[order]
        jaccard = 1 - (fg.sum() - fg.cumsum(0)) / (fg.sum() + (1 - fg).cumsum(0))
        losses.append(torch.dot(error, torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])))
    return torch.stack(losses).mean()


PEERS = [
    Peer("cross_entropy", "torch", lambda lib: plain_ce),
    Peer("cross_entropy", "torch", lambda lib: lambda z, y: plain_ce(z, y, label_smoothing=0.1), {"label_smoothing": 0.1}, note="smoothed"),
    Peer("cross_entropy", "smp", lambda lib: lib.losses.SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=VOID),
         {"label_smoothing": 0.1}, note="smoothed"),
    Peer("ohem", "naive", lambda lib: ohem_loss),
    Peer("ohem", "naive", lambda lib: ohem_prob, {"rule": "prob", "min_kept": KEEP}, note="rule prob"),
    Peer("topk", "naive", lambda lib: topk),
    Peer("poly1", "naive", lambda lib: poly1),
    Peer("focal", "smp", smp("FocalLoss", gamma=2.0)),
    Peer("focal", "MONAI", monai("FocalLoss", use_softmax=True, gamma=2.0)),
    Peer("focal", "kornia", kornia("focal_loss", scaled=True, alpha=None, gamma=2.0)),
    Peer("dice", "smp", smp("DiceLoss")),
    Peer("dice", "MONAI", monai("DiceLoss", batch=True)),
    Peer("dice", "MONAI", monai("DiceLoss", batch=True, squared_pred=True), {"squared": True}, note="squared"),
    Peer("dice", "kornia", kornia("dice_loss", average="macro", ignore_index=VOID), {"per_image": True}, note="per image"),
    Peer("jaccard", "smp", smp("JaccardLoss")),
    Peer("jaccard", "MONAI", monai("DiceLoss", batch=True, jaccard=True)),
    Peer("tversky", "smp", smp("TverskyLoss", alpha=0.3, beta=0.7)),
    Peer("tversky", "MONAI", monai("TverskyLoss", batch=True, alpha=0.3, beta=0.7)),
    Peer("tversky", "kornia", kornia("tversky_loss", alpha=0.3, beta=0.7, ignore_index=VOID), {"per_image": True}, note="per image"),
    Peer("focal_tversky", "smp", smp("TverskyLoss", alpha=0.3, beta=0.7, gamma=0.75)),
    Peer("generalized_dice", "MONAI", monai("GeneralizedDiceLoss", void=False, batch=True), void=False),
    Peer("mcc", "MONAI", monai("MCCLoss", void=False, batch=True), void=False),
    Peer("lovasz_softmax", "smp", smp("LovaszLoss")),
    Peer("lovasz_softmax", "kornia", kornia("lovasz_softmax_loss"), {"per_image": True, "classes": "all"}, void=False, note="per image"),
    Peer("lovasz_softmax", "naive", lambda lib: lovasz_per_class),
    Peer("boundary", "MONAI", monai("BoundaryLoss", void=False), void=False),
    Peer("hausdorff_dt", "MONAI", monai("HausdorffDTLoss", void=False, include_background=True), void=False),
    Peer("soft_cldice", "MONAI", monai("SoftclDiceLoss", void=False), void=False),
    Peer("dice_ce", "MONAI", monai("DiceCELoss", void=False, batch=True), void=False),
    Peer("dice_focal", "MONAI", monai("DiceFocalLoss", void=False, batch=True), void=False),
]
BOTH = {"ohem", "topk", "lovasz_softmax"}  # what they cost depends on how good the prediction is


def library(name):
    """The module, or None and why it is not there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(LIBRARIES[name]), ""
    except ImportError as e:
        return None, f"{LIBRARIES[name]} cannot be imported ({e})"


# ---- data ----

def data(kind, shape, device="cpu", seed=0):
    """Labels in blocks with 5 % void. `random`: logits of an untrained network; `trained`: confident, 8 % of the pixels wrong."""
    n, c, h, w = shape
    g = torch.Generator().manual_seed(seed)
    side = max(1, min(h, w) // 16)
    y = (c * torch.rand(n, -(-h // side), -(-w // side), generator=g) ** 2).long()  # the first classes are common, the last ones rare
    y = y.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :h, :w]
    z = torch.randn(shape, generator=g)
    if kind == "trained":
        wrong = torch.rand(y.shape, generator=g) < 0.08
        said = torch.where(wrong, torch.randint(0, c, y.shape, generator=g), y)
        z.mul_(1.5).scatter_add_(1, said.unsqueeze(1), torch.full((n, 1, h, w), 9.0))
    y = y.masked_fill(torch.rand(y.shape, generator=g) < 0.05, VOID)
    return z.to(device).requires_grad_(), y.to(device)


def without_void(y):
    return y.masked_fill(y == VOID, 0)


# ---- one way of computing one loss ----

@dataclass
class Way:
    """A name, a function, and whether it can be shown void."""
    name: str
    fn: object
    void: bool = True

    def labels(self, y):
        return y if self.void else without_void(y)

    def run(self, z, y):
        z.grad = None
        self.fn(z, y).backward()
        if z.is_cuda:
            torch.cuda.synchronize()


def make(key):
    """`ours:LOSS:{json}` or the key of a peer -> Way."""
    if key.startswith("ours:"):
        _, loss, kw = key.split(":", 2)
        return Way("ours", create_loss(loss, **json.loads(kw)))
    peer = next(p for p in PEERS if p.key == key)
    return Way(peer.package, peer.make(library(peer.package)[0]), peer.void)


def ours_key(loss, kw):
    return f"ours:{loss}:{json.dumps(kw)}"


# ---- time, memory, agreement ----

def times(ways, z, y, repeats, clock, patience=20.0):
    """Median seconds; they take turns. A way whose first run took longer than `patience` runs once only."""
    seconds, shown = {w.name: [] for w in ways}, {w.name: w.labels(y) for w in ways}
    for i in range(repeats + 1):
        for w in ways:
            if seconds[w.name] and seconds[w.name][0] > patience:
                continue
            start = clock()
            w.run(z, shown[w.name])
            took = clock() - start
            if i == 1 and len(seconds[w.name]) == 1:
                seconds[w.name].clear()  # the first was the warm-up
            seconds[w.name].append(took)
    z.grad = None
    return {k: statistics.median(v) for k, v in seconds.items()}


def peak(key, kind, shape, device):
    """MiB that forward + backward need beyond logits and labels, measured in this process; see the head of the file."""
    way = make(key)
    small = data(kind, QUICK if shape != QUICK else (1, shape[1], 32, 48), device)
    way.run(small[0], way.labels(small[1]))
    del small
    z, y = data(kind, shape, device)
    y = way.labels(y)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way.run(z, y)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size; fails where there is no /proc
    before = _status("VmRSS")
    way.run(z, y)
    return (_status("VmHWM") - before) / 1024


def _status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def peak_elsewhere(key, kind, shape, device):
    """`peak` in a fresh process; None where the system does not say (no /proc)."""
    command = [sys.executable, __file__, "--peak", key, "--kind", kind, "--device", device, *(["--quick"] if shape == QUICK else [])]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072",
           "TORCH_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return float(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None


def verdict(peer, way, mine, classes, device):
    """`same`, `no void` or `other`, and the relative difference of the values; judged on a good prediction with rare classes."""
    z, y = data("trained", (2, classes, 128, 160), device)
    y = way.labels(y)

    def value_and_grad(fn):
        z.grad = None
        value = fn(z, y)
        value.backward()
        return float(value.detach()), z.grad

    value, grad = value_and_grad(mine)
    theirs, slope = value_and_grad(way.fn)
    difference = abs(theirs - value) / max(abs(value), 1e-12)
    near = difference < 1e-3 and (slope - grad).abs().max() < 0.01 * grad.abs().max()
    leaks = bool((slope.abs().sum(1)[y == VOID] > 0).any())
    return ("other" if not near or leaks else "same" if peer.void else "no void"), difference


# ---- the table ----

def compare(loss, kw, peers, kind, shape, device, repeats, memory, clock=time.perf_counter):
    """One row: ours with the parameters `kw`, and the peers that claim to be the same."""
    mine, ways, notes = Way("ours", create_loss(loss, **kw)), [], {}
    for p in peers:
        module, why = library(p.package)
        if module is None:
            notes[p.package] = {"left out": why}
            continue
        try:
            way = Way(p.package, p.make(module), p.void)
            verdict_, difference = verdict(p, way, mine.fn, shape[1], device)
        except Exception as e:  # a peer that fails on this input is a result, not an error of the benchmark
            notes[p.package] = {"fails": f"{type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''}"}
            continue
        ways.append(way)
        notes[p.package] = {"verdict": verdict_, "difference": difference}
    z, y = data(kind, shape, device)
    seconds = times([mine, *ways], z, y, repeats, clock)
    del z, y
    keys = {"ours": ours_key(loss, kw), **{p.package: p.key for p in peers}}
    mib = {name: peak_elsewhere(keys[name], kind, shape, device) if memory else None for name in seconds}
    for name in seconds:
        if name != "ours":
            notes[name].update({"ms": round(1000 * seconds[name], 1), "MiB": _round(mib[name])})
    return _row(loss, kw, kind, seconds, mib, notes)


def _round(x):
    return None if x is None else round(x, 1)


def _row(loss, kw, kind, seconds, mib, notes):
    row = {"loss": loss + ("" if not kw else " " + ", ".join(f"{k}={v}" for k, v in kw.items())), "logits": kind,
           "ours ms": round(1000 * seconds["ours"], 1), "ours MiB": _round(mib["ours"])}
    rated = {name: n["verdict"] for name, n in notes.items() if "verdict" in n}
    best = [n for n, v in rated.items() if v == "same"] or [n for n, v in rated.items() if v == "no void"]
    fast = min(best, key=lambda n: seconds[n], default=None)
    lean = min((n for n in best if mib[n]), key=lambda n: mib[n], default=None)

    def share(ours, theirs, name):
        text = f"{ours / theirs:.2f}"
        return text if rated[name] == "same" else f"({text})"

    row["time ratio"] = share(seconds["ours"], seconds[fast], fast) if fast else "–"
    row["memory ratio"] = share(mib["ours"], mib[lean], lean) if lean and mib["ours"] else "–"
    row["peers"] = "; ".join(_peer_text(name, n) for name, n in notes.items()) or "none"
    row["_"] = notes
    return row


def _peer_text(name, n):
    if "left out" in n or "fails" in n:
        return f"{name} " + ("not installed" if "left out" in n else f"fails ({n['fails']})")
    memory = "" if n["MiB"] is None else f" {n['MiB']:.0f} MiB"
    differs = f", value differs by {n['difference']:.1%}" if n["verdict"] == "other" else ""
    return f"{name} {n['ms']:.0f} ms{memory} [{n['verdict']}{differs}]"


def rows_of(only, shape, device, repeats, memory, clock=time.perf_counter):
    """One row for every loss, kind of logits and set of parameters in which it meets a peer."""
    rows = []
    for loss in available_losses():
        if only and loss not in only:
            continue
        variants = {}
        for p in PEERS:
            if p.loss == loss:
                variants.setdefault(json.dumps(p.ours), []).append(p)
        variants.setdefault("{}", [])
        for kw in sorted(variants, key=len):
            for kind in ("random", "trained") if loss in BOTH else ("random",):
                rows.append(compare(loss, json.loads(kw), variants[kw], kind, shape, device, repeats, memory, clock))
                r = rows[-1]
                print(f"  {r['loss']} ({kind}): {r['ours ms']} ms, {r['ours MiB']} MiB; {r['peers']}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small logits, one repeat, no memory: does it run?")
    parser.add_argument("--only", nargs="+", help="only these losses")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", choices=("yes", "no"), help="also measure memory; default: unless --quick")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of all threads instead of wall seconds: for a busy machine")
    parser.add_argument("--json", help="write a record")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="random", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    shape = QUICK if args.quick else FULL
    if "TORCH_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["TORCH_NUM_THREADS"]))
    if args.peak:
        print(peak(args.peak, args.kind, shape, args.device))
        return
    unknown = sorted(set(args.only or ()) - set(available_losses()))
    if unknown:
        parser.error(f"no loss {', '.join(unknown)}; there are: {', '.join(available_losses())}")
    for name in LIBRARIES:
        module, why = library(name)
        if module is None:
            print(f"{name} is left out: {why}")
    memory = (args.memory or ("no" if args.quick else "yes")) == "yes"
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = rows_of(args.only, shape, args.device, 1 if args.quick else args.repeats, memory, clock)
    details = {f"{r['loss']} ({r['logits']})": r.pop("_") for r in rows}
    print()
    table([{k: "" if v is None else v for k, v in r.items() if k != "peers"} for r in rows])
    if args.json:
        versions = {n: getattr(library(n)[0], "__version__", "") for n in LIBRARIES if n != "naive" and library(n)[0]}
        gradient = math.prod(shape) * 4 / MIB
        record(args.json, "losses", rows, device=args.device, shape="x".join(map(str, shape)), gradient_MiB=gradient,
               clock="CPU" if args.cpu_time else "wall", versions=versions,
               peers=details)


if __name__ == "__main__":
    main()
