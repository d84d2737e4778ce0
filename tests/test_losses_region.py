"""The region losses against slow formulas in NumPy (one-hot, loops over images and classes), their identities, tiles, and known traps."""
import numpy as np
import pytest
import torch

from mlmsnet.core import ConfigError
from mlmsnet.losses.contract import available_losses, create_loss, loss_info
from mlmsnet.losses.region import RegionLoss, confusion_sums, rarity, region_sums

VOID = 255
DISTANCES = np.array([[0, 1, 1, .5, .2], [1, 0, .3, 1, 1], [1, .4, 0, 1, .9], [.5, 1, 1, 0, 1], [1, 1, .6, 1, 0]])


def case(seed=0, n=3, c=5, h=7, w=9, size=2.0):
    """Logits and labels with void; class 3 is absent everywhere, class 1 in the first image."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, c, (n, h, w), generator=g)
    y = y.masked_fill(y == 3, 2)
    y[0] = y[0].masked_fill(y[0] == 1, 0)
    y[torch.rand(n, h, w, generator=g) < 0.2] = VOID
    return size * torch.randn(n, c, h, w, generator=g), y


def value_and_grad(loss, z, y):
    z = z.detach().clone().requires_grad_()
    value = loss(z, y)
    return value.detach(), torch.autograd.grad(value, z)[0]


# ---- slow formulas: p and g are pixels x C of the valid pixels of one group ----

def ratio(a, b):
    return a / b if b > 0 else 1.0


def tversky_class(p, g, alpha, beta, smooth=0.0):
    tp, fp, fn = (p * g).sum(), (p * (1 - g)).sum(), ((1 - p) * g).sum()
    return 1 - ratio(tp + smooth, tp + alpha * fp + beta * fn + smooth)


def dice_class(p, g, smooth=0.0):
    return 1 - ratio(2 * (p * g).sum() + smooth, p.sum() + g.sum() + smooth)


def jaccard_class(p, g, smooth=0.0):
    inter = np.sum(p * g)
    return 1 - ratio(inter + smooth, np.sum(p + g - p * g) + smooth)


def f_beta_class(p, g, beta=1.5):
    if g.sum() == 0 or p.sum() == 0:
        return 0.0 if g.sum() == p.sum() else 1.0
    precision, recall = (p * g).sum() / p.sum(), (p * g).sum() / g.sum()
    return 1 - (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def sens_spec_class(p, g, w=0.05):
    error = (g - p) ** 2
    inside = (error * g).sum() / g.sum() if g.sum() else 0.0
    outside = (error * (1 - g)).sum() / (1 - g).sum() if (1 - g).sum() else 0.0
    return w * inside + (1 - w) * outside


def mcc_class(p, g):
    tp, fp, fn, tn = (p * g).sum(), (p * (1 - g)).sum(), ((1 - p) * g).sum(), ((1 - p) * (1 - g)).sum()
    den = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return 1 - (tp * tn - fp * fn) / den if den > 0 else 0.0 if np.array_equal(p, g) else 1.0


def semimetric_all(p, g, soft=0.1):
    g = (1 - soft) * g + soft / g.shape[1]
    both = (p + g).sum(0)
    return 1 - (both - np.abs(p - g).sum(0)) / both


def per_class(f, **fixed):
    def loss(p, g, counted, weight, **kw):
        index = np.flatnonzero(counted)
        return np.average([f(p[:, c], g[:, c], **{**fixed, **kw}) for c in index], weights=weight[index])
    return loss


def focal_tversky(p, g, gamma=4 / 3, alpha=0.3, beta=0.7, smooth=0.0):
    return tversky_class(p, g, alpha, beta, smooth) ** (1 / gamma)


def log_cosh(p, g, smooth=0.0):
    d = dice_class(p, g, smooth)
    return np.log((np.exp(d) + np.exp(-d)) / 2)


def generalized(p, g, counted, weight, power=2.0):
    n = g.sum(0)
    there = counted & (n > 0)
    floor = n[there].min() if there.any() else 1.0
    w = weight * counted / np.where(n > 0, n, floor) ** power
    return 1 - 2 * (w * (p * g).sum(0)).sum() / (w * (p + g).sum(0)).sum()


def wasserstein(p, g, counted, weight, distances=None, power=1.0, background=-1):
    far = 1 - np.eye(p.shape[1]) if distances is None else np.asarray(distances)
    n, true, cost = g.sum(0), 0.0, 0.0
    for i in range(len(p)):
        y = int(g[i].argmax())
        a = counted[y] * weight[y] / n[y] ** power
        travel = sum(far[y, k] * p[i, k] for k in range(p.shape[1]))
        cost += a * travel
        true += a * (1 - travel) * (y != background)
    return 1 - ratio(2 * true, 2 * true + cost)


def semimetric(p, g, counted, weight, soft=0.1):
    return np.average(semimetric_all(p, g, soft)[counted], weights=weight[counted])


SLOW = {
    "jaccard": (per_class(jaccard_class), [{}, {"smooth": 2.0}]),
    "tversky": (per_class(tversky_class, alpha=0.3, beta=0.7), [{}, {"alpha": 0.9, "beta": 0.2, "smooth": 1.0}]),
    "focal_tversky": (per_class(focal_tversky), [{}, {"gamma": 2.5, "alpha": 0.5}, {"gamma": 0.7, "smooth": 1.0}]),
    "asymmetric_similarity": (per_class(f_beta_class), [{}, {"beta": 3.0}, {"beta": 0.0}]),
    "log_cosh_dice": (per_class(log_cosh), [{}, {"smooth": 3.0}]),
    "sensitivity_specificity": (per_class(sens_spec_class), [{}, {"w": 0.7}]),
    "mcc": (per_class(mcc_class), [{}]),
    "generalized_dice": (generalized, [{}, {"power": 1.0}, {"power": 0.0}]),
    "wasserstein_dice": (wasserstein, [{}, {"distances": DISTANCES}, {"power": 0.0, "background": 0, "distances": DISTANCES}]),
    "semimetric_dice": (semimetric, [{}, {"soft": 0.0}, {"soft": 0.5}]),
}
RUNS = [pytest.param(name, kw, id=f"{name}-{'-'.join(kw) or 'default'}") for name, (_, runs) in SLOW.items() for kw in runs]


def slow(name, z, y, per_image=False, classes="present", class_weight=None, **kw):
    e = np.exp(z.numpy() - z.numpy().max(1, keepdims=True))
    prob, label, c = e / e.sum(1, keepdims=True), y.numpy(), z.shape[1]
    weight = np.ones(c) if class_weight is None else np.asarray(class_weight, float)
    out = []
    for group in ([[i] for i in range(len(label))] if per_image else [list(range(len(label)))]):
        valid = label[group] != VOID
        if not valid.any():
            continue
        p, g = np.moveaxis(prob[group], 1, -1)[valid], np.eye(c)[label[group][valid]]
        counted = g.any(0) if classes == "present" else np.isin(np.arange(c), np.arange(c) if classes == "all" else classes)
        out.append(SLOW[name][0](p, g, counted, weight, **kw))
    return np.mean(out)


@pytest.mark.parametrize("class_weight", [None, [1.0, 2.0, 0.5, 4.0, 3.0]], ids=["plain", "weighted"])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per_image"])
@pytest.mark.parametrize("classes", ["present", "all", (0, 3, 4)], ids=str)
@pytest.mark.parametrize("name, kw", RUNS)
def test_against_numpy(name, kw, classes, per_image, class_weight):
    z, y = case()
    for label in (y, torch.cat([y[:2], torch.full_like(y[:1], VOID)])):  # also with an image that is all void
        options = {**kw, "classes": classes, "per_image": per_image, "class_weight": class_weight}
        assert np.isclose(create_loss(name, **options)(z.double(), label).item(), slow(name, z.double(), label, **options), rtol=1e-9)
        assert np.isclose(create_loss(name, **options)(z, label).item(), slow(name, z.double(), label, **options), rtol=1e-5)


@pytest.mark.parametrize("name, kw", RUNS)
def test_gradient(name, kw):
    z, y = case(h=3, w=4)
    for more in ({}, {"classes": "all", "per_image": True, "class_weight": [1, 2, 0.5, 4, 3]}):
        loss = create_loss(name, **kw, **more)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, y), z.double().requires_grad_())


@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per_image"])
@pytest.mark.parametrize("name", [*SLOW, "dice"])
def test_tiles_are_the_whole(name, per_image):
    """Sums of two tiles, added, give value and gradient of the whole picture."""
    z, y = case(h=10, w=12)
    for kw in ({}, {"classes": "all", "class_weight": [1, 2, 0.5, 4, 3]}):
        loss = create_loss(name, per_image=per_image, **kw)
        value, grad = value_and_grad(loss, z, y)
        leaf = z.clone().requires_grad_()
        sums = [loss.sums(leaf[..., s], y[..., s]) for s in (slice(0, 5), slice(5, 9), slice(9, None))]
        tiled = loss.from_sums(sums[0].plus(sums[1]).plus(sums[2]))
        tiled.backward()
        torch.testing.assert_close(tiled.float(), value)
        torch.testing.assert_close(leaf.grad, grad)
    batches = loss.from_sums(loss.sums(z[:1], y[:1])), loss(z[:1], y[:1])
    torch.testing.assert_close(batches[0].float(), batches[1])


def test_every_region_loss_is_here():
    names = [n for n in available_losses("region") if loss_info(n).build.__module__ == RegionLoss.__module__]
    assert set(names) == {*SLOW, "dice"}
    for name in names:
        info = loss_info(name)
        assert info.formula and info.paper and info.absent and info.summary
        assert {"classes", "per_image", "class_weight"} <= set(info.defaults)
        for p in info.params:
            if p.type in ("float", "int") and p.name != "ignore_index":
                low, high = p.slider
                assert low < high and (p.low is None or low >= p.low) and (p.high is None or high <= p.high)
                assert low <= p.default <= high
                for end in (low, high):
                    value, grad = value_and_grad(create_loss(name, **{p.name: end}), *case())
                    assert torch.isfinite(value) and torch.isfinite(grad).all()


def test_identities():
    z, y = case()
    z = z.double()
    for kw in ({}, {"per_image": True}, {"classes": "all"}, {"class_weight": [1, 2, 3, 4, 5]}):
        def same(a, b, kw=kw, **options):
            torch.testing.assert_close(create_loss(a, **options, **kw)(z, y), create_loss(**b, **kw)(z, y))
        same("tversky", {"name": "dice"}, alpha=0.5, beta=0.5)
        same("tversky", {"name": "jaccard"}, alpha=1.0, beta=1.0)
        same("tversky", {"name": "dice", "smooth": 2.0}, alpha=0.5, beta=0.5, smooth=1.0)
        same("asymmetric_similarity", {"name": "dice"}, beta=1.0)
        same("asymmetric_similarity", {"name": "tversky", "alpha": 0.2, "beta": 0.8}, beta=2.0)
        same("focal_tversky", {"name": "tversky"}, gamma=1.0)
        same("semimetric_dice", {"name": "dice"}, soft=0.0)
        same("wasserstein_dice", {"name": "wasserstein_dice"}, distances=1 - np.eye(5))
    d, j = (create_loss(n, classes=[2])(z, y) for n in ("dice", "jaccard"))
    torch.testing.assert_close(j, 1 - (1 - d) / (1 + d))
    torch.testing.assert_close(create_loss("log_cosh_dice", classes=[2])(z, y), d.cosh().log())


def test_generalized_dice_of_even_classes_is_one_dice_of_all():
    y = torch.arange(4).repeat(2, 6, 3)
    z = torch.randn(2, 4, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = z.softmax(1).gather(1, y[:, None]).mean()
    for power in (0.0, 1.0, 2.0):
        torch.testing.assert_close(create_loss("generalized_dice", power=power)(z, y), 1 - p)


# ---- traps ----

def picture(n, side=1000, c=3):
    """One class of n pixels in a picture of side² pixels, another of 10, the rest is class 0."""
    y = torch.zeros(1, side, side, dtype=torch.long)
    y.view(-1)[:n] = 1
    y.view(-1)[-10:] = 2
    g = torch.Generator().manual_seed(n)
    return torch.randn(1, c, side, side, generator=g) + 3 * torch.nn.functional.one_hot(y, c).movedim(-1, 1), y


@pytest.mark.parametrize("name", [*SLOW, "dice"])
def test_a_million_pixels_in_float32(name):
    """No count overflows, no small class drowns in the rounding of a large one."""
    z, y = picture(n=400_000)
    value, grad = value_and_grad(create_loss(name), z, y)
    exact, slope = value_and_grad(create_loss(name), z.double(), y)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-9)
    wrong = (grad.double() - slope).abs() > 1e-4 * (slope.abs() + slope.abs().max())
    assert wrong.sum() <= (20 if name == "semimetric_dice" else 0)  # it has kinks: a pixel may fall to either side
    if name == "mcc":
        p, g = z[0].double().softmax(0).numpy(), np.eye(3)[y[0].numpy()]
        assert np.isclose(value.item(), np.mean([mcc_class(p[c], g[..., c]) for c in range(3)]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*SLOW, "dice"])
def test_half_precision_logits(name, dtype):
    """100 000 pixels do not fit a float16 sum; sums run in float32 and up, so only the logits are rounded."""
    z, y = case(n=1, h=320, w=320)
    z = z.to(dtype)
    value, grad = value_and_grad(create_loss(name), z, y)
    exact, slope = value_and_grad(create_loss(name), z.float(), y)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert value == exact and torch.isfinite(grad).all()
    torch.testing.assert_close(grad, slope.to(dtype))


def test_constant_addends_do_not_stick():
    """600 000 pixels with p = 0.99: one float32 counter would round each addend to a multiple of 1/16."""
    y = torch.zeros(1, 600, 1000, dtype=torch.long)
    p = torch.tensor([0.99, 0.01]).view(1, 2, 1, 1).expand(1, 2, 600, 1000)
    sums = create_loss("dice").sums(p.log(), y)
    assert np.isclose(sums.tp[0, 0].item(), 594_000, rtol=1e-6) and np.isclose(sums.p[0, 1].item(), 6000, rtol=1e-6)


@pytest.mark.parametrize("name", [*SLOW, "dice"])
def test_a_class_that_fills_the_picture(name):
    """Ten pixels are something else: what the large class does there must not be a difference of two sums of a million."""
    y = torch.zeros(1, 1000, 1000, dtype=torch.long)
    y[0, 500, :10] = 1
    z = torch.tensor([0.99, 0.01]).log().view(1, 2, 1, 1).expand(1, 2, 1000, 1000)
    loss, wide = (create_loss(name)(x, y).item() for x in (z, z.double()))
    assert np.isclose(loss, wide, rtol=1e-5)
    if name == "sensitivity_specificity":
        large = 0.05 * 0.01**2 + 0.95 * 0.99**2
        small = 0.05 * 0.99**2 + 0.95 * 0.01**2
        assert np.isclose(loss, (large + small) / 2, rtol=1e-5)


def test_absent_class_in_generalized_dice():
    """It has no say by default; asked for, its false alarms count like those of the rarest class that is there, not infinitely."""
    z, y = case()
    kept = y != VOID
    value = create_loss("generalized_dice")(z, y)
    more = z.clone()
    more[:, 3] += 2.0  # more false alarms for the absent class
    present, everything = (create_loss("generalized_dice", classes=c) for c in ("present", "all"))
    assert value < everything(z, y) < everything(more, y) < 1
    _, grad = value_and_grad(everything, z, y)
    share = grad[:, 3].abs().sum() / grad.abs().sum()
    assert 0 < share < 0.5
    n = torch.bincount(y[kept], minlength=5).double()[None]
    w = rarity(n, torch.ones_like(n), 2.0)
    assert w.max() == 1 and w[0, 3] == 1 and torch.allclose(w[0, 0], (n[0, [0, 1, 2, 4]].min() / n[0, 0]) ** 2)
    huge = rarity(torch.tensor([[1.0, 1e9, 0.0]]), torch.ones(1, 3), 4.0)  # 1/n⁴ itself would be 0 in float32
    assert torch.isfinite(huge).all() and huge[0, 1] >= 0
    torch.testing.assert_close(present(z, y), create_loss("generalized_dice", classes=[0, 1, 2, 4])(z, y))
    assert torch.isfinite(create_loss("generalized_dice", classes=[3], class_weight=[1, 1, 1, 0, 1])(z, y))


def test_absent_classes_that_nobody_predicts_cost_nothing():
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    sure = torch.zeros(1, 3, 4, 4)
    sure[:, 0] = 2e4  # class 0 with probability exactly 1
    for name in [*SLOW, "dice"]:
        if name == "semimetric_dice":  # there the label of an absent class is s/C
            continue
        for classes in ("all", [1], "present"):
            for per_image in (False, True):
                value, grad = value_and_grad(create_loss(name, classes=classes, per_image=per_image), sure, y)
                assert value == 0 and torch.isfinite(grad).all(), (name, classes)
    for name in ("jaccard", "tversky", "focal_tversky", "asymmetric_similarity", "mcc", "generalized_dice"):
        assert torch.isclose(create_loss(name, classes=[1])(torch.zeros(1, 3, 4, 4), y), torch.tensor(1.0)), name


def test_focal_tversky_is_a_mean_of_powers():
    z, y = case()
    each = torch.stack([create_loss("tversky", classes=[c])(z, y) for c in (0, 1, 2, 4)])
    value = create_loss("focal_tversky")(z, y)
    torch.testing.assert_close(value, (each**0.75).mean())
    assert abs(value - each.mean() ** 0.75) > 1e-4


@pytest.mark.parametrize("gamma", [0.5, 4 / 3, 3.0, 10.0])
def test_focal_tversky_is_finite_at_perfect(gamma):
    _, y = case()
    for size in (10.0, 20.0, 40.0, 90.0, 1e4):
        z = size * torch.nn.functional.one_hot(y.masked_fill(y == VOID, 0), 5).movedim(-1, 1)
        for dtype in (torch.float32, torch.float64):
            value, grad = value_and_grad(create_loss("focal_tversky", gamma=gamma), z.to(dtype), y)
            assert 0 <= value < 0.5 and torch.isfinite(grad).all() and grad.abs().max() < 0.1
    assert value == 0


def test_alpha_is_for_false_positives():
    """Ports that swap alpha and beta are common."""
    y = torch.zeros(1, 4, 8, dtype=torch.long)
    y[..., :2] = 1
    def say(columns):
        z = torch.zeros(1, 2, 4, 8)
        z[:, 0] = 50
        z[:, 1, :, :columns] = 100
        return z
    too_much, too_little = say(4), say(1)
    for name, kw in (("tversky", {"alpha": 0.1, "beta": 0.9}), ("focal_tversky", {}), ("asymmetric_similarity", {})):
        loss = create_loss(name, classes=[1], **kw)  # twice too many are claimed, or half of them
        assert loss(too_much, y) < loss(too_little, y), name
    torch.testing.assert_close(create_loss("tversky", alpha=0.1, beta=0.9, classes=[1])(too_much, y), torch.tensor(1 - 8 / (8 + 0.1 * 8)))


def test_mcc_of_hard_answers_is_the_correlation():
    z, y = case()
    hard = 1e4 * torch.nn.functional.one_hot(z.argmax(1), 5).movedim(-1, 1).float()
    kept = y != VOID
    for c in (0, 1, 2, 4):
        r = np.corrcoef((z.argmax(1)[kept] == c).numpy(), (y[kept] == c).numpy())[0, 1]
        assert np.isclose(create_loss("mcc", classes=[c])(hard, y).item(), 1 - r, atol=1e-6)
    flipped = torch.where(torch.arange(2).view(1, 2, 1, 1) == (y[:, None] == 0).long(), -1e4, 1e4)
    assert np.isclose(create_loss("mcc")(flipped, (y == 0).long().masked_fill(y == VOID, VOID)).item(), 2.0)
    value, grad = value_and_grad(create_loss("mcc"), z, torch.full_like(y, 2))  # one class only: no correlation
    assert value == 1 and (grad == 0).all()


def test_wasserstein_costs_are_rows_by_truth():
    y = torch.zeros(1, 2, 8, dtype=torch.long)
    y[..., 4:] = 1
    said = y.clone()
    said[0, 0, 0] = 2  # one pixel of class 0 is called 2
    z = 1e4 * torch.nn.functional.one_hot(said, 3).movedim(-1, 1).float()
    far = 1 - np.eye(3)
    far[0, 2], far[2, 0] = 0.25, 0.75
    loss = create_loss("wasserstein_dice", distances=far, power=0)
    torch.testing.assert_close(loss(z, y), torch.tensor(1 - 2 * 15.75 / (2 * 15.75 + 0.25)))
    torch.testing.assert_close(create_loss("wasserstein_dice", distances=far, power=0, background=1)(z, y),
                               torch.tensor(1 - 2 * 7.75 / (2 * 7.75 + 0.25)))
    assert repr(loss).count("0.25") == 1
    wrong = [(far[:2], "square"), ("all", "square"), (far * 2, "in 0..1"), (np.ones((3, 3)), "diagonal"), (far * np.nan, "in 0..1")]
    for bad, why in wrong:
        with pytest.raises(ConfigError, match=why):
            create_loss("wasserstein_dice", distances=bad)
    with pytest.raises(ConfigError, match="3 classes"):
        create_loss("wasserstein_dice", distances=DISTANCES)(z, y)
    with pytest.raises(ConfigError, match="background 3"):
        create_loss("wasserstein_dice", background=3)(z, y)


def test_wasserstein_list_of_classes_is_a_weight_of_zero():
    z, y = case()
    weighted = create_loss("wasserstein_dice", class_weight=[0, 1, 0, 0, 1])
    torch.testing.assert_close(create_loss("wasserstein_dice", classes=[1, 4])(z, y), weighted(z, y))


def test_confusion_sums():
    z, y = case()
    valid = y != VOID
    z = torch.where(valid[:, None], z, torch.nan)  # whatever lies under void
    label = y.masked_fill(~valid, 0)
    full, plain = confusion_sums(z, label, valid), region_sums(z, label, valid)
    for a, b in zip(full[:3], plain):
        torch.testing.assert_close(a, b)
    p = z.softmax(1)
    for i in range(3):
        for c in range(5):
            torch.testing.assert_close(full.confusion[i, c], p[i][:, y[i] == c].sum(1))


def test_semimetric_dice_wants_the_label_itself():
    _, y = case()
    for soft in (0.1, 0.5, 1.0):
        g = (1 - soft) * torch.nn.functional.one_hot(y.masked_fill(y == VOID, 0), 5).movedim(-1, 1).double() + soft / 5
        loss = create_loss("semimetric_dice", soft=soft, classes="all")
        best = loss(g.log(), y)
        assert best.abs() < 1e-12
        for seed in range(5):
            nudge = 0.1 * torch.randn(g.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            assert loss(g.log() + nudge, y) > best
