"""Statistics of comparisons: resampling by its definition, scipy as a peer, coverage where the truth is known, counts per image."""
import itertools
import os
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mlmsnet.comparing.statistics import (
    Arm,
    class_differences,
    class_iou,
    compare_to_base,
    miou_of,
    noise_floor,
    paired_bootstrap,
    resampled_scores,
    score_of,
    t_quantile,
    welch,
)
from mlmsnet.core import ConfigError, DataError
from mlmsnet.data.labels import CITYSCAPES
from mlmsnet.evaluation.evaluate import PerImage, evaluate, images_path, load_images, save_images
from mlmsnet.training.metrics import ConfusionMatrix, metrics_from_counts

CLASSES = tuple("abcde")


def world(n, seed):
    rng = np.random.default_rng([1, seed])
    return rng.multinomial(2000, [0.5, 0.3, 0.12, 0.06, 0.02], n), rng.normal(0, 1, n)


def arm(scene, skill=0.0, seed=0):
    "Counts of an arm: every image is harder or easier for all arms alike"
    target, hard = scene
    rng = np.random.default_rng([2, seed, round(100 * skill) + 1000])
    z = np.array([4, 3, 2, 1, 0]) + skill - hard[:, None] + 0.2 * rng.normal(size=target.shape)
    hit = np.round(target / (1 + np.exp(-z))).astype(np.int64)
    wrong = rng.multinomial((target - hit).sum(1), [0.4, 0.3, 0.1, 0.1, 0.1])
    return PerImage(tuple(f"i{k}" for k in range(len(target))), np.stack([hit, target, hit + wrong], -1), CLASSES)


def test_scores_are_those_of_the_metrics():
    rng = np.random.default_rng(0)
    for case in range(20):
        matrix = rng.integers(0, 50, (5, 5)) * (rng.random((5, 1)) < 0.8) * (rng.random((1, 5)) < 0.8)
        counts = np.stack([np.diag(matrix), matrix.sum(1), matrix.sum(0)], 1)
        m = metrics_from_counts(matrix)
        if matrix.sum() == 0:
            continue
        assert [score_of(counts, s) for s in ("miou", "macc", "allacc")] == pytest.approx([m.miou, m.macc, m.allacc], abs=1e-12), case
        np.testing.assert_allclose(class_iou(counts), [np.nan if v is None else v for v in m.iou])


def test_resampling_by_its_definition():
    scene = world(40, 0)
    runs = [arm(scene, 0.2, s) for s in range(2)] + [arm(scene, 0, s) for s in range(3)]
    fast = resampled_scores(runs, resamples=60, seed=5)
    rng, slow = np.random.default_rng(5), []
    for _ in range(60):
        drawn = rng.integers(40, size=40)
        slow.append([score_of(sum(r.counts[i] for i in drawn)) for r in runs])
    np.testing.assert_allclose(fast, np.transpose(slow), rtol=1e-12)
    d = paired_bootstrap(runs[:2], runs[2:], resamples=60, seed=5)
    diffs = fast[:2].mean(0) - fast[2:].mean(0)
    assert (d.low, d.high) == pytest.approx(tuple(np.quantile(diffs, [0.025, 0.975])))
    assert d.mean == pytest.approx(np.mean([miou_of(r) for r in runs[:2]]) - np.mean([miou_of(r) for r in runs[2:]]))
    assert d.p_sign == np.mean(diffs * np.sign(d.mean) <= 0)


def test_many_images_are_cut_into_pieces_without_a_trace(monkeypatch):
    big = PerImage(tuple(map(str, range(900))), np.tile(arm(world(30, 1)).counts, (30, 1, 1)), CLASSES)
    scores = resampled_scores([big], resamples=1200, seed=0)  # more than one piece
    assert scores.shape == (1, 1200) and np.unique(scores).size > 1100  # no piece repeats another's draws
    assert scores.std() < resampled_scores([arm(world(30, 1))], resamples=1200).std() / 4  # 30 times the images


def test_scipy_agrees():
    stats = pytest.importorskip("scipy.stats")
    scene = world(50, 3)
    a, b = arm(scene, 0.15), arm(scene)

    def difference(i):
        return score_of(a.counts[i].sum(0)) - score_of(b.counts[i].sum(0))
    peer = stats.bootstrap((np.arange(50),), difference, n_resamples=1500, vectorized=False, method="percentile", random_state=0)
    ours = paired_bootstrap(a, b, resamples=20_000)
    width = ours.high - ours.low
    assert abs(peer.confidence_interval.low - ours.low) < 0.06 * width and abs(peer.confidence_interval.high - ours.high) < 0.06 * width
    for p, df in itertools.product((0.6, 0.9, 0.975, 0.999), (1, 2, 3.7, 11, 240)):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8)
    x, y = [0.41, 0.43, 0.425], [0.40, 0.405, 0.38, 0.41]
    peer = stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    assert (welch(x, y).low, welch(x, y).high) == pytest.approx((peer.low, peer.high), rel=1e-8)


