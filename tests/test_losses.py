"""Every registered loss, by name, on hard cases; identities; and independent formulas in NumPy.

A new loss is covered as soon as it is registered: `available_losses()` drives the property suite.
"""
import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _losses import VOID, share_learnt

from mlmsnet.core import ConfigError, DataError, MlmsError
from mlmsnet.losses.compound import Compound
from mlmsnet.losses.contract import (
    LOSSES,
    available_losses,
    check_inputs,
    create_loss,
    gradient_map,
    hide_void,
    loss_info,
    register_loss,
    safe_pow,
)
from mlmsnet.losses.pixel import CrossEntropy, Focal, OhemCrossEntropy, strips
from mlmsnet.losses.region import Dice, region_sums

NAMES = available_losses()
# What a loss is by its definition not asked for: (test, loss) -> why. Everything else holds for every loss.
EXEMPT = {
    ("test_perfect_beats_wrong", "exp_log"): "its power 0.3 makes 0.002 of the 1e-8 that a lead of 20 leaves open",
    ("test_classes", "rmi"): "6 x 9 pixels have no room for its patches; see test_losses_structure",
    ("test_perfect_beats_wrong", "log_cosh_dice"): "ln cosh 1 = 0.43 is its largest value",
    ("test_perfect_beats_wrong", "sensitivity_specificity"): "false alarms are divided by all pixels outside the class: all wrong is 0.3",
    ("test_perfect_beats_wrong", "semimetric_dice"): "its labels are soft, so that a hard answer is not the best one",
    ("test_classes", "wasserstein_dice"): "a class without pixels has no row in its sums: 'all' is 'present'",
    ("test_perfect_beats_wrong", "boundary"): "its unit is pixels: negative when perfect; all wrong on a speckled mask is 0.2",
    ("test_perfect_beats_wrong", "edge_bce"): "with all classes swapped, every edge is where it should be",
    ("test_trains_a_tiny_net", "edge_bce"): "it knows where two classes part, not which they are",
}
PIXEL = available_losses("pixel")
REGION = available_losses("region")


def one_hot_logits(y, c, size):
    """Logits that put `size` on the true class, 0 elsewhere (class 0 under void)."""
    return size * F.one_hot(y.masked_fill(y == VOID, 0), c).permute(0, 3, 1, 2).float()


def random_case(c=5, n=2, h=6, w=9, seed=0, void=0.2, size=2.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, c, (n, h, w), generator=g)
    y[torch.rand(n, h, w, generator=g) < void] = VOID
    return size * torch.randn(n, c, h, w, generator=g), y


def _cases():
    z, y = random_case()
    yield "plain", z, y
    yield "perfect", one_hot_logits(y, 5, 50.0), y
    yield "all wrong", one_hot_logits(((y + 1) % 5).masked_fill(y == VOID, 0), 5, 50.0), y
    yield "one class absent", z, y.masked_fill(y == 3, 2)
    yield "one class only", z, torch.ones_like(y)
    yield "all void", z, torch.full_like(y, VOID)
    half = y.clone()
    half[:, :, ::2] = VOID
    yield "half void", z, half
    lonely = torch.full_like(y, VOID)
    lonely[1, 2, 3] = 4
    yield "one valid pixel", z, lonely
    uneven = y.clone()
    uneven[0] = VOID
    uneven[1, 0] = VOID
    yield "one image all void", z, uneven
    yield "two classes", *random_case(c=2)
    yield "nineteen classes", *random_case(c=19, h=11, w=7)
    yield "huge right", one_hot_logits(y, 5, 2e4) - 1e4, y
    yield "huge wrong", 1e4 - one_hot_logits(y, 5, 2e4), y
    yield "non-contiguous", *(t[..., ::2] for t in random_case(w=18))
    yield "channels last", z.contiguous(memory_format=torch.channels_last), y
    yield "one pixel", z[:1, :, :1, :1], torch.full((1, 1, 1), 2)
    yield "all equal", torch.zeros_like(z), y


