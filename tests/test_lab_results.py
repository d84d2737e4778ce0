"""The results explorer: its numbers are those of the records, its pixels those that NumPy counts, its page works without a kernel."""
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from _browser import Watch, launch

pytest.importorskip("ipywidgets")

from mlmsnet.core import ConfigError, DataError, load_json, save_json
from mlmsnet.data.labels import get_table
from mlmsnet.data.minicity import MINICITY_VERSION, MiniCityConfig, scene_name, split_scene
from mlmsnet.labs.loss_results import (
    LossResults,
    Pictures,
    class_figure,
    comparisons,
    difference_map,
    heat_figure,
    heat_values,
    leaderboard_html,
    load_results,
    pictures_figure,
)

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "results" / "minicity_demo"
NAMES = get_table("minicity").names
SIZE = MiniCityConfig(32, 64)


def make_run(folder, loss, seed, rng, pictures=0, fail=None):
    """A record as `mlmsnet compare` leaves it, with random numbers; bus never occurs"""
    folder.mkdir(parents=True)
    text = (DEMO / "ohem" / "config.yaml").read_text().replace("name: ohem", f"name: {loss}").replace("seed: 0", f"seed: {seed}")
    (folder / "config.yaml").write_text(text)
    status = {"status": "failed", "reason": fail} if fail else {"status": "finished"}
    save_json({"format": 1, "classes": list(NAMES), "seed": seed, **status}, folder / "summary.json")
    if fail:
        return
    iou, acc, edge, share = rng.random((4, 19)).tolist()
    iou[15] = acc[15] = edge[15] = None
    mean = float(np.mean([v for v in iou if v is not None]))
    metrics = {"miou": mean, "macc": 0.5, "allacc": 0.9, "iou": iou, "acc": acc, "names": list(NAMES)}
    metrics["share"] = [s / sum(share) for s in share]
    boundary = {"miou": 0.3, "iou": dict(zip(NAMES, edge))}
    save_json({"metrics": metrics, "split": "val", "boundary": boundary}, folder / "evaluation_val.json")
    for i in range(pictures):
        truth, path = split_scene("val", i, SIZE).train_ids, folder / "predictions" / "gray" / f"{scene_name('val', i)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        wrong = rng.random(truth.shape) < 0.3
        cv2.imwrite(str(path), np.where(wrong | (truth == 255), rng.integers(0, 19, truth.shape), truth).astype(np.uint8))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("results") / "made", np.random.default_rng(0)
    for loss in ("cross_entropy", "dice", "ohem"):
        for seed in range(2):
            make_run(root / loss / f"seed{seed}", loss, seed, rng, pictures=3 if seed == 0 else 0)
    make_run(root / "focal" / "seed0", "focal", 0, rng, fail="FloatingPointError: nan <at step 3>")
    save_json({"minicity": MINICITY_VERSION, "seed": 0, **asdict(SIZE)}, root / "minicity" / "minicity.json")
    return root


@pytest.fixture(scope="module")
def lab(comparison):
    return LossResults(comparison)


def recorded(root, loss, read):
    rows = [read(load_json(f)) for f in sorted((root / loss).glob("**/evaluation_val.json"))]
    return np.array([[np.nan if v is None else v for v in row] for row in rows], float)


READ = {"iou": lambda e: e["metrics"]["iou"], "acc": lambda e: e["metrics"]["acc"],
        "boundary": lambda e: [e["boundary"]["iou"][n] for n in NAMES]}


@pytest.mark.parametrize("metric", READ)
def test_heat_map_is_the_records(comparison, metric):
    results = load_results(comparison)
    values = heat_values(results, metric)
    for loss, row in zip(results.losses, values):
        expected = recorded(comparison, loss, READ[metric]).mean(0)
        np.testing.assert_allclose(row[:19], expected)
        assert np.isnan(row[15]) and row[19] == pytest.approx(np.mean(np.delete(expected, 15)))
    base = results.losses.index("dice")
    np.testing.assert_allclose(heat_values(results, metric, "dice"), values - values[base])
    fig = heat_figure(results, metric, "dice")
    shown = [t.get_text() for t in fig.axes[0].texts]
    assert len(shown) == 3 * 20 and shown.count("–") == 3
    k = 20 * 0 + 3
    assert shown[k].replace("−", "-") == f"{100 * (values - values[base])[0, 3]:+.0f}"


