"""A list-file data set of a few small pictures and the settings of a network that learns from it in a second, for the tests."""
from pathlib import Path

import cv2
import numpy as np

CLASSES = 5
SIZE = 48, 64  # height, width
SETTINGS = {
    "data": {"name": "list", "train": "train.txt", "val": "val.txt", "test": "val.txt", "num_classes": CLASSES},
    "model": {"name": "mlmsv2_s", "backbone": "mobilenetv3_small", "output_stride": 32, "width_mult": 0.75,
              "dilations": [1, 2], "dropout": 0.2},
    "loss": {"name": "dice_ce"},
    "augment": {"crop": [32, 48], "scale_min": 0.8, "scale_max": 1.2},
    "train": {"epochs": 3, "batch_size": 2, "optimizer": "adamw", "lr": 0.001, "ema": 0.9, "save_steps": 1},
    "seed": 3,
    "device": "cpu",
}


def draw(seed: int, size=SIZE):
    "A striped image and its label: classes are grey levels, the top row is void"
    rng = np.random.default_rng(seed)
    (h, w), edges = size, np.sort(rng.integers(1, size[1], CLASSES - 1))
    mask = np.broadcast_to(np.searchsorted(edges, np.arange(w), side="right").astype(np.uint8), (h, w)).copy()
    image = (40 + 40 * mask[..., None] + rng.integers(0, 20, (h, w, 3))).astype(np.uint8)
    mask[0] = 255
    return image, mask


def write_pair(root, name: str, image, mask, ending="png"):
    for folder, picture, end in (("images", image, ending), ("labels", mask, "png")):
        (Path(root) / folder).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(Path(root) / folder / f"{name}.{end}"), picture)


def write_data(root, train: int = 6, val: int = 2) -> Path:
    "images/, labels/, train.txt and val.txt"
    root, lists = Path(root), {"train": range(train), "val": range(100, 100 + val)}
    for split, seeds in lists.items():
        for seed in seeds:
            write_pair(root, f"{split}{seed}", *draw(seed))
        (root / f"{split}.txt").write_text("".join(f"images/{split}{s}.png labels/{split}{s}.png\n" for s in seeds))
    return root


def settings(root, **sections) -> dict:
    "`SETTINGS` for the data in `root`, with sections laid over"
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in SETTINGS.items()}
    out["data"]["root"] = str(root)
    for name, value in sections.items():
        out[name] = {**out.get(name, {}), **value} if isinstance(value, dict) else value
    return out


def write_config(path, root, **sections) -> Path:
    "`settings` as a YAML file"
    import yaml
    Path(path).write_text(yaml.safe_dump(settings(root, **sections)))
    return Path(path)