CASES = {name: (z, y) for name, z, y in _cases()}


def value_and_grad(loss, z, y):
    z = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(z, y)
    (grad,) = torch.autograd.grad(value, z)
    return value.detach(), grad


@pytest.fixture(params=NAMES)
def name(request):
    why = EXEMPT.get((request.node.originalname, request.param))
    if why:
        pytest.skip(f"{request.param}: {why}")
    return request.param


# ---- properties of every loss ----

@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_finite(name, case, mode):
    """Value and gradient are finite; the value is a float32 scalar; also under autocast, with logits in half precision."""
    z, y = CASES[case]
    leaf = z.clone().requires_grad_()
    loss = create_loss(name)
    if mode == "float32":
        value = loss(leaf, y)
        value.backward()
    else:
        dtype = getattr(torch, mode)
        with torch.autocast("cpu", dtype=dtype):
            value = loss(leaf.to(dtype), y)
            value.backward()  # inside: the harder of the two places
    assert value.shape == () and value.dtype == torch.float32
    assert torch.isfinite(value) and torch.isfinite(leaf.grad).all()
    assert (leaf.grad[(y == VOID).unsqueeze(1).expand_as(z)] == 0).all()


def test_half_precision_is_close(name):
    """Half precision costs what rounding the logits costs, no more: sums run in float32."""
    z, y = random_case(h=40, w=50)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = z.to(dtype)
        value, grad = value_and_grad(create_loss(name), rounded, y)
        exact, slope = value_and_grad(create_loss(name), rounded.float(), y)
        assert value == exact
        torch.testing.assert_close(grad, slope.to(dtype))


def test_gradcheck(name):
    z, y = random_case(c=3, h=4, w=5)
    loss = create_loss(name)
    assert loss(z.double(), y).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: loss(x, y), z.double().requires_grad_())


@pytest.mark.parametrize("rubbish", [0.0, 1e4, float("nan"), float("inf"), -float("inf")])
def test_void_leaks_nothing(name, rubbish):
    z, y = random_case()
    value, grad = value_and_grad(create_loss(name), z, y)
    dirty = torch.where((y == VOID).unsqueeze(1), torch.tensor(rubbish), z)
    value2, grad2 = value_and_grad(create_loss(name), dirty, y)
    assert value == value2 and torch.equal(grad, grad2)
    assert (grad2.abs().sum(1)[y == VOID] == 0).all()


def test_void_pixels_do_not_exist(name):
    """Adding void (an empty border, a void image) changes nothing."""
    z, y = random_case(void=0)
    padded, label = F.pad(z, (0, 3, 2, 0), value=7.0), F.pad(y, (0, 3, 2, 0), value=VOID)
    loss = create_loss(name)
    torch.testing.assert_close(loss(padded, label), loss(z, y))
    more, labels = torch.cat([z, z[:1]]), torch.cat([y, torch.full_like(y[:1], VOID)])
    torch.testing.assert_close(loss(more, labels), loss(z, y))


def test_all_void(name):
    z, y = CASES["all void"]
    value, grad = value_and_grad(create_loss(name), z, y)
    assert value == 0 and (grad == 0).all()


def test_inputs_unmodified(name):
    z, y = random_case()
    z0, y0 = z.clone(), y.clone()
    value_and_grad(create_loss(name), z, y)
    leaf = z.requires_grad_()
    create_loss(name)(leaf, y).backward()
    assert torch.equal(z0, leaf.detach()) and torch.equal(y0, y)


def test_layout_and_dtype_of_target(name):
    z, y = random_case(h=8, w=10)
    loss = create_loss(name)
    value, grad = value_and_grad(loss, z, y)
    for z2 in (z.contiguous(memory_format=torch.channels_last), z.transpose(2, 3).contiguous().transpose(2, 3)):
        value2, grad2 = value_and_grad(loss, z2, y)
        torch.testing.assert_close(value2, value)
        torch.testing.assert_close(grad2, grad)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert loss(z, y.to(dtype)) == value