def test_heat_map_of_the_real_demo():
    results = load_results(DEMO)
    for loss, row in zip(results.losses, heat_values(results)):
        metrics = load_json(DEMO / loss / "evaluation_val.json")["metrics"]
        np.testing.assert_allclose(row[:19], [np.nan if v is None else v for v in metrics["iou"]])
        assert row[19] == pytest.approx(metrics["miou"])
    assert list(results.losses) == sorted(results.losses, key=lambda n: -load_json(DEMO / n / "evaluation_val.json")["metrics"]["miou"])
    assert "boundary" not in results.metrics  # nobody measured it, so nobody can choose it


def test_camvid_demo_has_names_of_folders():
    assert set(load_results(ROOT / "results" / "camvid_cpu").losses) == {"scratch", "imagenet"}


def test_leaderboard(comparison):
    results, page = load_results(comparison), leaderboard_html(load_results(comparison))
    miou = [load_json(f)["metrics"]["miou"] for f in sorted((comparison / "dice").glob("*/evaluation_val.json"))]
    assert f"{100 * np.mean(miou):.1f} ± {100 * np.std(miou, ddof=1):.1f}" in page
    assert "focal/seed0 (FloatingPointError: nan &lt;at step 3&gt;)" in page and "focal" not in results.losses
    assert [page.index(f">{loss}<") for loss in results.losses] == sorted(page.index(f">{loss}<") for loss in results.losses)


def test_ranking_on_a_class(comparison):
    results = load_results(comparison)
    ax = class_figure(results, 5, "acc").axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    means = [recorded(comparison, n, READ["acc"]).mean(0)[5] for n in names]
    assert means == sorted(means)  # the best one is on top
    for y, name in enumerate(names):
        dots = next(line for line in ax.lines if set(line.get_ydata()) == {y})
        np.testing.assert_allclose(sorted(dots.get_xdata()), sorted(100 * recorded(comparison, name, READ["acc"])[:, 5]))
    assert any("not recorded" in t.get_text() for t in class_figure(results, 15).axes[0].texts)


def test_difference_map_counts_like_numpy():
    rng = np.random.default_rng(1)
    truth, base, other = rng.integers(0, 4, (3, 40, 60))
    truth[rng.random(truth.shape) < 0.1] = 255
    for cls in (None, 2):
        state = difference_map(truth, base, other, cls)
        count = dict.fromkeys((0, 1, 2, 3, 255), 0)
        for t, b, o in zip(truth.flat, base.flat, other.flat):
            if t == 255 or (cls is not None and cls not in (t, b, o)):
                count[255] += 1
                continue
            right_b, right_o = (b == t, o == t) if cls is None else ((b == cls) == (t == cls), (o == cls) == (t == cls))
            count[0 if right_b and right_o else 2 if right_o else 3 if right_b else 1] += 1
        assert {k: int((state == k).sum()) for k in count} == count
    with pytest.raises(DataError, match="differ in size"):
        difference_map(truth, base, other[:5])


def test_pictures(comparison):
    results = load_results(comparison)
    pictures = Pictures(results, comparison)
    assert len(pictures.names) == 3
    name = pictures.names[1]
    image, truth = pictures.truth(name)
    i = next(i for i in range(3) if scene_name("val", i) == name)
    assert (truth == split_scene("val", i, SIZE).train_ids).all() and image.shape == (32, 64, 3)
    fig = pictures_figure(pictures, name, "cross_entropy", ("dice", "cross_entropy"), cls=2)
    titles = [ax.get_title() for ax in fig.axes]
    state = difference_map(truth, pictures.prediction("cross_entropy", name), pictures.prediction("dice", name), 2)
    assert titles == ["image", "cross_entropy", "dice", "truth", titles[4], f"+{(state == 2).sum():,} −{(state == 3).sum():,} px"]