def test_coverage_of_the_interval():
    "In a world of 4000 images, 95 % intervals from 100 of them hold the difference in 91 to 98 of 100 cases; pairing is much narrower"
    scene = world(4000, 7)
    a, b = arm(scene, 0.2), arm(scene)
    truth, rng, held, narrow = miou_of(a) - miou_of(b), np.random.default_rng(0), [], []
    for case in range(200):
        i = rng.integers(4000, size=100)
        names = tuple(map(str, range(100)))
        x, y = PerImage(names, a.counts[i], CLASSES), PerImage(names, b.counts[i], CLASSES)
        d = paired_bootstrap(x, y, resamples=600, seed=case)
        held.append(d.low <= truth <= d.high)
        if case < 20:
            apart = resampled_scores([x], resamples=600, seed=1)[0] - resampled_scores([y], resamples=600, seed=2)[0]
            narrow.append((d.high - d.low) / np.ptp(np.quantile(apart, [0.025, 0.975])))
    assert 0.91 <= np.mean(held) <= 0.98, np.mean(held)
    assert np.median(narrow) < 0.5


def test_seeds_can_be_drawn_again_too():
    "The variance of the mean over three seeds is s²/3, not two thirds of it"
    scene = world(60, 4)
    runs = [arm(scene, s) for s in (0.0, 0.3, 0.5, 0.1, 0.2, 0.45)]
    flat = [PerImage(r.names, np.tile(r.counts.sum(0, keepdims=True), (60, 1, 1)), CLASSES) for r in runs]
    d = paired_bootstrap(flat[:3], flat[3:], resamples=20_000, resample_seeds=True)  # equal images: only seeds are left
    fixed = paired_bootstrap(flat[:3], flat[3:], resamples=200)
    assert fixed.low == pytest.approx(fixed.mean) == fixed.high
    spread = [np.var([miou_of(r) for r in group], ddof=1) / 3 for group in (flat[:3], flat[3:])]
    assert d.low < d.mean < d.high
    wide = paired_bootstrap(flat[:3], flat[3:], resamples=20_000, resample_seeds=True, level=0.6827)
    assert (wide.high - wide.low) / 2 == pytest.approx(np.sqrt(sum(spread)), rel=0.35)  # coarse: 9 × 9 values
    with pytest.raises(ConfigError, match="two or more seeds"):
        paired_bootstrap(flat[0], flat[1], resample_seeds=True)


def test_classes_that_are_rare_or_absent():
    scene = world(50, 5)
    a, b = arm(scene, 0.3), arm(scene)
    some = np.arange(50)[:, None, None] < 2
    rare = [PerImage(r.names, np.where(some, r.counts, r.counts * np.array([1, 1, 1, 1, 0])[:, None]), CLASSES) for r in (a, b)]
    found = class_differences(*rare, resamples=4000)
    assert found["e"].resamples == pytest.approx(4000 * (1 - (48 / 50) ** 50), rel=0.05) and found["a"].resamples == 4000
    absent = [PerImage(r.names, r.counts * np.array([1, 1, 1, 1, 0])[:, None], CLASSES) for r in (a, b)]
    found = class_differences(*absent, resamples=50)
    assert np.isnan(found["e"].mean) and not found["e"].clear and np.isfinite(found["d"].mean)
    assert paired_bootstrap(*absent, resamples=50).mean == pytest.approx(miou_of(absent[0]) - miou_of(absent[1]))


def test_what_cannot_be_compared():
    a, b = arm(world(20, 0)), arm(world(20, 1))
    with pytest.raises(DataError, match="other labels, or at another size"):
        paired_bootstrap(a, b)
    with pytest.raises(DataError, match="other classes"):
        paired_bootstrap(a, PerImage(a.names, a.counts, tuple("vwxyz")))
    with pytest.raises(DataError, match=r"other images \(i19\)"):
        paired_bootstrap(a, PerImage(a.names[:-1], a.counts[:-1], CLASSES))
    with pytest.raises(DataError, match="one name twice"):
        paired_bootstrap(*(PerImage((*"xy", n, *a.names[3:]), a.counts, CLASSES) for n in "xy"))
    with pytest.raises(ConfigError, match="Did you mean miou"):
        paired_bootstrap(a, a, "moiu")
    with pytest.raises(ConfigError, match="without runs"):
        paired_bootstrap([], a)
    with pytest.raises(ConfigError, match="has no result"):
        compare_to_base({"x": Arm((None,)), "y": Arm((0.4,))}, "x")


