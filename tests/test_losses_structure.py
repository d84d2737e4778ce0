"""Soft clDice and region mutual information against loops over pixels and patches in NumPy; void, covariances, training."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _losses import VOID, share_learnt

from mlmsnet.core import ConfigError
from mlmsnet.losses.contract import create_loss, gradient_map
from mlmsnet.losses.pixel import CrossEntropy
from mlmsnet.losses.region import Dice
from mlmsnet.losses.structure import RMI, SoftClDice, soft_skeleton


def case(c=3, n=2, h=13, w=15, seed=0, size=2.0, void=0.03):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, c, (n, h // 2 + 1, w // 2 + 1), generator=g).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :h, :w].clone()
    y[torch.rand(n, h, w, generator=g) < void] = VOID
    return size * torch.randn(n, c, h, w, generator=g).double(), y


def softmax_np(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ---- centre lines ----

def neighbours(x, valid, i, j, steps):
    return [x[i + a, j + b] for a, b in steps if 0 <= i + a < len(x) and 0 <= j + b < len(x[0]) and valid[i + a, j + b]]


CROSS = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
SQUARE = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]


def pool_np(x, valid, steps, pick):
    out = np.zeros_like(x)
    for i, j in zip(*np.nonzero(valid)):
        out[i, j] = pick(neighbours(x, valid, i, j, steps))
    return out


def skeleton_np(x, valid, iterations):
    """Algorithm 1 of the paper, pixel by pixel; what is void is no neighbour."""
    def opened(x): return pool_np(pool_np(x, valid, CROSS, min), valid, SQUARE, max)
    x = np.where(valid, x, 0)
    line = np.maximum(x - opened(x), 0)
    for _ in range(iterations):
        x = pool_np(x, valid, CROSS, min)
        line = line + (1 - line) * np.maximum(x - opened(x), 0)
    return line


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_skeleton_against_loops(iterations):
    z, y = case(n=1, void=0.1)
    p, valid = z.softmax(1)[0, 1], (y != VOID)[0]
    ours = soft_skeleton(p[None], ~valid[None], iterations)[0]
    np.testing.assert_allclose(ours, skeleton_np(p.numpy(), valid.numpy(), iterations), atol=1e-12)


def cldice_np(z, y, alpha, iterations, smooth, per_image, classes, weight=None):
    p, t = softmax_np(z.numpy()), y.numpy()
    groups = [[i] for i in range(len(t))] if per_image else [list(range(len(t)))]
    out = []
    for group in groups:
        losses, weights = [], []
        if not (t[group] != VOID).any():
            continue
        for c in range(p.shape[1]):
            if classes == "present" and not (t[group] == c).any() or isinstance(classes, list) and c not in classes:
                continue
            s = np.zeros(7)
            for i in group:
                v, g = t[i] != VOID, (t[i] == c).astype(float)
                sp, sg = skeleton_np(p[i, c], v, iterations), skeleton_np(g, v, iterations)
                s += [(sp * g).sum(), sp.sum(), (sg * p[i, c]).sum(), sg.sum(), (p[i, c] * g).sum(), p[i, c][v].sum(), g.sum()]
            precision, recall = (s[0] + smooth) / (s[1] + smooth), (s[2] + smooth) / (s[3] + smooth)
            losses.append((1 - alpha) * (1 - 2 * s[4] / (s[5] + s[6])) + alpha * (1 - 2 / (1 / precision + 1 / recall)))
            weights.append(1 if weight is None else weight[c])
        out.append(np.average(losses, weights=weights))
    return np.mean(out)


@pytest.mark.parametrize("classes", ["present", "all", [0, 2]])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_cldice_against_loops(alpha, per_image, classes):
    z, y = case()
    y[0] = y[0].masked_fill(y[0] == 1, 0)
    kw = {"alpha": alpha, "iterations": 2, "smooth": 0.5, "per_image": per_image, "classes": classes}
    for weight in (None, [1.0, 3.0, 0.5]):
        assert np.isclose(SoftClDice(**kw, class_weight=weight)(z, y), cldice_np(z, y, **kw, weight=weight))


def pole(left=6, right=9, gap=0):
    y = torch.zeros(1, 32, 16, dtype=torch.long)
    y[:, 4:28, left:right] = 1
    y[:, 16 - gap // 2:16 - gap // 2 + gap] = 0
    return y


def sure(y, c=2, size=1e4): return size * F.one_hot(y.masked_fill(y == VOID, 0), c).movedim(-1, 1).float()


def test_cldice_knows_gaps_not_width():
    target, line = pole(), SoftClDice(alpha=1, classes=[1])
    assert line(sure(pole()), target) == 0
    assert line(sure(pole(7, 8)), target) == 0 and Dice(classes=[1])(sure(pole(7, 8)), target) == 0.5
    assert line(sure(pole(5, 10)), target) < 0.1
    gaps = [line(sure(pole(gap=g)), target).item() for g in (0, 2, 6, 12, 20)]
    assert gaps == sorted(gaps) and gaps[2] > 0.1


def test_cldice_gradcheck_and_identity():
    z, y = case(c=2, h=5, w=6)
    for kw in ({"alpha": 1.0, "per_image": True}, {"iterations": 1, "classes": [1]}):
        assert torch.autograd.gradcheck(lambda x, kw=kw: SoftClDice(**kw)(x, y), z.clone().requires_grad_())
    torch.testing.assert_close(SoftClDice(alpha=0)(z, y), Dice()(z, y))


# ---- patches ----

def patch_vectors(z, y, c, pool, window):
    """Lists of (target, prediction) vectors of all patches without void, one list per image."""
    p, t = softmax_np(z.numpy()), y.numpy()
    n, h, w = len(t), t.shape[1] // pool, t.shape[2] // pool
    images = []
    for k in range(n):
        cell_t, cell_p, clean = np.zeros((h, w)), np.zeros((h, w)), np.zeros((h, w), bool)
        for i in range(h):
            for j in range(w):
                box = np.s_[i * pool:(i + 1) * pool, j * pool:(j + 1) * pool]
                cell_t[i, j], cell_p[i, j] = (t[k][box] == c).mean(), p[k, c][box].mean()
                clean[i, j] = (t[k][box] != VOID).all()
        found = []
        for i in range(h - window + 1):
            for j in range(w - window + 1):
                box = np.s_[i:i + window, j:j + window]
                if clean[box].all():
                    found.append((cell_t[box].ravel(), cell_p[box].ravel()))
        images.append(found)
    return images


def open_np(pairs, eps):
    """½ ln det(M + εI) / d, less the same of the target as its own prediction: with np.cov, an inverse and slogdet."""
    t, p = (np.array(v) for v in zip(*pairs))
    d = t.shape[1]

    def half_log_det(p):
        cov = np.cov(np.hstack([t, p]).T, bias=True)
        tt, tp, pp = cov[:d, :d], cov[:d, d:], cov[d:, d:]
        m = tt - tp @ np.linalg.inv(pp + eps * np.eye(d)) @ tp.T
        return 0.5 * np.linalg.slogdet(m + eps * np.eye(d))[1] / d
    return half_log_det(p) - half_log_det(t)


def rmi_np(z, y, pool, window, eps, per_image, classes):
    t = y.numpy()
    groups = [[i] for i in range(len(t))] if per_image else [list(range(len(t)))]
    rows = []
    for group in groups:
        losses = []
        for c in range(z.shape[1]):
            pairs = [pair for i in group for pair in patch_vectors(z, y, c, pool, window)[i]]
            if len(pairs) <= 2 * window**2:
                continue
            if classes == "all" or isinstance(classes, list) and c in classes or classes == "present" and (t[group] == c).any():
                losses.append(open_np(pairs, eps))
        if losses:
            rows.append(np.mean(losses))
    return np.mean(rows) if rows else 0.0


@pytest.mark.parametrize("classes", ["present", "all", [0, 2]])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("pool, window", [(1, 3), (2, 2), (3, 1), (2, 3)])
def test_rmi_against_loops(pool, window, per_image, classes):
    z, y = case(h=17, w=20, void=0.01)
    y[1] = y[1].masked_fill(y[1] == 1, 0)
    loss = RMI(ce_share=0, pool=pool, window=window, epsilon=1e-2, per_image=per_image, classes=classes)
    want = rmi_np(z, y, pool, window, 1e-2, per_image, classes)
    assert np.isclose(loss(z, y), want, atol=1e-10) and want != 0
    half = RMI(ce_share=0.3, pool=pool, window=window, epsilon=1e-2, per_image=per_image, classes=classes)
    assert np.isclose(half(z, y), 0.3 * CrossEntropy()(z, y) + 0.7 * want)


def test_rmi_gradcheck():
    z, y = case(c=2, n=1, h=6, w=8, void=0.0)
    for kw in ({"per_image": True}, {"per_image": False, "class_weight": [1, 3]}):
        loss = RMI(ce_share=0.2, pool=1, **kw)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, y), z.clone().requires_grad_())
        assert loss(z, y) != 0.2 * CrossEntropy(class_weight=kw.get("class_weight"))(z, y)


@pytest.mark.parametrize("per_image", [False, True])
def test_rmi_perfect_void_and_extremes(per_image):
    z, y = case(h=24, w=28)
    loss = RMI(ce_share=0, pool=1, per_image=per_image)
    assert abs(loss(sure(y, 3), y)) < 1e-6
    assert loss(z, torch.full_like(y, VOID)) == 0
    for x in (1e4 * z, 1e4 * z.float(), sure((y + 1) % 3, 3), torch.zeros_like(z), 1e-3 * z.float()):
        assert torch.isfinite(loss(x, y)) and torch.isfinite(gradient_map(loss, x, y)).all()
    value, g = loss(z, y), gradient_map(loss, z, y)
    for rubbish in (float("nan"), float("inf"), 1e4):
        dirty = torch.where((y == VOID).unsqueeze(1), torch.tensor(rubbish).double(), z)
        assert loss(dirty, y) == value and torch.equal(gradient_map(loss, dirty, y), g)
    assert (g[y == VOID] == 0).all()
    padded, label = F.pad(z, (0, 3, 2, 0), value=7.0), F.pad(y, (0, 3, 2, 0), value=VOID)
    torch.testing.assert_close(loss(padded, label), value)


def test_rmi_without_room():
    """No patch, or too few of them to say anything: no say. An image of void alone has none either."""
    z, y = case(h=6, w=9, void=0)
    assert RMI(ce_share=0)(z, y) == 0 and gradient_map(RMI(ce_share=0), z, y).max() == 0
    assert RMI(ce_share=0, pool=2, window=2)(z, y) == 0  # 2 x 3 patches, 8 numbers
    z, y = case(h=16, w=18, void=0)
    one = RMI(ce_share=0, pool=1)(z[:1], y[:1])
    y[1] = VOID
    torch.testing.assert_close(RMI(ce_share=0, pool=1)(z, y), one)


def test_rmi_classes_and_weights():
    z, y = case(c=4, h=16, w=18, void=0)
    def loss(**kw): return RMI(pool=1, **kw)(z, y)
    torch.testing.assert_close(loss(classes="all"), loss())
    torch.testing.assert_close(loss(classes=[0, 1, 2, 3]), loss())
    torch.testing.assert_close(loss(class_weight=[2, 2, 2, 2]), loss())
    assert loss(class_weight=[1, 2, 3, 4]) != loss()
    with pytest.raises(ConfigError, match="4 classes"):
        loss(classes=[9])
    each = [RMI(ce_share=0, pool=1)(z[i:i + 1], y[i:i + 1]) for i in range(2)]
    torch.testing.assert_close(RMI(ce_share=0, pool=1)(z, y), torch.stack(each).mean())


def test_rmi_half_precision():
    z, y = case(h=40, w=50)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            x = z.to(dtype).requires_grad_()
            value = create_loss("rmi", pool=2)(x, y)
            value.backward()
        assert value.dtype == torch.float32 and torch.isfinite(x.grad).all()
        assert torch.isclose(value, create_loss("rmi", pool=2)(x.detach().float(), y))


@pytest.mark.parametrize("kw", [{"ce_share": 0.0, "pool": 1}, {"ce_share": 0.5, "pool": 2}])
def test_rmi_trains_a_tiny_net(kw):
    assert share_learnt(create_loss("rmi", **kw)) > 0.995
