"""Metrics against independent definitions, many random tables, and processes that share the work."""
import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from mlmsnet.core import DataError, rng_for
from mlmsnet.training.metrics import BoundaryIoU, ConfusionMatrix, metrics_from_counts, shard


def random_maps(seed, num_classes, shape=(3, 17, 23), void=0.1, ignore=255):
    rng = rng_for(seed)
    target = rng.integers(0, num_classes, shape)
    pred = np.where(rng.random(shape) < 0.6, target, rng.integers(0, num_classes, shape))
    target[rng.random(shape) < void] = ignore
    return pred, target


def semseg_scores(pred, target, num_classes, ignore=255):
    "Three histograms and +1e-10: the definition of semseg, and of the original"
    pred = np.where(target == ignore, ignore, pred)
    hist = [np.histogram(x, bins=np.arange(num_classes + 1) - 0.5)[0] for x in (pred[pred == target], pred, target)]
    inter, output, true = hist
    return (np.mean(inter / (output + true - inter + 1e-10)), np.mean(inter / (true + 1e-10)), inter.sum() / (true.sum() + 1e-10))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_classes", [2, 11, 19])
def test_zero_rule_is_semsegs(seed, num_classes):
    pred, target = random_maps(seed, num_classes)
    pred[pred == 1], target[target == 1] = 0, 0  # class 1 occurs nowhere
    m = ConfusionMatrix(num_classes).update(pred, target).result(absent="zero")
    np.testing.assert_allclose((m.miou, m.macc, m.allacc), semseg_scores(pred, target, num_classes), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_classes,ignore", [(3, 255), (255, 255), (3, 3), (3, -1), (3, -100), (400, 255), (400, 1000), (12, 11)])
def test_any_void_and_any_number_of_classes(num_classes, ignore):
    pred, target = random_maps(7, num_classes, ignore=ignore)
    expected = np.zeros((num_classes, num_classes), int)
    valid = target != ignore
    np.add.at(expected, (target[valid], pred[valid]), 1)
    assert (ConfusionMatrix(num_classes, ignore).update(pred, target).counts.numpy() == expected).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_dtypes_layouts_and_logits_agree(dtype):
    pred, target = (torch.tensor(x) for x in random_maps(1, 5, ignore=4))
    expected = ConfusionMatrix(5, 4).update(pred, target).counts
    assert torch.equal(ConfusionMatrix(5, 4).update(pred.to(dtype), target.to(dtype)).counts, expected)
    logits = torch.nn.functional.one_hot(pred, 5).permute(0, 3, 1, 2)
    for x in (logits.float(), logits.bfloat16(), logits.float().contiguous(memory_format=torch.channels_last), logits.half()):
        assert torch.equal(ConfusionMatrix(5, 4).update(x, target).counts, expected)
    assert torch.equal(ConfusionMatrix(5, 4).update(pred.mT, target.mT).counts, expected)


def test_what_lies_under_void_changes_nothing():
    pred, target = random_maps(2, 6)
    a = ConfusionMatrix(6).update(pred, target).counts
    pred[target == 255] = 200
    assert torch.equal(a, ConfusionMatrix(6).update(pred, target).counts)


@pytest.mark.parametrize("value,where", [(6, "prediction"), (255, "prediction"), (-1, "prediction"), (300, "prediction"),
                                         (6, "target"), (33, "target")])
def test_values_out_of_range_are_named_and_leave_no_trace(value, where):
    pred, target = random_maps(3, 6, void=0)
    {"prediction": pred, "target": target}[where][0, 0, 0] = value
    matrix = ConfusionMatrix(6)
    with pytest.raises(DataError, match=f"{where} holds (the value )?{value}"):
        matrix.update(pred, target)
    assert int(matrix.counts.sum()) == 0


def test_no_nan_ever():
    rng = rng_for(4)
    for k in range(200):
        counts = rng.integers(0, 3, (4, 4)) * (rng.random((4, 4)) < 0.2)
        for rule in ("skip", "zero"):
            m = metrics_from_counts(counts, absent=rule)
            numbers = [m.miou, m.macc, m.allacc, m.fwiou, *(v for v in (*m.iou, *m.acc, *m.precision) if v is not None)]
            assert all(math.isfinite(v) and 0 <= v <= 1 for v in numbers), k
            assert m.classes_counted == (4 if rule == "zero" else 4 - len(m.absent))


def test_counts_do_not_overflow_32_bits():
    matrix = ConfusionMatrix(2).update(np.zeros(1000, np.uint8), np.zeros(1000, np.uint8))
    for _ in range(25):
        matrix.merge(matrix)
    assert matrix.counts[0, 0] == 1000 * 2**25 and matrix.result().allacc == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_boundary_iou_is_the_erosion_of_every_class(seed):
    import cv2
    rng = rng_for(seed)
    target = cv2.resize(rng.integers(0, 4, (6, 8)).astype(np.uint8), (80, 61), interpolation=cv2.INTER_NEAREST)
    pred = np.roll(target, seed + 1, 1)
    target[:9, :20] = 255
    d = round(0.02 * math.hypot(61, 80))
    found = BoundaryIoU(4).update(pred, target).result()["iou"]

    def rim(labels, c):
        mask = np.pad(((labels == c) & (target != 255)).astype(np.uint8), 1)
        return (mask - cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=d))[1:-1, 1:-1] > 0
    for c in range(4):
        both, either = rim(pred, c) & rim(target, c), rim(pred, c) | rim(target, c)
        assert found[str(c)] == pytest.approx(both.sum() / either.sum(), abs=1e-12)


def _rank(rank, world, file, images, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    matrix = ConfusionMatrix(5)
    for i in shard(images, rank, world):
        matrix.update(*random_maps(i, 5))
    queue.put(matrix.all_reduce().counts.tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_count_every_image_once(tmp_path):
    images, context = 5, mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, 2, tmp_path / "meet", images, queue)) for r in range(2)]
    for p in processes:
        p.start()
    found = [queue.get(timeout=100) for _ in processes]
    for p in processes:
        p.join(20)
    alone = ConfusionMatrix(5)
    for i in range(images):
        alone.update(*random_maps(i, 5))
    assert found[0] == found[1] == alone.counts.tolist()
