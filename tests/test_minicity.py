"""MiniCity: the same street from the same seed, labels that are the polygons, and a folder that survives accidents."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from mlmsnet.core import ConfigError, DataError
from mlmsnet.data.labels import CITYSCAPES, CITYSCAPES_LABELS, ID_TO_TRAINID
from mlmsnet.data.minicity import MiniCityConfig, draw_scene, scene_name, write_minicity
from mlmsnet.data.polygons import rasterize, rasterize_instances, read_polygons

ROOT = Path(__file__).resolve().parent.parent
SMALL = MiniCityConfig(height=64, width=128)


def files_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def test_labels_are_the_official_table():
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    ours = [(x.name, x.id, x.train_id, x.category, x.category_id, x.has_instances, x.ignore_in_eval, x.color) for x in CITYSCAPES_LABELS]
    assert ours == [tuple(x) for x in official]


def test_same_seed_same_scene_in_another_process():
    code = ("import hashlib; from mlmsnet.data.minicity import *; s = draw_scene(11, MiniCityConfig(96, 192)); "
            "print(hashlib.sha256(s.image.tobytes() + s.label_ids.tobytes() + str(s.polygons).encode()).hexdigest())")
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    draw_scene(3, SMALL)  # what was drawn before must not matter
    s = draw_scene(11, MiniCityConfig(96, 192))
    assert run.stdout.strip() == hashlib.sha256(s.image.tobytes() + s.label_ids.tobytes() + str(s.polygons).encode()).hexdigest()


@pytest.mark.parametrize("size, noise", [((256, 512), 0), ((101, 333), 0), ((32, 32), 0), ((300, 200), 0.8)])
def test_labels_are_the_polygons(size, noise):
    cfg = MiniCityConfig(*size, label_noise=noise)
    for seed in range(4):
        s = draw_scene(seed, cfg)
        assert s.image.shape == (cfg.height, cfg.width, 3) and s.image.dtype == np.uint8
        assert (s.label_ids == rasterize(s.polygons)).all()
        assert (s.train_ids == rasterize(s.polygons, "trainIds")).all()
        assert (s.train_ids == ID_TO_TRAINID[s.label_ids]).all()
        assert json.loads(json.dumps(s.polygons)) == s.polygons  # plain numbers only


def test_all_classes_and_void_occur():
    seen = np.zeros(256, np.int64)
    for seed in range(60):
        seen += np.bincount(draw_scene(seed, SMALL).train_ids.ravel(), minlength=256)
    missing = [CITYSCAPES.names[i] for i in range(19) if not seen[i]]
    assert not missing and seen[255] > 0
    assert seen[19:255].sum() == 0


def test_balance_is_of_the_right_order():
    counts = sum(np.bincount(draw_scene(s, MiniCityConfig(128, 256)).train_ids.ravel(), minlength=256)[:19] for s in range(500, 530))
    share = dict(zip(CITYSCAPES.names, 100 * counts / counts.sum()))
    for name, low, high in [("road", 28, 45), ("building", 12, 30), ("vegetation", 9, 23), ("car", 4, 12), ("sidewalk", 3, 9),
                            ("sky", 2, 10), ("pole", 0.5, 4), ("person", 0.4, 3), ("traffic sign", 0.2, 2)]:
        assert low < share[name] < high, (name, share[name])


def test_knobs_touch_only_what_they_should():
    base = draw_scene(12, MiniCityConfig(128, 256))
    noisy = draw_scene(12, MiniCityConfig(128, 256, label_noise=0.6))
    assert (base.image == noisy.image).all() and (base.label_ids != noisy.label_ids).any()
    assert noisy.polygons != base.polygons and (noisy.label_ids == rasterize(noisy.polygons)).all()
    for change in ({"fog": 0.7}, {"contrast": 0.3}):
        other = draw_scene(12, MiniCityConfig(128, 256, **change))
        assert (other.label_ids == base.label_ids).all() and (other.image != base.image).any()
    assert draw_scene(12, MiniCityConfig(128, 256, contrast=0.3)).image.std() < 0.5 * base.image.std()
    thin = [i for i, n in enumerate(CITYSCAPES.names) if n in ("pole", "traffic sign", "traffic light", "person", "rider", "bicycle")]
    def share(rarity):
        return sum(np.isin(draw_scene(s, MiniCityConfig(64, 128, rarity=rarity)).train_ids, thin).mean() for s in range(10))
    some = [share(r) for r in (0.0, 0.5, 1.0)]
    assert some[0] > some[1] > some[2] and some[2] < 0.1 * some[0]


def test_official_scripts_make_the_same_train_ids(tmp_path, monkeypatch):
    official = pytest.importorskip("cityscapesscripts.preparation.createTrainIdLabelImgs")
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    write_minicity(tmp_path, train=6, val=3, cfg=MiniCityConfig(128, 256), progress=False, instances=True)
    write_minicity(tmp_path / "noisy", train=3, val=1, cfg=MiniCityConfig(100, 220, label_noise=1.0), progress=False)
    for root, n in ((tmp_path, 9), (tmp_path / "noisy", 4)):
        ours = {p: cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in sorted((root / "gtFine").rglob("*_labelTrainIds.png"))}
        assert len(ours) == n
        for p in ours:
            p.unlink()
        monkeypatch.setenv("CITYSCAPES_DATASET", str(root))
        official.main()
        for p, mask in ours.items():
            assert (cv2.imread(str(p), cv2.IMREAD_UNCHANGED) == mask).all(), p.name
    one = sorted((tmp_path / "gtFine").rglob("*_polygons.json"))[0]
    png = Path(str(one).replace("polygons.json", "instanceIds.png"))
    mine = cv2.imread(str(png), cv2.IMREAD_UNCHANGED)
    annotation = Annotation()  # not json2instanceImg: recent Pillow cannot write its 32-bit image as PNG
    annotation.fromJsonFile(str(one))
    assert (mine == np.array(createInstanceImage(annotation, "ids"))).all()
    assert (mine == rasterize_instances(read_polygons(one))).all()


def test_layout_and_values_on_disk(tmp_path):
    write_minicity(tmp_path, train=4, val=1, test=1, cfg=SMALL, seed=5, progress=False)
    images = sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "leftImg8bit").rglob("*.png"))
    assert f"leftImg8bit/train/lindhafen/{scene_name('train', 3)}_leftImg8bit.png" in images and len(images) == 6
    for image in images:
        truth = image.replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit", "_gtFine_labelTrainIds")
        mask = cv2.imread(str(tmp_path / truth), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (64, 128) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {*range(19), 255}
        ids = cv2.imread(str(tmp_path / truth.replace("labelTrainIds", "labelIds")), cv2.IMREAD_UNCHANGED)
        assert (ID_TO_TRAINID[ids] == mask).all()


def test_resumes_after_a_kill_and_grows(tmp_path):
    code = ("import sys; from mlmsnet.data.minicity import *; "
            "write_minicity(sys.argv[1], train=12, val=4, cfg=MiniCityConfig(height=64, width=128), progress=False)")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_minicity(whole, train=12, val=4, cfg=SMALL, progress=False)
    child = subprocess.Popen([sys.executable, "-c", code, str(cut)], cwd=ROOT)
    deadline = time.time() + 60
    while time.time() < deadline and child.poll() is None and len(list(cut.rglob("*_leftImg8bit.png"))) < 3:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = {p: p.stat().st_mtime_ns for p in cut.rglob("*_leftImg8bit.png")}
    assert done
    for p in done:
        assert cv2.imread(str(p)) is not None  # never half a picture under the final name
    write_minicity(cut, train=12, val=4, cfg=SMALL, progress=False)
    kept = {k: v for k, v in files_of(cut).items() if not k.endswith(".part")}
    assert kept == files_of(whole)
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    write_minicity(cut, train=14, val=4, cfg=SMALL, progress=False)
    assert all(files_of(cut)[k] == v for k, v in files_of(whole).items())


def test_processes_draw_the_same(tmp_path):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core only")
    write_minicity(tmp_path / "a", train=5, val=1, cfg=SMALL, progress=False)
    write_minicity(tmp_path / "b", train=5, val=1, cfg=SMALL, workers=2, progress=False)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_refuses_what_is_not_its_own(tmp_path):
    write_minicity(tmp_path / "a", train=1, val=0, cfg=SMALL, progress=False)
    before = files_of(tmp_path / "a")
    for change in ({"seed": 1}, {"cfg": replace(SMALL, label_noise=0.2)}, {"cfg": replace(SMALL, width=130)}):
        with pytest.raises(DataError, match="holds other MiniCity scenes"):
            write_minicity(tmp_path / "a", train=1, val=0, progress=False, **{"cfg": SMALL, **change})
    assert files_of(tmp_path / "a") == before
    (tmp_path / "real" / "gtFine").mkdir(parents=True)
    with pytest.raises(DataError, match="not MiniCity"):
        write_minicity(tmp_path / "real", train=1, val=0, cfg=SMALL, progress=False)
    with pytest.raises(DataError, match="cannot|could not"):
        (tmp_path / "file").write_text("x")
        write_minicity(tmp_path / "file" / "town", train=1, val=0, cfg=SMALL, progress=False)


@pytest.mark.parametrize("bad", [{"rarity": 2}, {"height": 8}, {"fog": -1}, {"contrast": "much"}, {"label_noise": None}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        MiniCityConfig(**bad)


def test_light_import():
    code = "import sys, mlmsnet.data.minicity; print([m for m in ('matplotlib', 'yaml', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
