"""The one-warp augmentation: same distributions and same pixels as the sequential chain, void outside, nothing modified."""
import time

import cv2
import numpy as np
import pytest
import torch

from mlmsnet.core import ConfigError, DataError, rng_for
from mlmsnet.data.datasets import Sample
from mlmsnet.data.transforms import (
    AugmentConfig,
    Draw,
    EvalTransform,
    TrainTransform,
    color_matrix,
    crop_matrix,
    denormalize,
    draw_augment,
    normalize,
    warp,
)


def chain(image, mask, cfg, d, nearest=cv2.INTER_NEAREST_EXACT):
    """Resize, rotate, blur, flip, pad, crop, one after the other in float32 (reference)."""
    color = [255 * m for m in cfg.mean]
    image = cv2.resize(np.float32(image), None, fx=d.scale, fy=d.scale, interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, None, fx=d.scale, fy=d.scale, interpolation=nearest)
    h, w = mask.shape
    if d.angle:
        turn = cv2.getRotationMatrix2D((w / 2, h / 2), d.angle, 1)
        image = cv2.warpAffine(image, turn, (w, h), flags=cv2.INTER_LINEAR, borderValue=color)
        mask = cv2.warpAffine(mask, turn, (w, h), flags=cv2.INTER_NEAREST, borderValue=255)
    if d.blur:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if d.flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    (ch, cw), pad = cfg.crop, []
    for n, c in ((h, cfg.crop[0]), (w, cfg.crop[1])):
        pad += [max(0, c - n) // 2, max(0, c - n) - max(0, c - n) // 2]
    image = cv2.copyMakeBorder(image, *pad, cv2.BORDER_CONSTANT, value=color)
    mask = cv2.copyMakeBorder(mask, *pad, cv2.BORDER_CONSTANT, value=255)
    y, x = int(d.top * (mask.shape[0] - ch + 1)), int(d.left * (mask.shape[1] - cw + 1))
    return image[y:y + ch, x:x + cw], mask[y:y + ch, x:x + cw]


def scene(h=301, w=517):
    """A smooth image and regions, at an odd size."""
    yy, xx = np.mgrid[:h, :w]
    image = np.stack([127 + 100 * np.sin(xx / 60 + c) * np.cos(yy / 45 - c) for c in range(3)], -1).round().astype(np.uint8)
    return image, ((xx // 90 + 2 * (yy // 70)) % 19).astype(np.uint8)


@pytest.mark.parametrize("crop", [(161, 193), (97, 400), (340, 560)])
def test_agrees_with_the_chain(crop):
    image, mask = scene()
    cfg, equal = AugmentConfig(crop=crop), []
    for i in range(20):
        d = draw_augment(cfg, rng_for(11, i))
        (a, am), (b, bm) = chain(image, mask, cfg, d), warp(image, mask, crop, d, [255 * m for m in cfg.mean])
        assert b.shape == (*crop, 3) and bm.shape == crop and b.dtype == bm.dtype == np.uint8
        inside = cv2.erode(((am != 255) & (bm != 255)).astype(np.uint8), np.ones((13, 13)), borderValue=0) > 0
        if inside.any():
            diff = np.abs(a - b)[inside]
            assert diff.mean() < 0.4 and diff.max() < 2, d
        # where the frame is smaller than the crop, the chain cuts turned corners off and the warp shows them: not compared
        equal.append((am == bm)[(am != 255) & (bm != 255)].mean())
    assert np.mean(equal) > 0.99 and min(equal) > 0.98


def test_no_resampling_is_exact():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8), rng.integers(0, 19, (50, 70), dtype=np.uint8)
    for d in (Draw(), Draw(flip=True), Draw(top=.5, left=.99), Draw(flip=True, top=.2, left=.6)):
        for crop in ((20, 30), (50, 70), (61, 90)):
            (a, am), (b, bm) = chain(image, mask, AugmentConfig(crop=crop, mean=(0, 0, 0)), d), warp(image, mask, crop, d)
            assert (a.astype(np.uint8) == b).all() and (am == bm).all()


def test_blur_agrees_up_to_the_edge_of_the_crop():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    mask = np.zeros((60, 80), np.uint8)
    d = Draw(blur=True, top=.5, left=.5)
    a, _ = chain(image, mask, AugmentConfig(crop=(20, 30)), d)
    b, _ = warp(image, mask, (20, 30), d)
    assert np.abs(a - b).max() <= 1


def test_mask_holds_only_source_labels_and_void():
    mask = np.random.default_rng(0).choice(np.array([0, 7, 13, 255], np.uint8), (64, 96))
    t = TrainTransform(AugmentConfig(crop=(80, 80)))
    for i in range(30):
        _, y = t(Sample(np.zeros((64, 96, 3), np.uint8), mask, "x"), rng_for(i))
        assert set(y.unique().tolist()) <= {0, 7, 13, 255}


def test_ignore_index_and_mean_outside():
    cfg = AugmentConfig(crop=(100, 100), scale_max=.5)
    x, y = TrainTransform(cfg, ignore_index=19)(Sample(*scene(40, 40), "x"), rng_for(1))
    outside = cv2.erode((y.numpy() == 19).astype(np.uint8), np.ones((9, 9))) > 0
    assert outside.mean() > .5 and x[:, torch.from_numpy(outside)].abs().max() < 0.02


def test_distributions():
    cfg = AugmentConfig()
    draws = [draw_augment(cfg, rng_for(3, i)) for i in range(6000)]
    for values, low, high in (([d.scale for d in draws], .5, 2), ([d.angle for d in draws if d.angle], -10, 10),
                              ([d.top for d in draws], 0, 1), ([d.left for d in draws], 0, 1)):
        share = np.histogram(values, bins=10, range=(low, high))[0] / len(values)
        assert np.abs(share - .1).max() < .02
    for share in ([d.angle != 0 for d in draws], [d.blur for d in draws], [d.flip for d in draws]):
        assert abs(np.mean(share) - .5) < .03
    assert abs(np.corrcoef([d.blur for d in draws], [d.flip for d in draws])[0, 1]) < .05


def test_every_crop_place_is_reached():
    places = {crop_matrix((5, 6), (3, 4), Draw(top=u / 30, left=v / 30))[:, 2].tobytes() for u in range(30) for v in range(30)}
    assert len(places) == 9


def test_stream_is_stable_and_input_unchanged():
    image, mask = scene()
    keep = image.copy(), mask.copy()
    for cfg in (AugmentConfig(), AugmentConfig(photometric=1), AugmentConfig(rotate=0, blur=0, flip=0)):
        rng = rng_for(5)
        TrainTransform(cfg)(Sample(image, mask, "x"), rng)
        other = rng_for(5)
        other.random(12)
        assert rng.random() == other.random()
    assert (image == keep[0]).all() and (mask == keep[1]).all()


def test_read_only_and_strided_input():
    image, mask = scene()
    image.flags.writeable = mask.flags.writeable = False
    t = TrainTransform(AugmentConfig(crop=(64, 64)))
    x, y = t(Sample(image, mask, "x"), rng_for(0))
    wide = np.concatenate([image, image], 1)[:, :image.shape[1]]
    x2, _ = t(Sample(wide, mask, "x"), rng_for(0))
    assert torch.equal(x, x2)
    x += 1
    y += 1  # tensors own their memory


def test_photometric_extremes():
    image, mask = scene(64, 64)
    t = TrainTransform(AugmentConfig(crop=(64, 64), photometric=1))
    for i in range(20):
        d = draw_augment(t.cfg, rng_for(i))
        assert all(.5 <= f <= 1.5 for f in d.color[:3]) and abs(d.color[3]) <= 18
        out, _ = t.pixels(Sample(image, mask, "x"), d)
        assert out.dtype == np.uint8
    assert np.allclose(color_matrix((2, 1, 1, 0)) @ [10, 20, 30, 1], [20, 40, 60])
    assert np.allclose(color_matrix((1, 1, 1, 360)), np.eye(3, 4))
    off = TrainTransform(AugmentConfig(crop=(64, 64)))
    assert (off.pixels(Sample(image, mask, "x"), Draw())[0] == image).all()


@pytest.mark.parametrize("shape", [(1, 1), (33, 47), (360, 480)])
def test_normalize_and_back(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    x = normalize(image)
    want = ((image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)
    assert x.dtype == torch.float32 and x.is_contiguous() and np.abs(x.numpy() - want).max() < 2e-6
    assert (denormalize(x) == image).all()
    assert (denormalize(torch.stack([x, x]))[1] == image).all()


def test_eval_transform():
    image, mask = scene(31, 45)
    x, y = EvalTransform()(Sample(image, mask, "x"))
    assert torch.equal(x, normalize(image)) and (y.numpy() == mask).all() and y.dtype == torch.int64
    x, y = EvalTransform(crop=(64, 64))(Sample(image, mask, "x"))
    assert x.shape == (3, 64, 64) and (y == 255).sum() == 64 * 64 - 31 * 45
    x, y = EvalTransform()(Sample(image, None, "x"))
    assert (y == 255).all()
    x, y = EvalTransform()(Sample(image, np.full_like(mask, 255), "void"))
    assert torch.isfinite(x).all()


def test_errors():
    with pytest.raises(ConfigError, match="divide by 255"):
        EvalTransform(mean=(123, 116, 103))
    for bad in ({"crop": (1, 2, 3)}, {"scale_min": 0}, {"flip": 2}, {"rotate": -1}, {"std": (0, 1, 1)}):
        with pytest.raises(ConfigError):
            AugmentConfig(**bad)
    with pytest.raises(DataError, match="frame7"):
        TrainTransform()(Sample(np.zeros((4, 4, 3), np.uint8), None, "frame7"), rng_for(0))


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (33, 32)])
def test_tiny_images_pad(size):
    image, mask = scene(*size)
    x, y = TrainTransform(AugmentConfig(crop=(65, 65)))(Sample(image, mask, "x"), rng_for(2))
    assert x.shape == (3, 65, 65) and torch.isfinite(x).all()


def test_faster_than_the_chain():
    image, mask = scene(512, 1024)
    cfg = AugmentConfig(crop=(357, 357))
    t, draws = TrainTransform(cfg), [draw_augment(cfg, rng_for(i)) for i in range(8)]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        seconds = []
        for run in (lambda d: chain(image, mask, cfg, d), lambda d: normalize(t.pixels(Sample(image, mask, "x"), d)[0])):
            start = time.perf_counter()
            for d in draws:
                run(d)
            seconds.append(time.perf_counter() - start)
    finally:
        cv2.setNumThreads(threads)
    assert seconds[0] > 2 * seconds[1]  # loose on purpose; benchmarks/augmentation.py measures it