def test_perfect_beats_wrong(name):
    _, y = random_case()
    good, bad = one_hot_logits(y, 5, 20.0), one_hot_logits(((y + 1) % 5).masked_fill(y == VOID, 0), 5, 20.0)
    loss = create_loss(name)
    assert loss(good, y) < 1e-3 < 0.5 < loss(bad, y)


def test_same_scores_for_shifted_logits(name):
    """A constant added to all scores of a pixel is nothing to a softmax."""
    z, y = random_case()
    shift = torch.randn(2, 1, 6, 9)
    torch.testing.assert_close(create_loss(name)(z + shift, y), create_loss(name)(z, y), rtol=1e-4, atol=1e-6)


def test_other_ignore_index(name):
    z, y = random_case()
    for ignore in (-1, 7):
        other = y.masked_fill(y == VOID, ignore)
        assert create_loss(name, ignore_index=ignore)(z, other) == create_loss(name)(z, y)


def test_class_weight(name):
    """Weights of 1 change nothing, their scale changes nothing, a class of weight 0 has no say, a wrong length is an error."""
    if "class_weight" not in loss_info(name).defaults:
        pytest.skip(f"{name} has no class_weight")
    z, y = random_case()
    plain = create_loss(name)(z, y)
    torch.testing.assert_close(create_loss(name, class_weight=[1.0] * 5)(z, y), plain)
    torch.testing.assert_close(create_loss(name, class_weight=[3.0] * 5)(z, y), plain)
    assert create_loss(name, class_weight=[1, 2, 3, 4, 5])(z, y) != plain
    assert torch.isfinite(create_loss(name, class_weight=[0] * 5)(z, y))
    with pytest.raises(ConfigError, match="5 classes"):
        create_loss(name, class_weight=[1, 2])(z, y)


def test_classes(name):
    """`classes`: the present ones, all, or a list; for a target with every class the three agree."""
    if "classes" not in loss_info(name).defaults:
        pytest.skip(f"{name} has no classes")
    z, y = random_case(c=4, void=0)
    torch.testing.assert_close(create_loss(name, classes="all")(z, y), create_loss(name)(z, y))
    torch.testing.assert_close(create_loss(name, classes=[0, 1, 2, 3])(z, y), create_loss(name)(z, y))
    y = y.masked_fill(y == 3, 0)
    torch.testing.assert_close(create_loss(name, classes=[0, 1, 2])(z, y), create_loss(name)(z, y))
    assert create_loss(name, classes="all")(z, y) != create_loss(name)(z, y)
    with pytest.raises(ConfigError, match="4 classes"):
        create_loss(name, classes=[9])(z, y)


def test_per_image(name):
    """`per_image` is the mean of the images' own losses; a void image has no say."""
    if "per_image" not in loss_info(name).defaults:
        pytest.skip(f"{name} has no per_image")
    z, y = random_case(n=3)
    each = torch.stack([create_loss(name)(z[i:i + 1], y[i:i + 1]) for i in range(3)])
    loss = create_loss(name, per_image=True)
    if name in REGION:
        torch.testing.assert_close(loss(z, y), each.mean())
        y[1] = VOID
        torch.testing.assert_close(loss(z, y), each[[0, 2]].mean())
    assert torch.isfinite(loss(z, torch.full_like(y, VOID)))


def test_trains_a_tiny_net(name):
    """Each loss, alone, brings a two-layer network to reproduce a mask with a thin line and a small square."""
    right = share_learnt(create_loss(name))
    assert right > 0.995, f"{name}: {right:.3f} of the pixels"


def test_gradient_map_leaves_no_trace(name):
    z, y = random_case()
    loss, state = create_loss(name), torch.get_rng_state()
    leaf = z.clone().requires_grad_()
    g = gradient_map(loss, leaf, y)
    assert g.shape == y.shape and leaf.grad is None and torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(g, value_and_grad(loss, z, y)[1].norm(dim=1))


