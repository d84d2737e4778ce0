"""How fast MiniCity draws: scenes per second on one core, labels included. There is no peer; the floor is 15 per second at 512 x 256.

The floor is meant for an idle core. CPU time of the process is reported beside wall time, so that a busy machine can be told apart.
"""
import argparse
import statistics
import time

import cv2
from _bench import record, table

from mlmsnet.data.minicity import MiniCityConfig, _png, draw_scene


def measure(cfg: MiniCityConfig, scenes: int, repeats: int, encode: bool = False):
    """Per scene the best of `repeats` (wall and CPU seconds), then the median and the mean over scenes."""
    wall, cpu = [], []
    for seed in range(100, 100 + scenes):
        best = [float("inf")] * 2
        for _ in range(repeats):
            w, c = time.perf_counter(), time.process_time()
            scene = draw_scene(seed, cfg)
            if encode:
                _png(scene.image), _png(scene.label_ids), _png(scene.train_ids)
            best = [min(best[0], time.perf_counter() - w), min(best[1], time.process_time() - c)]
        wall.append(best[0])
        cpu.append(best[1])
    return {"scenes/s": 1 / statistics.mean(wall), "scenes/s (CPU time)": 1 / statistics.mean(cpu),
            "median ms (CPU)": 1e3 * statistics.median(cpu), "slowest ms (CPU)": 1e3 * max(cpu)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer scenes")
    parser.add_argument("--json", help="write a record")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    scenes, repeats = (12, 2) if args.quick else (40, 4)
    for seed in range(15):
        draw_scene(seed)  # the first scenes make tiles and crowns, once per process
    rows = []
    for name, cfg, encode in (("512 x 256", MiniCityConfig(), False),
                              ("512 x 256, fog, label noise", MiniCityConfig(fog=0.5, label_noise=0.5), False),
                              ("512 x 256 + PNG encoding", MiniCityConfig(), True), ("256 x 128", MiniCityConfig(128, 256), False),
                              ("1024 x 512", MiniCityConfig(512, 1024), False)):
        rows.append({"case": name, **measure(cfg, scenes, repeats, encode)})
    table(rows)
    speed = rows[0]["scenes/s (CPU time)"]
    print(f"floor at 512 x 256: 15 scenes/s on one idle core; here {speed:.1f} by CPU time: {'reached' if speed >= 15 else 'NOT reached'}")
    if args.json:
        record(args.json, "minicity", rows, floor=15)


if __name__ == "__main__":
    main()