def test_pictures_from_a_data_set(comparison, tmp_path):
    """With the data set on disk, image and truth come from there"""
    from mlmsnet.data.minicity import write_minicity
    write_minicity(tmp_path / "town", train=1, val=3, cfg=SIZE, progress=False)
    pictures = Pictures(load_results(comparison), tmp_path, data_root=tmp_path / "town")
    redrawn = Pictures(load_results(comparison), comparison)
    for name in pictures.names:
        assert all((a == b).all() for a, b in zip(pictures.truth(name), redrawn.truth(name)))


def test_settings_of_the_scenes_from_the_table(comparison, tmp_path):
    """Committed records hold no scenes: the settings in comparison.json do"""
    root = tmp_path / "copy"
    shutil.copytree(comparison, root)
    settings = load_json(root / "minicity" / "minicity.json")
    shutil.rmtree(root / "minicity")
    with pytest.raises(DataError, match="data_root"):
        Pictures(load_results(root), root)
    save_json({"format": 1, "minicity": settings, "losses": [], "runs": []}, root / "comparison.json")
    assert len(Pictures(load_results(root), root).names) == 3


def test_no_predictions_says_what_to_run():
    lab = LossResults(DEMO)
    assert lab.pictures is None and "--pictures 12" in lab.missing and lab.missing in lab.static_html()


def test_groups(comparison, tmp_path):
    for town in ("low", "high"):
        shutil.copytree(comparison, tmp_path / "e" / town, ignore=shutil.ignore_patterns("predictions"))
    shutil.rmtree(tmp_path / "e" / "low" / "ohem")
    assert {k: len(v) for k, v in comparisons(tmp_path / "e").items()} == {"high": 7, "low": 5}
    lab = LossResults(tmp_path / "e")
    assert lab.groups == ["high", "low"] and "ohem" in lab.results.losses
    lab.select.value = "low"
    assert "ohem" not in lab.results.losses
    with pytest.raises(DataError, match="Did you mean high"):
        LossResults(tmp_path / "e", "hihg")
    with pytest.raises(ConfigError, match="Did you mean dice"):
        LossResults(tmp_path / "e", base="dise")


def test_controls_redraw(lab):
    for part, moves in ((lab.heat, [{"metric": "boundary"}, {"against": "dice"}]), (lab.one_class, [{"cls": 3}, {"metric": "acc"}]),
                        (lab.pictures, [{"name": lab.pictures_of.names[2]}, {"cls": 2}, {"base": "dice"}, {"others": ("cross_entropy",)}])):
        for move in moves:
            before = part.image.value
            part.set(**move)
            assert part.image.value != before and part.message.value == "", move


def test_page(lab, tmp_path):
    page = lab.static_html()
    blocks = [json.loads(t) for t in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    assert [len(b["frames"]) for b in blocks] == [6, 19, 3] and sum(len(b["frames"]) for b in blocks) <= 30
    assert len(page) < 1_000_000 and "http" not in page
    file = tmp_path / "results.html"
    file.write_text("<!doctype html><meta charset=utf-8>" + page)
    with launch() as browser:
        tab = browser.new_page(viewport={"width": 390, "height": 900})
        watch = Watch(tab, (file.as_uri(),))
        tab.goto(file.as_uri())
        boxes = tab.locator(".mlms-explorer").filter(has=tab.locator("img"))
        for i, label in enumerate(("metric", "class", "image")):
            img = boxes.nth(i).locator("img")
            old, alt = img.get_attribute("src"), img.get_attribute("alt")
            select = boxes.nth(i).get_by_role("combobox", name=label)
            select.focus()
            tab.keyboard.press("End" if select.input_value() != select.locator("option").last.inner_text() else "Home")
            assert img.get_attribute("src") != old and img.get_attribute("alt") != alt
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        watch.check()