def test_metadata(name):
    info = loss_info(name)
    assert info.formula and info.paper and info.absent and info.summary, f"{name} lacks metadata"
    assert set(info.defaults) >= {"ignore_index"}
    for p in info.params:
        assert p.doc, f"{name}: {p.name} says nothing"
        assert p.check(p.default) == p.default
        if p.type in ("float", "int") and p.low is not None:
            with pytest.raises(ConfigError, match=p.name):
                create_loss(name, **{p.name: p.low - 1})
    assert info.build.__doc__


def test_copy_pickle_device_moves(name):
    z, y = random_case()
    loss = create_loss(name, **({"class_weight": [1, 2, 3, 4, 5]} if "class_weight" in loss_info(name).defaults else {}))
    assert copy.deepcopy(loss)(z, y) == loss(z, y)
    assert loss.to(torch.float16)(z, y).dtype == torch.float32
    assert not loss.state_dict()
    if "<locals>" not in type(loss).__qualname__ and hasattr(inspect.getmodule(type(loss)), type(loss).__name__):
        assert pickle.loads(pickle.dumps(create_loss(name)))(z, y) == create_loss(name)(z, y)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_strips_change_nothing(name, rows, monkeypatch):
    """However the batch is cut, value and gradient are the same."""
    z, y = random_case(n=3, h=7)
    value, grad = value_and_grad(create_loss(name), z, y)

    def few(logits):
        n, c, h, w = logits.shape
        return strips(logits, rows * c * w * logits.element_size() / 2**20 * 1.01)
    monkeypatch.setattr("mlmsnet.losses.pixel.strips", few)
    monkeypatch.setattr("mlmsnet.losses.region.strips", few)
    value2, grad2 = value_and_grad(create_loss(name), z, y)
    torch.testing.assert_close(value, value2)
    torch.testing.assert_close(grad, grad2)


def test_wrong_use(name):
    z, y = random_case()
    loss = create_loss(name)
    for bad, why in [((z.argmax(1), y), "N C H W"), ((z.long(), y), "floating point"), ((z, y[:, :3]), "shape"),
                     ((z, y.float()), "float32"),
                     ((z, y.clamp(max=200)), "outside 0..4: 200"), ((z, y - 1), "-1"),
                     ((z, [1]), "list"), ((z, y.unsqueeze(1)), "squeeze")]:
        with pytest.raises(DataError, match=why) as e:
            loss(*bad)
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="ignore_index"):
        create_loss(name, ignore_indx=255)


# ---- independent formulas ----

def softmax_np(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def p_true(z, y):
    """p_y of the valid pixels, and their labels, in NumPy float64."""
    p, t = softmax_np(z.double().numpy()), y.numpy()
    n, h, w = np.nonzero(t != VOID)
    return p[n, t[n, h, w], h, w], t[n, h, w]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 0.0, 3.0]])
