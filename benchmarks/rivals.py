"""What each network costs: parameters, multiply-adds and latency, all counted by `mlmsnet.evaluation.cost`.

    python benchmarks/rivals.py [--quick] [--json FILE] [--threads N] [--device cpu|cuda] [--models NAME ...] [--repeats N]

Parameters are those of inference (auxiliary heads do not count). Latency is one image, evaluation mode, float32, channels_last,
no folding of norms: the networks as they are evaluated. All networks take turns within each repetition, so that a slow moment of
the machine hits all alike; the median counts, and the ratio is to LR-ASPP in the same run.
"""
import argparse
import statistics

import torch
from _bench import record, table

from mlmsnet.core import get_device
from mlmsnet.evaluation.cost import count_macs, count_params, device_name, latency
from mlmsnet.networks.mlmsnet import available_models, create_model

MODELS = ["mlms_l", "mlms_s", "mlmsv2_l", "mlmsv2_s", "mlms_small", "mlms_lite", "baseline", "lraspp", "deeplabv3_mobilenet", "bisenetv2",
          "efficientvit_b0", "pidnet_s", "pspnet", "psanet", "pspnet_mobilenet"]
SIZES = [(512, 1024), (360, 480)]
BASE = "lraspp"


def build(name, device):
    """The network, in evaluation mode, without the heads that only training uses."""
    torch.manual_seed(0)
    model = create_model(name, 19).eval().requires_grad_(False)
    model.aux = None
    return model.to(device, memory_format=torch.channels_last)


def times(models, size, repeats, warmup):
    """Median seconds of each network; one forward pass of each in turn."""
    found = {name: [] for name in models}
    with torch.inference_mode():
        for i in range(repeats + warmup):
            for name, model in models.items():
                seconds = latency(model, size, repeats=1, warmup=1 if i == 0 else 0)
                if i >= warmup:
                    found[name].append(seconds)
    return {name: statistics.median(s) for name, s in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small image and few repeats: a check that it runs, not a result")
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--models", nargs="+", help="presets, or names of a library such as timm/resnet18")
    parser.add_argument("--repeats", type=int, help="passes of each network and size")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, known = get_device(args.device), available_models()
    names = args.models or [name for name in MODELS if name in known]
    models = {name: build(name, device) for name in names}
    rows = [{"model": name, "params": count_params(model)} for name, model in models.items()]
    for h, w in SIZES:
        for row in rows:
            row[f"gmacs_{h}x{w}"] = count_macs(models[row["model"]], (h, w)) / 1e9
    for h, w in [(96, 128)] if args.quick else SIZES:
        measured = times(models, (h, w), args.repeats or (2 if args.quick else 7), 1)
        for row in rows:
            row[f"ms_{h}x{w}"] = 1000 * measured[row["model"]]
            if BASE in measured:
                row[f"ratio_{h}x{w}"] = measured[row["model"]] / measured[BASE]
    table(rows)
    if args.json:
        record(args.json, "rivals", rows, quick=args.quick, base=BASE, device=device_name(device), layout="channels_last")


if __name__ == "__main__":
    main()
