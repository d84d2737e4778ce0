"""Data sets, list files, loaders and caches: bad input is named, order and augmentation do not depend on workers or restarts."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mlmsnet.core import ConfigError, MlmsError
from mlmsnet.data.datasets import CamVid, Cityscapes, ListFile, SegmentationDataset, create_dataset, find_shared, read_image, read_label
from mlmsnet.data.labels import numbered_table
from mlmsnet.data.loaders import CachedDataset, EpochBatches, ResizedDataset, SubsetDataset, epoch_order, eval_loader, train_loader
from mlmsnet.data.transforms import AugmentConfig, EvalTransform, TrainTransform


def make(folder, n=6, classes=4, sizes=((40, 56),), values=None):
    """A data set of n small noisy images."""
    rng, images, masks = np.random.default_rng(0), [], []
    for i in range(n):
        size = sizes[i % len(sizes)]
        images.append(Path(folder) / f"im{i}.png")
        masks.append(Path(folder) / f"la{i}.png")
        cv2.imwrite(str(images[-1]), rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        cv2.imwrite(str(masks[-1]), rng.choice(np.array(values or [*range(classes), 255], np.uint8), size))
    return SegmentationDataset(folder, images, masks, numbered_table(classes))


def one_line(call, *parts):
    """The call fails with a user error of one line that holds all parts."""
    with pytest.raises(MlmsError) as e:
        call()
    text = str(e.value)
    assert "\n" not in text, text
    for part in parts:
        assert str(part) in text, f"{part!r} is not in: {text}"


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_every_truncation_is_noticed(tmp_path, ending):
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8), (5, 5), 0)
    whole = cv2.imencode(ending, image)[1].tobytes()
    path = tmp_path / f"x{ending}"
    path.write_bytes(whole)
    assert read_image(path).shape == image.shape
    for keep in [0, 1, 5, 30, *range(60, len(whole) - 2, len(whole) // 25), len(whole) - 13, len(whole) - 2]:
        path.write_bytes(whole[:keep])
        one_line(lambda: read_image(path), path)
    path.write_bytes(whole + b"\0" * 100)  # padding behind the end does no harm
    assert read_image(path).shape == image.shape


def test_damaged_png_in_the_middle(tmp_path):
    data = bytearray(cv2.imencode(".png", np.random.default_rng(0).integers(0, 19, (60, 80), dtype=np.uint8))[1].tobytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "x.png").write_bytes(data)
    one_line(lambda: read_label(tmp_path / "x.png"), "x.png")


def test_exif_turn_is_not_applied_to_data_sets(tmp_path):
    from PIL import Image
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (20, 40, 3)
    assert read_image(tmp_path / "x.jpg", orient=True).shape == (40, 20, 3)


def test_label_faults(tmp_path):
    ds = make(tmp_path)
    cv2.imwrite(str(ds.mask_paths[0]), np.full((40, 56), 33, np.uint8))
    one_line(lambda: ds[0], "la0.png", "label value 33", "100.0%")
    cv2.imwrite(str(ds.mask_paths[1]), np.zeros((40, 55), np.uint8))
    one_line(lambda: ds[1], "la1.png", "55x40", "56x40")
    cv2.imwrite(str(ds.mask_paths[2]), np.zeros((40, 56, 3), np.uint8))
    one_line(lambda: ds[2], "la2.png", "3 channels")
    ds.mask_paths[3].unlink()
    one_line(lambda: ds[3], "la3.png", "no such file")
    one_line(lambda: SegmentationDataset(tmp_path, ds.image_paths, ds.mask_paths, ds.table), "la3.png", "missing")
    unchecked = SegmentationDataset(tmp_path, ds.image_paths[:1], ds.mask_paths[:1], ds.table, check=False)
    assert unchecked[0].mask.max() == 33


def test_range_is_checked_once_per_file(tmp_path):
    ds = make(tmp_path)
    ds[0]
    cv2.imwrite(str(ds.mask_paths[0]), np.full((40, 56), 77, np.uint8))
    ds[0]  # seen before
    one_line(lambda: make_again(ds)[0], "77")


def make_again(ds):
    return SegmentationDataset(ds.root, ds.image_paths, ds.mask_paths, ds.table)


def test_negative_index_and_end(tmp_path):
    ds = make(tmp_path, n=3)
    assert ds[-1].name == "im2" and ds[np.int64(1)].name == "im1"
    assert [s.name for s in ds] == ["im0", "im1", "im2"]
    with pytest.raises(IndexError):
        ds[3]


@pytest.mark.parametrize("line", ["../x.png la0.png", "a/../../x.png", "/etc/passwd", "im0.png ../../la0.png", "im0.png /la0.png"])
def test_paths_that_leave_the_root(tmp_path, line):
    root = tmp_path / "root"
    root.mkdir()
    make(root)
    (tmp_path / "x.png").write_bytes((root / "im0.png").read_bytes())
    (root / "l.txt").write_text(line)
    one_line(lambda: ListFile(root, "l.txt", 4), "leaves the root", "line 1")


def test_root_whose_name_begins_alike(tmp_path):
    for name in ("root", "root2"):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    (tmp_path / "root" / "l.txt").write_text(f"{tmp_path}/root2/im0.png {tmp_path}/root2/la0.png")
    one_line(lambda: ListFile(tmp_path / "root", "l.txt", 4), "leaves the root")


def test_linked_folders_work(tmp_path):
    (tmp_path / "far").mkdir()
    make(tmp_path / "far")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "images").symlink_to(tmp_path / "far")
    (tmp_path / "root" / "l.txt").write_text("images/im0.png images/la0.png\n")
    assert ListFile(tmp_path / "root", "l.txt", 4)[0].mask is not None


def test_list_formats(tmp_path):
    make(tmp_path)
    (tmp_path / "l.txt").write_bytes("\ufeff# ü\r\n\r\nim0.png\tla0.png\r\n  im1.png   la1.png  \r\n".encode())
    ds = create_dataset("list", tmp_path, "l", table=4)
    assert ds.names == ["im0", "im1"] and ds.has_labels and ds.split == "l"
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00")
    one_line(lambda: ListFile(tmp_path, "l.txt", 4), "UTF-8")
    (tmp_path / "l.txt").write_text("a\tb\tc")
    one_line(lambda: ListFile(tmp_path, "l.txt", 4), "3 columns")
    (tmp_path / "l.txt").write_text("im0.png la0.png")
    one_line(lambda: ListFile(tmp_path, "l.txt", 300), "1..255")
    one_line(lambda: ListFile(tmp_path, "l.txt", 4, mask_map={0: 300}), "mask_map")
    assert ListFile(tmp_path, "l.txt", "cityscapes").num_classes == 19


def test_camvid_real(shared):
    root = shared / "data" / "camvid"
    if not root.is_dir():
        pytest.skip("no CamVid among the reference data")
    sizes = {s: len(CamVid(root, s)) for s in CamVid.splits}
    assert sizes == {"train": 367, "val": 101, "test": 233, "trainval": 468}
    sample = CamVid(root, "val")[0]
    assert sample.image.shape == (360, 480, 3) and sample.mask.shape == (360, 480)
    assert set(np.unique(sample.mask)) <= {*range(11), 255}
    assert CamVid(root).names[0] == CamVid(root, "trainval").names[0]


def test_unknown_names(tmp_path):
    one_line(lambda: create_dataset("cityscape", tmp_path), "cityscapes")
    one_line(lambda: Cityscapes(tmp_path, "training"), "trainval")
    one_line(lambda: CamVid(tmp_path / "gone"), "no such folder", "mlmsnet data prepare camvid")
    one_line(lambda: CamVid(tmp_path), "camvid_train.txt")


def test_find_shared_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLMSNET_SHARED", str(tmp_path))
    assert find_shared() == tmp_path
    monkeypatch.setenv("MLMSNET_SHARED", str(tmp_path / "gone"))
    assert find_shared() is None


def test_fingerprint_of_a_copy_is_the_same(tmp_path):
    for d in ("a", "b"):
        (tmp_path / d).mkdir()
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    assert a.fingerprint() == b.fingerprint()
    os.utime(a.image_paths[0], (5, 5))
    assert a.fingerprint() == b.fingerprint() and a.fingerprint(times=True) != b.fingerprint(times=True)


# ---- loaders


def batches(ds, workers, seed=3, epochs=((0, 0), (1, 0)), size=2):
    loader = train_loader(ds, TrainTransform(AugmentConfig(crop=(24, 32), photometric=.5)), size, workers=workers, seed=seed)
    out = []
    for epoch, start in epochs:
        loader.set_epoch(epoch, start)
        out.append(list(loader))
    return out


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_workers_and_restart_do_not_matter(tmp_path):
    ds = make(tmp_path, n=9)
    alone, two = batches(ds, 0), batches(ds, 2, epochs=((0, 0), (1, 0), (1, 2), (0, 0)))
    assert same(alone[0], two[0]) and same(alone[1], two[1]) and same(alone[0], two[3])
    assert same(alone[1][2:], two[2])
    assert not same(alone[0], alone[1]) and not same(alone[0], batches(ds, 0, seed=4)[0])
    assert not torch.equal(alone[0][0][2], alone[1][0][2])


def test_global_generators_are_left_alone(tmp_path):
    ds = make(tmp_path, n=4)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(ds, 0)
    assert torch.equal(torch_state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()


@pytest.mark.parametrize("n,size,world", [(10, 2, 1), (11, 2, 2), (23, 3, 4), (8, 4, 2)])
def test_processes_share_an_epoch(n, size, world):
    parts = [EpochBatches(n, size, seed=1, rank=r, world=world) for r in range(world)]
    lists = [[i for batch in p for _, i in batch] for p in parts]
    assert len({len(x) for x in lists}) == 1 == len({len(p) for p in parts})
    flat = sorted(i for x in lists for i in x)
    assert len(set(flat)) == len(flat) == n // (size * world) * size * world
    assert set(flat) == set(epoch_order(n, 1, 0)[:len(flat)].tolist())
    evaluated = [i for r in range(world) for b in EpochBatches(n, size, shuffle=False, drop_last=False, rank=r, world=world) for _, i in b]
    assert sorted(evaluated) == list(range(n))
    filled = [EpochBatches(n, size, drop_last=False, rank=r, world=world).indices() for r in range(world)]
    assert len({len(x) for x in filled}) == 1 and set(np.concatenate(filled)) == set(range(n))


def test_loader_errors(tmp_path):
    ds = make(tmp_path, n=4, sizes=((40, 56), (30, 50)))
    one_line(lambda: train_loader(ds, None, 5), "batch size 5", "4")
    one_line(lambda: train_loader(ds, None, 1, workers=-1), "workers")
    one_line(lambda: list(eval_loader(ds, EvalTransform(), 2)), "different sizes", "56x40")
    assert [x.shape[-2:] for x, *_ in eval_loader(ds, EvalTransform())] == [(40, 56), (30, 50)] * 2
    with pytest.raises(ConfigError):
        EpochBatches(4, 1, rank=2, world=2)


def test_a_broken_file_is_named_through_the_workers(tmp_path):
    ds = make(tmp_path, n=4)
    data = ds.image_paths[2].read_bytes()
    ds.image_paths[2].write_bytes(data[:200])
    for workers in (0, 1):
        one_line(lambda: list(eval_loader(ds, EvalTransform(), workers=workers)), "im2.png: is cut short")  # noqa: B023


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_left_early(tmp_path, workers):
    ds = make(tmp_path, n=9)
    loader = train_loader(ds, TrainTransform(AugmentConfig(crop=(24, 32))), 2, workers=workers, seed=3)
    whole = {}
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        whole[epoch] = list(loader)
    loader.set_epoch(0)
    iterator = iter(loader)
    assert torch.equal(next(iterator)[0], whole[0][0][0])
    loader.set_epoch(1)  # does not reach the iteration that has begun
    assert torch.equal(next(iterator)[0], whole[0][1][0])
    assert same(list(loader), whole[1])


# ---- views and caches


@pytest.mark.parametrize("sizes", [((40, 56),), ((40, 56), (33, 21), (64, 20))])
def test_caches_equal_the_files(tmp_path, sizes):
    (tmp_path / "d").mkdir()
    ds = make(tmp_path / "d", sizes=sizes)
    for cached in (CachedDataset(ds, "ram"), CachedDataset(ds, "disk", tmp_path / "c"), CachedDataset(ds, "disk", tmp_path / "c"),
                   CachedDataset(ds, "none"), pickle.loads(pickle.dumps(CachedDataset(ds, "disk", tmp_path / "c")))):
        assert len(cached) == len(ds) and cached.num_classes == 4 and cached.table == ds.table
        for i in range(len(ds)):
            a, b = ds[i], cached[i]
            assert (a.image == b.image).all() and (a.mask == b.mask).all() and a.name == b.name
    assert len(list((tmp_path / "c").glob("*.npy"))) == 1


def test_cache_without_labels_and_stacked(tmp_path):
    ds = make(tmp_path, n=4)
    test = SegmentationDataset(tmp_path, ds.image_paths, [None] * 4, ds.table)
    assert CachedDataset(test, "disk", tmp_path / "c")[2].mask is None and not test.has_labels
    stack = CachedDataset(ResizedDataset(SubsetDataset(ds, [3, 0]), (20, 28)), "disk", tmp_path / "c")
    assert stack[0].image.shape == (20, 28, 3) and stack[0].name == "im3" and stack.names == ["im3", "im0"]
    assert set(np.unique(stack[1].mask)) <= {0, 1, 2, 3, 255}
    assert not stack[0].image.flags.writeable
    x, y, _ = next(iter(train_loader(stack, TrainTransform(AugmentConfig(crop=(16, 16))), 2)))
    assert x.shape == (2, 3, 16, 16) and x.is_contiguous()


def test_cache_folder_that_cannot_be_written(tmp_path):
    ds = make(tmp_path, n=2)
    (tmp_path / "file").write_text("")
    one_line(lambda: CachedDataset(ds, "disk", tmp_path / "file"), "cache could not be written")


KILLED = """
import os, sys
from mlmsnet.data.datasets import SegmentationDataset
from mlmsnet.data.labels import numbered_table
from mlmsnet.data.loaders import CachedDataset
from pathlib import Path
root, stop = Path(sys.argv[1]), int(sys.argv[2])
class Slow(SegmentationDataset):
    def __getitem__(self, i):
        if i == stop: os.kill(os.getpid(), 9)
        return super().__getitem__(i)
