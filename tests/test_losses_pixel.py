"""Poly-1, balanced softmax, generalised cross-entropy and bi-tempered loss against slow formulas, pixel by pixel in plain Python."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _losses import VOID, case

from mlmsnet.core import ConfigError
from mlmsnet.losses.contract import create_loss, gradient_map
from mlmsnet.losses.pixel import BalancedSoftmax, BiTempered, CrossEntropy, GeneralizedCrossEntropy, Poly1


def pixels(z, y):
    """(scores, label) of every valid pixel."""
    z, y = z.numpy(), y.numpy()
    return [(z[n, :, i, j], y[n, i, j]) for n, i, j in zip(*np.nonzero(y != VOID))]


def prob(s):
    e = [math.exp(v - max(s)) for v in s]
    return [v / sum(e) for v in e]


def mean(f, z, y, weight=None):
    value = [(f(s, t), 1 if weight is None else weight[t]) for s, t in pixels(z, y)]
    return sum(v * w for v, w in value) / sum(w for _, w in value)


@pytest.mark.parametrize("size", [0.5, 4.0])
@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 1.0, 3.5])
def test_poly1(epsilon, size):
    z, y = case(size=size)
    def f(s, t): return -math.log(prob(s)[t]) + epsilon * (1 - prob(s)[t])
    assert math.isclose(Poly1(epsilon=epsilon)(z, y), mean(f, z, y), rel_tol=1e-9)
    w = [1.0, 0.5, 2.0, 3.0, 0.0]
    assert math.isclose(Poly1(epsilon=epsilon, class_weight=w)(z, y), mean(f, z, y, w), rel_tol=1e-9)


def test_poly1_is_its_series():
    """(1+ε)(1-p) + (1-p)²/2 + (1-p)³/3 + ..."""
    z, y = case(size=0.5)
    def f(s, t): return sum((1 - prob(s)[t]) ** j / j for j in range(1, 500)) + 2 * (1 - prob(s)[t])
    assert math.isclose(Poly1(epsilon=2)(z, y), mean(f, z, y), rel_tol=1e-7)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.3, 0.7, 1.0])
def test_gce(q):
    z, y = case()
    def f(s, t): return (1 - prob(s)[t] ** q) / q if q else -math.log(prob(s)[t])
    assert math.isclose(GeneralizedCrossEntropy(q=q)(z, y), mean(f, z, y), rel_tol=1e-9)


def test_gce_lets_go_of_hopeless_pixels():
    y = torch.zeros(1, 1, 1, dtype=torch.long)
    for lead in (5.0, 10.0, 20.0):
        z = torch.tensor([0.0, lead]).double().view(1, 2, 1, 1)
        p = 1 / (1 + math.exp(lead))
        ratio = gradient_map(GeneralizedCrossEntropy(q=0.7), z, y) / gradient_map(CrossEntropy(), z, y)
        assert math.isclose(ratio, p**0.7, rel_tol=1e-9)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("absent", [False, True])
def test_balanced_softmax(absent, tau):
    z, y = case()
    if absent:
        y = y.masked_fill(y == 3, 1)
    count = [max(1, sum(t == c for _, t in pixels(z, y))) for c in range(5)]

    def f(s, t):  # as printed in the paper: weights in front of the exponentials
        e = [n**tau * math.exp(v) for n, v in zip(count, s)]
        return -math.log(e[t] / sum(e))
    assert math.isclose(BalancedSoftmax(tau=tau)(z, y), mean(f, z, y), rel_tol=1e-9)
    assert math.isclose(BalancedSoftmax(tau=tau, prior=[10.0 * n for n in count])(z, y), mean(f, z, y), rel_tol=1e-9)
    w = [1.0, 2.0, 0.5, 1.0, 3.0]
    loss = BalancedSoftmax(tau=tau, class_weight=w)
    assert math.isclose(loss(z, y), mean(f, z, y, w), rel_tol=1e-9)
    kept = loss.kept_mask(z, y)
    assert torch.equal(kept, y != VOID)
    assert math.isclose(loss.pixel_map(z, y).sum() / torch.tensor(w)[y[kept]].sum(), loss(z, y), rel_tol=1e-6)


def test_balanced_softmax_zero_prior():
    """A prior of 0 is a hundredth of the smallest other: finite, and still a rival that must be beaten."""
    z, y = case()
    loss = BalancedSoftmax(prior=[0, 2, 1, 0, 7])
    assert torch.isclose(loss(z, y), BalancedSoftmax(prior=[0.01, 2, 1, 0.01, 7])(z, y))
    for size in (1.0, 1e4):
        assert torch.isfinite(loss(size * z, y)) and torch.isfinite(gradient_map(loss, size * z, y)).all()
    alone = torch.zeros_like(y)  # only class 0 is there: claiming another one still costs
    assert BalancedSoftmax()(F.one_hot(alone + 3, 5).movedim(-1, 1) * 30.0, alone) > 10
    with pytest.raises(ConfigError, match="prior has 2"):
        create_loss("balanced_softmax", prior=[1, 2])(z, y)
    with pytest.raises(ConfigError, match="all zero"):
        create_loss("balanced_softmax", prior=[0] * 5)(z, y)


def test_balanced_softmax_learns_what_cross_entropy_minus_prior_learns():
    """On pixels without any evidence the best scores are ln π for cross-entropy, and equal ones for balanced softmax."""
    y = torch.tensor([0] * 70 + [1] * 20 + [2] * 10).view(1, 10, 10)
    for name, best in (("cross_entropy", [0.7, 0.2, 0.1]), ("balanced_softmax", [1 / 3] * 3)):
        score = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        opt = torch.optim.LBFGS([score], max_iter=100)
        loss = create_loss(name)

        def step(score=score, opt=opt, loss=loss):
            opt.zero_grad()
            value = loss(score.view(1, 3, 1, 1).expand(1, 3, 10, 10), y)
            value.backward()
            return value
        opt.step(step)
        np.testing.assert_allclose(score.detach().softmax(0), best, atol=1e-4)


def tempered_np(s, t):
    """The tempered softmax by bisection of its normaliser."""
    if t == 1:
        return prob(s)
    def p(lam): return [(1 + (t - 1) * (lam - v)) ** (-1 / (t - 1)) for v in s]
    low, high = max(s), max(s) + len(s) ** (t - 1) / (t - 1) + 1
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if sum(p(mid)) > 1 else (low, mid)
    return p(low)


@pytest.mark.parametrize("t2", [1.0, 1.2, 2.0, 4.0])
@pytest.mark.parametrize("t1", [0.0, 0.5, 0.8, 1.0])
def test_bi_tempered(t1, t2):
    z, y = case(size=3.0)

    def log_t(x): return math.log(x) if t1 == 1 else (x ** (1 - t1) - 1) / (1 - t1)

    def f(s, t):  # Σ_c y_c (log_t y_c - log_t p_c) - (y_c^(2-t1) - p_c^(2-t1)) / (2-t1)
        p = tempered_np(s, t2)
        g = [float(c == t) for c in range(len(s))]
        return sum((gc * (log_t(gc) - log_t(pc)) if gc else 0) - (gc ** (2 - t1) - pc ** (2 - t1)) / (2 - t1) for gc, pc in zip(g, p))
    loss = BiTempered(t1=t1, t2=t2)
    assert math.isclose(loss(z, y), mean(f, z, y), rel_tol=1e-8)
    assert torch.autograd.gradcheck(lambda x: loss(x, y[:, :3, :3]), z[:, :, :3, :3].clone().requires_grad_())


@pytest.mark.parametrize("t1, t2", [(0.0, 4.0), (0.2, 4.0), (0.8, 1.2), (0.9, 1.0001), (1.0, 1.0)])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("classes", [2, 19, 150])
def test_bi_tempered_is_finite(classes, size, t1, t2):
    z, y = case(c=classes, size=size)
    for x in (z, z.float()):
        value, g = BiTempered(t1=t1, t2=t2)(x, y), gradient_map(BiTempered(t1=t1, t2=t2), x, y)
        assert torch.isfinite(value) and value >= 0 and torch.isfinite(g).all()
        assert t1 > 0.95 or value <= 1 / (1 - t1)


def test_losses_that_forgive_hear_a_wrong_label_less():
    """One pixel in a hundred carries a wrong label; the scores that fit best stay nearer to the truth."""
    y = torch.zeros(1, 10, 10, dtype=torch.long)
    y[0, :3, :10] = 1  # thirty wrong labels of a hundred
    lead = torch.tensor([6.0, 0.0]).double().view(1, 2, 1, 1).expand(1, 2, 10, 10)
    def pull(name, **kw):
        x = lead.clone().requires_grad_()
        (g,) = torch.autograd.grad(create_loss(name, **kw)(x, y), x)
        return g[0, 0].sum()
    assert pull("cross_entropy") > 0.25 and pull("gce").abs() < 0.02 and pull("bi_tempered", t1=0.2, t2=2.0) < 0.05