def test_cross_entropy_is_torchs(weight, smoothing):
    z, y = random_case()
    w = None if weight is None else torch.tensor(weight)
    def peer(z, y): return F.cross_entropy(z, y, w, ignore_index=VOID, label_smoothing=smoothing)
    ours, theirs = value_and_grad(CrossEntropy(class_weight=weight, label_smoothing=smoothing), z, y), value_and_grad(peer, z, y)
    torch.testing.assert_close(ours, theirs)
    per_pixel = F.cross_entropy(z, y, w, ignore_index=VOID, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(CrossEntropy(class_weight=weight, label_smoothing=smoothing).pixel_map(z, y), per_pixel)


@pytest.mark.parametrize("size", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
def test_focal_against_numpy(gamma, size):
    z, y = random_case(size=size)
    p, t = p_true(z, y)
    alpha = np.array([1.0, 2.0, 0.5, 0.25, 3.0])
    assert np.isclose(Focal(gamma=gamma)(z.double(), y), np.mean(-(1 - p) ** gamma * np.log(p)))
    assert np.isclose(Focal(gamma=gamma, alpha=alpha)(z.double(), y), np.mean(-alpha[t] * (1 - p) ** gamma * np.log(p)))
    weighted = np.sum(-alpha[t] * (1 - p) ** gamma * np.log(p)) / alpha[t].sum()
    assert np.isclose(Focal(gamma=gamma, class_weight=alpha)(z.double(), y), weighted)


def test_focal_gradient_at_a_perfect_pixel():
    """A power below 1 has an infinite slope at 0; the loss must not."""
    _, y = random_case()
    for gamma in (0.1, 0.5, 0.9):
        for size in (15.0, 40.0, 1e4):
            value, grad = value_and_grad(Focal(gamma=gamma), one_hot_logits(y, 5, size), y)
            assert torch.isfinite(grad).all() and grad.abs().max() < 1e-3
    x = torch.zeros(3, requires_grad=True)
    safe_pow(x, 0.5).sum().backward()
    assert torch.isfinite(x.grad).all()


def ohem_loss_np(z, y, thresh, k):
    p, _ = p_true(z, y)
    pixels = np.sort(-np.log(p))[::-1]
    hard = pixels[pixels > -np.log(thresh)]
    return (hard if len(hard) >= k else pixels[:k]).mean()


def ohem_prob_np(z, y, thresh, min_kept):
    p, _ = p_true(z, y)
    p = np.sort(p)
    kept = p[p < max(thresh, p[min(min_kept, len(p)) - 1])]
    return -np.log(kept).mean() if len(kept) else 0.0


@pytest.mark.parametrize("thresh", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("push", [0.0, 3.0, 9.0])
def test_ohem_against_numpy(push, thresh):
    z, y = random_case(h=16, w=24, n=3, size=1.0)
    z = (z + one_hot_logits(y, 5, push)).double()
    n = int((y != VOID).sum())
    assert np.isclose(OhemCrossEntropy(thresh=thresh)(z, y), ohem_loss_np(z, y, thresh, max(1, n // 16)))
    for k in (1, 50, 400, 10**6):
        assert np.isclose(OhemCrossEntropy(thresh=thresh, min_kept=k)(z, y), ohem_loss_np(z, y, thresh, min(k, n)))
        assert np.isclose(OhemCrossEntropy(rule="prob", thresh=thresh, min_kept=k)(z, y), ohem_prob_np(z, y, thresh, k))


def test_ohem_keeps_what_it_says():
    z, y = random_case(h=16, w=24, void=0.5)
    z = z + one_hot_logits(y, 5, 12.0)  # nearly all easy: the quota decides, and void must not fill it
    n = int((y != VOID).sum())
    kept = OhemCrossEntropy(thresh=0.05).kept_mask(z, y)
    assert int(kept.sum()) == n // 16 and not kept[y == VOID].any()
    ell = CrossEntropy().pixel_map(z, y)
    assert ell[kept].min() >= ell[~kept & (y != VOID)].max()
    for rule in ("loss", "prob"):  # a saturated prediction: every p_y is exactly 1
        value, grad = value_and_grad(OhemCrossEntropy(rule=rule, min_kept=3), one_hot_logits(y, 5, 1e4), y)
        assert value == 0 and torch.isfinite(grad).all()


@pytest.mark.parametrize("k", [0.0, 0.1, 0.5, 1.0])
def test_topk_against_numpy(k):
    z, y = random_case()
    p, _ = p_true(z, y)
    worst = np.sort(-np.log(p))[::-1][:max(1, int(k * len(p)))]
    assert np.isclose(create_loss("topk", k=k)(z.double(), y), worst.mean())


def dice_np(z, y, smooth=0.0, squared=False, per_image=False, classes="present", weight=None):
    """With a one-hot, looping over images and classes: slow, and nothing like the library's code."""
    p, t = softmax_np(z.double().numpy()), y.numpy()
    groups = [slice(i, i + 1) for i in range(len(t))] if per_image else [slice(None)]
    out = []
    for group in groups:
        scores, weights = [], []
        valid = t[group] != VOID
        for c in range(p.shape[1]):
            pc, gc = p[group, c][valid], (t[group][valid] == c).astype(float)
            if classes == "present" and gc.sum() == 0:
                continue
            mass = (pc**2 if squared else pc).sum() + gc.sum() + smooth
            scores.append(1 - (2 * (pc * gc).sum() + smooth) / mass)
            weights.append(1 if weight is None else weight[c])
        if valid.any():
            out.append(np.average(scores, weights=weights))
    return np.mean(out)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("classes", ["present", "all"])
def test_dice_against_numpy(classes, smooth, squared, per_image):
    z, y = random_case(n=3)
    y[0] = y[0].masked_fill(y[0] == 1, 0)
    y = y.masked_fill(y == 3, 2)
    weight = [1.0, 2.0, 0.5, 4.0, 3.0]
    for w in (None, weight):
        kw = {"smooth": smooth, "squared": squared, "per_image": per_image, "classes": classes}
        assert np.isclose(Dice(**kw, class_weight=w)(z.double(), y), dice_np(z, y, **kw, weight=w))
    loss = Dice(smooth=smooth, squared=squared, per_image=per_image, classes=classes)
    assert torch.autograd.gradcheck(lambda x: loss(x, y[:, :3, :3]), z[:, :, :3, :3].double().requires_grad_())


def test_absent_class_rules():
    """Present: an absent class has no say. All: it counts in full while anything of it is predicted, 0 once nothing is."""
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    sure = one_hot_logits(y, 3, 2e4)  # class 0 with probability exactly 1
    assert Dice()(sure, y) == 0 and Dice(classes="all")(sure, y) == 0  # 0/0 is a perfect overlap
    unsure = one_hot_logits(y, 3, 1.0)
    assert Dice(classes="all")(unsure, y) > Dice()(unsure, y)
    assert torch.isclose(Dice(classes=[1, 2])(unsure, y), torch.tensor(1.0))
    p = unsure.softmax(1)[0, 1].sum()
    assert torch.isclose(Dice(classes=[1], smooth=5.0)(unsure, y), 1 - 5 / (p + 5))


def test_region_sums_are_additive_and_equal_one_hot():
    z, y = random_case(n=3, h=8)
    valid = y != VOID
    label = y.masked_fill(~valid, 0)
    whole = region_sums(z, label, valid, squares=True)
    p = z.softmax(1) * valid.unsqueeze(1)
    g = F.one_hot(label, 5).permute(0, 3, 1, 2) * valid.unsqueeze(1)
    for ours, theirs in zip(whole, [(p * g), p, g.float(), p**2, p**2 * g]):
        torch.testing.assert_close(ours, theirs.sum((2, 3)))
    top, bottom = (region_sums(z[:, :, s], label[:, s], valid[:, s], squares=True) for s in (slice(0, 3), slice(3, None)))
    for a, b in zip(top.plus(bottom), whole):
        torch.testing.assert_close(a, b)
    assert whole.total().tp.shape == (1, 5)


# ---- identities ----

def test_identities():
    z, y = random_case()
    ce = CrossEntropy()(z, y)
    for same in (Focal(gamma=0), OhemCrossEntropy(thresh=1.0, min_fraction=1.0), OhemCrossEntropy(rule="prob", thresh=1.0),
                 create_loss("topk", k=1.0), create_loss("dice_ce", dice_weight=0), create_loss("dice_focal", dice_weight=0, gamma=0.0)):
        torch.testing.assert_close(same(z, y), ce)
    assert torch.equal(OhemCrossEntropy(thresh=1.0).kept_mask(z, y), y != VOID)
    torch.testing.assert_close(create_loss("dice_ce")(z, y), Dice()(z, y) + ce)
    torch.testing.assert_close(Compound([(0.25, "dice"), (2, Focal())])(z, y), 0.25 * Dice()(z, y) + 2 * Focal()(z, y))


def test_maps_belong_to_their_loss():
    z, y = random_case()
    for name in PIXEL:
        loss = create_loss(name, class_weight=[1, 2, 3, 4, 5])
        pixels, kept = loss.pixel_map(z, y), loss.kept_mask(z, y)
        weight = torch.tensor([1.0, 2, 3, 4, 5])[y.masked_fill(y == VOID, 0)]
        torch.testing.assert_close(loss(z, y), pixels[kept].sum() / weight[kept].sum())
        assert (pixels[y == VOID] == 0).all() and not kept[y == VOID].any()
    for name in REGION:
        with pytest.raises(MlmsError, match="gradient_map"):
            create_loss(name).pixel_map(z, y)


def test_compound_takes_the_parameters_of_its_parts():
    loss = create_loss("dice_focal", gamma=1.0, smooth=2.0, class_weight=[1, 1, 1, 1, 2], focal_weight=0.5)
    z, y = random_case()
    w = [1, 1, 1, 1, 2]
    torch.testing.assert_close(loss(z, y), Dice(smooth=2.0, class_weight=w)(z, y) + 0.5 * Focal(gamma=1.0, class_weight=w)(z, y))
    with pytest.raises(ConfigError, match="at least one part"):
        Compound([])
    with pytest.raises(ConfigError, match="focal_weight"):
        create_loss("dice_focal", focal_weigth=1.0)
    both_off = create_loss("dice_ce", dice_weight=0, ce_weight=0)
    value, grad = value_and_grad(both_off, z, y)
    assert value == 0 and (grad == 0).all()


# ---- the registry ----

def test_a_user_registers_a_loss_in_one_line():
    register_loss("mine", lambda logits, target, temperature=1.0: F.cross_entropy(logits / temperature, target, ignore_index=255))
    try:
        z, y = random_case()
        torch.testing.assert_close(create_loss("mine")(z, y), CrossEntropy()(z, y))
        assert create_loss("mine", temperature=2.0)(z, y) != create_loss("mine")(z, y)
        assert "mine" in available_losses("yours")
        value, grad = value_and_grad(create_loss("mine"), *CASES["all void"])  # torch's own answer here is NaN
        assert value == 0 and (grad == 0).all()
        dirty = torch.where((y == VOID).unsqueeze(1), torch.tensor(float("nan")), z)
        assert torch.isfinite(value_and_grad(create_loss("mine"), dirty, y)[1]).all()
    finally:
        del LOSSES["mine"]
    with pytest.raises(ConfigError, match="registered already"):
        register_loss("dice", lambda z, y: z.sum())


def test_errors_name_the_mend():
    with pytest.raises(ConfigError, match="Did you mean focal"):
        create_loss("focl")
    with pytest.raises(ConfigError, match="Did you mean gamma"):
        create_loss("focal", gama=2.0)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        create_loss("ohem", thresh=1.5)
    with pytest.raises(ConfigError, match="prob"):
        create_loss("ohem", rule="porb")
    with pytest.raises(ConfigError, match="must be a number"):
        create_loss("focal", gamma="2")
    with pytest.raises(ConfigError, match="one finite number"):
        create_loss("focal", class_weight=[1, -1])
    z = torch.randn(1, 19, 4, 4)
    with pytest.raises(DataError, match="33.*labelTrainIds"):
        check_inputs(z, torch.full((1, 4, 4), 33))
    with pytest.raises(ConfigError, match="alpha has 2"):
        create_loss("focal", alpha=[1, 2])(z, torch.zeros(1, 4, 4, dtype=torch.long))
    create_loss("dice", check="never")(z, torch.zeros(1, 4, 4, dtype=torch.long))


def test_hide_void_is_a_copy():
    z, y = random_case()
    before = z.clone()
    hidden = hide_void(z, y != VOID)
    assert torch.equal(z, before) and (hidden.abs().sum(1)[y == VOID] == 0).all()