Slow.__name__ = "SegmentationDataset"
n = len(list(root.glob("im*.png")))
ds = Slow(root, [root / f"im{i}.png" for i in range(n)], [root / f"la{i}.png" for i in range(n)], numbered_table(4))
CachedDataset(ds, "disk", root / "c", threads=1)
"""


def test_cache_build_survives_sigkill(tmp_path):
    ds = make(tmp_path, n=12)
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "9"], capture_output=True, timeout=120)
    assert run.returncode == -9, run.stderr.decode()[-500:]
    assert not list((tmp_path / "c").glob("*.npy")) and len(list((tmp_path / "c").glob("*.journal"))) == 1
    cached = CachedDataset(ds, "disk", tmp_path / "c")
    for i in range(12):
        assert (cached[i].image == ds[i].image).all() and (cached[i].mask == ds[i].mask).all()
    assert not list((tmp_path / "c").glob("*.journal")) and not list((tmp_path / "c").glob("*.part"))


def test_subset_and_resize_checks(tmp_path):
    ds = make(tmp_path)
    one_line(lambda: ResizedDataset(ds, (0, 4)), "height, width")
    one_line(lambda: CachedDataset(ds, "gpu"), "ram, disk or none")
    assert (ResizedDataset(ds, (80, 112))[0].mask[::2, ::2] == ds[0].mask).all()
    assert (SubsetDataset(ds, [2]).read_mask(0) == ds.read_mask(2)).all()