def test_the_floor_holds_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n, other in ((2, 2), (3, 3), (3, 5)):
        draws = rng.normal(0.4, 0.01, (3000, n + other))
        held = np.mean([abs(x[:n].mean() - x[n:].mean()) <= noise_floor(list(x[:n]), n, other).floor for x in draws])
        assert 0.938 <= held <= 0.962, (n, held)
    pooled = np.mean([abs(x[0].mean() - x[1].mean()) <= noise_floor(list(x), 3).floor for x in rng.normal(0.4, 0.01, (1500, 6, 3))])
    assert 0.935 <= pooled <= 0.965


def test_it_is_fast_enough():
    scene = (np.tile(world(100, 0)[0], (5, 4))[:, :19], np.tile(world(100, 0)[1], 5))
    counts = np.stack([scene[0] // 2, scene[0], scene[0]], -1)
    big = PerImage(tuple(map(str, range(500))), counts.astype(np.int64), CITYSCAPES.names)
    start = time.process_time()
    paired_bootstrap(big, big)  # 10 000 resamples of 500 images with 19 classes
    assert time.process_time() - start < 8  # about half a second of one core; room for a busy machine


# --- counts per image ---------------------------------------------------------------------------------------------


class Constant(torch.nn.Module):
    def forward(self, x):
        out = torch.zeros(len(x), 19, *x.shape[-2:])
        out[:, 3, :, ::2] = 1
        return {"out": out + torch.nn.functional.one_hot((x[:, 0] > 0).long(), 19).movedim(-1, 1)}


class Split(list):
    table = CITYSCAPES


def split(n=7):
    rng = np.random.default_rng(0)
    items = []
    for i in range(n):
        mask = rng.integers(0, 19, (20, 30)).astype(np.uint8)
        mask[rng.random(mask.shape) < 0.1] = 255
        image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        items.append(SimpleNamespace(image=image, mask=None if i == 2 else mask, name=f"town/{i:03d}"))
    return Split(items)


def test_counts_of_images_are_exact(tmp_path):
    data = split()
    result = evaluate(Constant(), data, report=False)
    images = result.per_image
    assert images.names == tuple(s.name for s in data if s.mask is not None) and images.counts.dtype == np.int64
    assert images.belongs_to(result.counts)
    alone = evaluate(Constant(), Split([data[4]]), report=False)
    m = np.array(alone.counts)
    np.testing.assert_array_equal(images.counts[images.names.index(data[4].name)], np.stack([np.diag(m), m.sum(1), m.sum(0)], 1))
    assert miou_of(images) == pytest.approx(result.metrics.miou, abs=1e-12)
    assert "per_image" not in result.to_dict()

    record = tmp_path / "evaluation_val.json"
    save_images(result, record)
    assert images_path(record).name == "images_val.npz" and not list(tmp_path.glob(".*"))
    again = load_images(record, result.to_dict())
    assert again.names == images.names and again.classes == images.classes
    np.testing.assert_array_equal(again.counts, images.counts)
    assert load_images(record, alone.to_dict()) is None  # the counts of another evaluation
    result.per_image = None
    save_images(result, record)
    assert load_images(record, result.to_dict()) is None


def test_a_pickle_is_not_opened(tmp_path):
    path = tmp_path / "images_val.npz"
    np.savez(path, names=np.array([print], dtype=object), counts=np.zeros((1, 1, 3), np.int64), classes=np.array(["a"]))
    with pytest.raises(DataError, match="run `mlmsnet evaluate` again"):
        PerImage.load(path)
    with pytest.raises(DataError, match="need int64"):
        PerImage(("a",), np.zeros((1, 2, 3)), ("x", "y"))


def test_another_matrix_is_recognised():
    m = ConfusionMatrix(3).update(np.array([[0, 1, 2]]), np.array([[0, 1, 1]])).counts
    images = PerImage(("a",), np.stack([m.diagonal(), m.sum(1), m.sum(0)], 1).astype(np.int64)[None], tuple("xyz"))
    assert images.belongs_to(m) and not images.belongs_to(m[:2, :2]) and not images.belongs_to(m + 1)


def _worker(rank, world_size, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    result = evaluate(Constant(), split(), report=False)
    result.per_image.save(out / f"images_{rank}.npz")
    assert result.per_image.belongs_to(result.counts)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_processes_gather_their_images(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, (2, port, tmp_path), nprocs=2)
    alone = evaluate(Constant(), split(), report=False).per_image
    for rank in range(2):
        found = PerImage.load(tmp_path / f"images_{rank}.npz")
        assert found.names == alone.names
        np.testing.assert_array_equal(found.counts, alone.counts)
