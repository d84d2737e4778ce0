"""Images per second of whole training steps, from the plain loop to one that keeps its images on the device.

    python benchmarks/throughput.py [CONFIG] [--section.key value ...] [--quick] [--steps N] [--peak TFLOPS] [--json FILE]

Each row adds one thing to the row before it: loader workers and float32 in plain layout; decoded images in memory; images on the
device, augmented there; channels_last; bf16; torch.compile. All rows train the same network on the same images, one after the other
in one run, after a warm-up that is not counted. `waits` is the share of the time in which the step waited for its batch. With
--peak, the card's (or the cores') multiply-adds per second in 10^12, `of the floor` says how near a row is to arithmetic alone:
three times the forward pass' multiply-adds. Without CONFIG, MLMS-S learns from MiniCity scenes that are drawn for this.
"""
import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from _bench import record, table

from mlmsnet.core import get_device
from mlmsnet.data.loaders import CachedDataset
from mlmsnet.data.minicity import MiniCityConfig, write_minicity
from mlmsnet.evaluation.cost import measure_cost
from mlmsnet.training.config import parse_config
from mlmsnet.training.loop import Trainer, build_dataset

STEPS = {
    "plain": {"data.cache": "none", "train.channels_last": False, "train.amp": "none", "train.compile": False},
    "+ decoded in memory": {"data.cache": "ram"},
    "+ on the device": {"data.cache": "device", "data.workers": 0},
    "+ channels_last": {"train.channels_last": True},
    "+ bf16": {"train.amp": "bf16"},
    "+ compile": {"train.compile": True},
}


def changed(cfg, settings: dict):
    """`cfg` with dotted settings laid over it."""
    for key, value in settings.items():
        section, name = key.split(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return cfg


def measure(cfg, data, steps: int, warmup: int) -> dict:
    """Images per second and the share of waiting over `steps` optimiser steps."""
    if cfg.data.cache == "ram":
        data = CachedDataset(data, "ram")
    trainer = Trainer(cfg, data, progress=False)
    trainer.model.train()
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    done, waited, start, batches = -warmup, 0.0, None, iter(())
    while done < steps:
        before = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            trainer.loader.set_epoch(trainer.epoch)
            batches = iter(trainer.loader)
            continue
        if done == 0:
            trainer.arrived()
            if on_gpu:
                torch.cuda.synchronize()
            start, waited, before = time.perf_counter(), 0.0, time.perf_counter()
        waited += time.perf_counter() - before
        trainer.train_step([batch])
        done += 1
    trainer.arrived()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    return {"images/s": steps * cfg.train.batch_size / seconds, "waits": waited / seconds, "peak MiB": peak}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("config", nargs="?", help="a shipped config or a YAML file; its data must be there")
    ap.add_argument("--quick", action="store_true", help="few steps, small scenes, no compilation")
    ap.add_argument("--steps", type=int, default=60, help="steps to time (default 60)")
    ap.add_argument("--peak", type=float, help="multiply-adds per second of the device, in 10^12")
    ap.add_argument("--json", help="write a record here")
    args, settings = ap.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.config is None:
            size = MiniCityConfig(height=64, width=96) if args.quick else MiniCityConfig(height=360, width=480)
            write_minicity(folder, train=32 if args.quick else 200, val=1, cfg=size, progress=False)
            crop = "[64,96]" if args.quick else "[360,480]"
            settings = ["--data.root", folder, "--augment.crop", crop, "--train.batch_size", "4" if args.quick else "16", *settings]
        cfg = parse_config(args.config or "minicity_demo", settings)
        data = build_dataset(changed(cfg, {"data.cache": "none"}), cfg.data.train)
        steps, warmup = (6, 2) if args.quick else (args.steps, 10)
        trainer = Trainer(cfg, data, progress=False)
        macs = measure_cost(trainer.model.eval().cpu(), tuple(cfg.augment.crop), repeats=0).macs
        floor = args.peak * 1e12 / (3 * macs) if args.peak else None
        rows, settings = [], {}
        for name, more in STEPS.items():
            if args.quick and "train.compile" in more and more["train.compile"]:
                continue
            settings = {**settings, **more}
            row = measure(changed(cfg, settings), data, steps, warmup)
            rows.append({"step": name, **row, "times plain": row["images/s"] / (rows[0]["images/s"] if rows else row["images/s"]),
                         "of the floor": row["images/s"] / floor if floor else None})
            print(f"{name:22} {row['images/s']:8.1f} images/s, waits {row['waits']:.1%}", flush=True)
        table(rows)
        if args.json:
            note = {"network": cfg.model.name, "backbone": trainer.model.settings["backbone"], "crop": list(cfg.augment.crop),
                    "batch": cfg.train.batch_size, "workers": cfg.data.workers, "macs": macs, "peak_tera_macs": args.peak,
                    "device": str(get_device(cfg.device)), "steps": steps}
            record(Path(args.json), "throughput", rows, **note)


if __name__ == "__main__":
    main()
