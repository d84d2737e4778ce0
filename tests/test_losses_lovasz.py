"""Lovász-softmax against its definition, against loops in NumPy, and against the IoU that it extends."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlmsnet.core import ConfigError
from mlmsnet.losses import lovasz
from mlmsnet.losses.contract import share_statistics
from mlmsnet.losses.lovasz import LovaszSoftmax, lovasz_slopes

VOID = 255


def softmax_np(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def one_minus_iou(wrong, own):
    """The set function: `wrong` are the mistaken pixels, `own` those of the class; both Python sets."""
    union = len(own | wrong)
    return (len(own) - len(own - wrong) + len(wrong - own)) / union if union else 0.0


def extension_by_levels(errors, own):
    """The Lovász extension as an integral: mean of the set function over all thresholds of the error. No sort, no slopes."""
    levels = [0.0, *sorted(set(errors))]
    return sum((high - low) * one_minus_iou({i for i, e in enumerate(errors) if e > low}, own) for low, high in zip(levels, levels[1:]))


def extension_by_corners(errors, own):
    """The convex closure, as the best lower bound: max over orders of the greedy vector (submodular polyhedron, Edmonds)."""
    best = -np.inf
    for order in itertools.permutations(range(len(errors))):
        steps = [one_minus_iou(set(order[:k + 1]), own) - one_minus_iou(set(order[:k]), own) for k in range(len(order))]
        best = max(best, sum(errors[i] * s for i, s in zip(order, steps)))
    return best


def lovasz_np(z, y, classes="present", per_image=False, weight=None):
    """Loops over images, classes and pixels."""
    p, t = softmax_np(np.asarray(z, np.float64)), np.asarray(y)
    c = p.shape[1]
    groups = [[i] for i in range(len(t))] if per_image else [list(range(len(t)))]
    means = []
    for group in groups:
        prob, label = np.moveaxis(p[group], 1, -1).reshape(-1, c), t[group].ravel()
        prob, label = prob[label != VOID], label[label != VOID]
        if not len(label):
            continue
        losses, weights = [], []
        for k in range(c) if isinstance(classes, str) else classes:
            own = set(np.flatnonzero(label == k).tolist())
            if classes == "present" and not own:
                continue
            errors = [abs(float(i in own) - v) for i, v in enumerate(prob[:, k])]
            losses.append(extension_by_levels(errors, own))
            weights.append(1.0 if weight is None else weight[k])
        means.append(np.average(losses, weights=weights) if sum(weights) else 0.0)
    return np.mean(means) if means else 0.0


def random_case(c=5, n=3, h=6, w=7, seed=0, size=2.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, c, (n, h, w), generator=g)
    y[torch.rand(n, h, w, generator=g) < 0.2] = VOID
    y[0, :, :4] = VOID
    return size * torch.randn(n, c, h, w, generator=g, dtype=torch.float64), y.masked_fill(y == 3, 2)  # class 3 is absent


def value_and_grad(loss, z, y):
    z = z.detach().clone().requires_grad_()
    value = loss(z, y)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.fixture(params=["one by one", "together"])
def path(request, monkeypatch):
    """The way of a CPU, and that of other devices with two classes to a sort."""
    if request.param == "together":
        monkeypatch.setattr(lovasz, "_one_by_one", lovasz._together)
        monkeypatch.setattr(lovasz, "_AT_ONCE", 250)
    return request.param


# ---- the extension itself ----

@pytest.mark.parametrize("pixels", [1, 2, 4, 5])
def test_slopes_give_the_lovasz_extension(pixels):
    """Every pattern of class and background, random errors: sorted slopes = integral over levels = maximum over all orders."""
    rng = np.random.default_rng(pixels)
    for code in range(2**pixels):
        fg = np.array([code >> i & 1 for i in range(pixels)])
        own = set(np.flatnonzero(fg).tolist())
        for errors in (rng.random(pixels), rng.integers(0, 3, pixels) / 2):  # without and with ties
            order = np.argsort(-errors)
            slopes = lovasz_slopes(torch.tensor(fg[order]), torch.float64).numpy()
            value = (slopes * errors[order]).sum()
            assert np.isclose(value, extension_by_levels(errors.tolist(), own))
            if pixels <= 4:
                assert np.isclose(value, extension_by_corners(errors.tolist(), own))


def test_slopes_are_exact_for_many_pixels_and_rows():
    g = torch.Generator().manual_seed(0)
    fg = torch.rand(3, 4000, generator=g) < torch.tensor([[0.5], [0.01], [0.0]])
    n = fg.sum(1, keepdim=True)
    union = n + (~fg).double().cumsum(1)
    jaccard = 1 - (n - fg.double().cumsum(1)) / union
    wish = torch.diff(jaccard, dim=1, prepend=torch.zeros(3, 1, dtype=torch.float64))
    torch.testing.assert_close(lovasz_slopes(fg, torch.float64), wish, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(lovasz_slopes(fg).double(), wish, rtol=1e-6, atol=1e-12)
    assert (lovasz_slopes(fg) >= 0).all() and torch.allclose(lovasz_slopes(fg).sum(1), torch.ones(3))


def test_background_below_the_best_class_pixel_counts_nothing():
    fg = torch.rand(500, generator=torch.Generator().manual_seed(1)) < 0.1
    last = int(fg.nonzero().max())
    slopes = lovasz_slopes(fg)
    assert (slopes[last + 1:] == 0).all() and (slopes[:last + 1] > 0).all()


# ---- the loss ----

@pytest.mark.parametrize("kw", [{}, {"classes": "all"}, {"classes": [1, 3]}, {"per_image": True}, {"per_image": True, "classes": "all"},
                                {"classes": [3]}], ids=str)
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 4.0, 3.0], [0.0, 1.0, 0.0, 1.0, 1.0]], ids=["plain", "weights", "zeros"])
def test_against_numpy(path, kw, weight):
    z, y = random_case()
    loss = LovaszSoftmax(**kw, class_weight=weight)
    wish = lovasz_np(z, y, **kw, weight=weight)
    assert np.isclose(loss(z, y).item(), wish, rtol=1e-9)
    assert np.isclose(loss(z.float(), y).item(), wish, rtol=1e-5)
    assert torch.autograd.gradcheck(lambda x: loss(x, y[1:, :2, 3:6]), z[1:, :, :2, 3:6].clone().requires_grad_())
    _, exact = value_and_grad(loss, z, y)
    _, grad = value_and_grad(loss, z.float(), y)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-3, atol=1e-6)


def test_the_two_ways_agree_on_many_pixels(monkeypatch):
    """Large enough for a radix sort; a confident prediction with mistakes, where many errors are near 0 or 1."""
    g = torch.Generator().manual_seed(5)
    y = torch.randint(0, 7, (2, 160, 170), generator=g)
    said = torch.where(torch.rand(y.shape, generator=g) < 0.1, torch.randint(0, 7, y.shape, generator=g), y)
    y[torch.rand(y.shape, generator=g) < 0.05] = VOID
    for lead in (0.0, 6.0, 25.0):
        z = torch.randn(2, 8, 160, 170, generator=g) + lead * F.one_hot(said, 8).movedim(-1, 1)
        for kw in ({}, {"per_image": True, "classes": "all"}):
            exact, slope = value_and_grad(LovaszSoftmax(**kw), z.double(), y)
            results = [value_and_grad(LovaszSoftmax(**kw), z, y)]
            with monkeypatch.context() as m:
                m.setattr(lovasz, "_one_by_one", lovasz._together)
                results.append(value_and_grad(LovaszSoftmax(**kw), z, y))
            for value, grad in results:
                torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-7)
                assert (grad - slope).abs().max() < 1e-3 * slope.abs().max() + 1e-10  # at lead 25, p(1-p) is below what float32 knows of p
                assert (grad[(y == VOID).unsqueeze(1).expand_as(grad)] == 0).all()


def test_hard_prediction_is_one_minus_mean_iou(path):
    z, y = random_case(h=12, w=15)
    said = z.argmax(1)
    hard = 1e4 * F.one_hot(said, 5).movedim(-1, 1).float()
    valid = y != VOID
    losses = {}
    for c in range(5):
        union = int((((said == c) | (y == c)) & valid).sum())
        losses[c] = 1 - int((valid & (said == c) & (y == c)).sum()) / union if union else 0.0
    present = [c for c in range(5) if (y == c).any()]
    assert np.isclose(LovaszSoftmax()(hard, y).item(), np.mean([losses[c] for c in present]))
    assert np.isclose(LovaszSoftmax(classes="all")(hard, y).item(), np.mean(list(losses.values())))
    right = 1e4 * F.one_hot(y.masked_fill(~valid, 0), 5).movedim(-1, 1).float()
    assert LovaszSoftmax(classes="all")(right, y) == 0


def test_two_classes_one_pixel_each_by_hand(path):
    p = torch.tensor([[0.6, 0.4], [0.7, 0.3]])  # pixels × classes; labels 0 and 1
    z = p.log().T.reshape(1, 2, 1, 2)
    # class 0: errors .4 (own), .7 (other): order .7 (1/2), .4 (1/2); class 1: .4 (other) , .7 (own): .7 (1), .4 (0)
    assert np.isclose(LovaszSoftmax()(z, torch.tensor([[[0, 1]]])).item(), ((0.7 + 0.4) / 2 + 0.7) / 2)


def test_all_errors_equal(path):
    """Nothing but ties: value is the common error, in any order; the gradient is one of the subgradients (it points down)."""
    z = torch.zeros(1, 4, 6, 8)
    y = torch.arange(48).view(1, 6, 8) % 2
    # p = 1/4 everywhere: own pixels err by 3/4, the others by 1/4
    own = 24
    wish = 0.75 * 1.0 + 0.25 * 0.0  # once all own pixels are wrong, IoU is 0 already
    value, grad = value_and_grad(LovaszSoftmax(), z, y)
    assert np.isclose(value.item(), wish) and own == int((y == 0).sum())
    assert torch.isfinite(grad).all() and LovaszSoftmax()(z - 0.1 * grad, y) < value
    half = torch.zeros(1, 2, 6, 8)  # p = 1/2: all errors of both classes are 1/2
    value, grad = value_and_grad(LovaszSoftmax(), half, y)
    assert np.isclose(value.item(), 0.5) and torch.isfinite(grad).all()


def test_ties_do_not_move_the_value(path):
    g = torch.Generator().manual_seed(2)
    z = torch.randint(0, 3, (2, 3, 9, 8), generator=g).double()  # few values: most errors are shared by many pixels
    y = torch.randint(0, 3, (2, 9, 8), generator=g)
    value = LovaszSoftmax()(z, y)
    assert np.isclose(value.item(), lovasz_np(z, y), rtol=1e-9)
    order = torch.randperm(72, generator=g)
    mixed = LovaszSoftmax()(z.flatten(2)[..., order].view_as(z), y.flatten(1)[..., order].view_as(y))
    torch.testing.assert_close(mixed, value)


def test_bounds_and_growth(path):
    """Between the smallest and the largest error of the class, and larger if an error grows."""
    z, y = random_case()
    p = z.softmax(1).movedim(1, -1)[y != VOID]
    t = y[y != VOID]
    for c in (0, 2):
        error = torch.where(t == c, 1 - p[:, c], p[:, c])
        value = LovaszSoftmax(classes=[c])(z, y)
        assert error.min() <= value <= error.max()


def test_few_pixels(path):
    z, y = random_case()
    none = torch.full_like(y, VOID)
    for loss in (LovaszSoftmax(), LovaszSoftmax(classes="all"), LovaszSoftmax(per_image=True), LovaszSoftmax(classes=[2])):
        value, grad = value_and_grad(loss, z.float(), none)
        assert value == 0 and (grad == 0).all()
    one = none.clone()
    one[1, 2, 3] = 4
    value, grad = value_and_grad(LovaszSoftmax(), z, one)
    torch.testing.assert_close(value, 1 - z[1, :, 2, 3].softmax(0)[4])
    assert (grad != 0).any(1).sum() == 1
    for shape in ((1, 3, 1, 1), (1, 1, 4, 4)):
        target = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
        value, grad = value_and_grad(LovaszSoftmax(), torch.ones(shape), target)
        assert torch.isfinite(value) and torch.isfinite(grad).all()


def test_backward_twice_and_scaled(path):
    """The slopes become the gradient in place; a second pass makes them again."""
    z, y = random_case()
    for dtype in (torch.float32, torch.float64):
        leaf = z.to(dtype).requires_grad_()
        value = LovaszSoftmax()(leaf, y)
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(value, leaf, grad_outputs=torch.tensor(3.0, dtype=dtype))
        torch.testing.assert_close(second, 3 * first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_in_float32(path, dtype):
    """More pixels than float16 can count."""
    z, y = random_case(c=3, n=1, h=120, w=90)
    rounded = z.to(dtype)
    value, grad = value_and_grad(LovaszSoftmax(), rounded, y)
    exact, slope = value_and_grad(LovaszSoftmax(), rounded.double(), y)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert np.isclose(value.item(), exact.item(), rtol=1e-5)
    torch.testing.assert_close(grad.double(), slope, rtol=2e-2, atol=1e-6)


def test_scores_of_void_may_be_anything(path):
    z, y = random_case()
    clean = value_and_grad(LovaszSoftmax(classes="all"), z.float(), y)
    for rubbish in (float("nan"), float("inf"), -float("inf"), 1e30):
        dirty = torch.where((y == VOID).unsqueeze(1), torch.tensor(rubbish), z.float())
        value, grad = value_and_grad(LovaszSoftmax(classes="all"), dirty, y)
        assert value == clean[0] and torch.equal(grad, clean[1])


def test_many_classes():
    """More classes than a byte holds."""
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(1, 300, 9, 9, generator=g).double(), torch.randint(0, 300, (1, 9, 9), generator=g)
    y[y == VOID] = 299
    wish = lovasz_np(z, y)
    assert np.isclose(LovaszSoftmax()(z, y).item(), wish) and np.isclose(LovaszSoftmax()(z.float(), y).item(), wish, rtol=1e-5)


def test_errors():
    z, y = random_case()
    with pytest.raises(ConfigError, match="5 classes"):
        LovaszSoftmax(classes=[9])(z, y)
    with pytest.raises(ConfigError, match="all pixels at once"):
        LovaszSoftmax().from_sums(None)
    share_statistics(LovaszSoftmax(per_image=True))(z, y)  # one process: as it is
