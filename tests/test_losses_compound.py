"""Combo, exponential logarithmic and unified focal loss against slow formulas with a one-hot; identities; extremes."""
import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _losses import VOID, case

from mlmsnet.core import ConfigError
from mlmsnet.losses.compound import Combo, Compound, ExpLog, TwoSidedCrossEntropy, UnifiedFocalLoss
from mlmsnet.losses.contract import create_loss, gradient_map
from mlmsnet.losses.pixel import CrossEntropy, Focal
from mlmsnet.losses.region import Dice


def table(z, y):
    """Rows = valid pixels: probabilities, one-hot."""
    z, y = z.movedim(1, -1).numpy(), y.numpy()
    s = z[y != VOID]
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True), np.eye(z.shape[-1])[y[y != VOID]]


def average(values, keys, weight):
    """A (weighted) mean of {class: value} or of pixel values with their classes."""
    return np.average(values, weights=None if weight is None else np.array(weight)[keys])


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 4.0, 3.0]])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_combo(alpha, beta, weight):
    z, y = case()
    y = y.masked_fill(y == 3, 2)
    p, g = table(z, y)
    label = g.argmax(1)
    ce = average(-(beta * g * np.log(p) + (1 - beta) * (1 - g) * np.log(1 - p)).sum(1), label, weight)
    present = [c for c in range(5) if g[:, c].any()]
    dice = average([2 * (p[:, c] * g[:, c]).sum() / (p[:, c].sum() + g[:, c].sum()) for c in present], present, weight)
    assert np.isclose(Combo(alpha=alpha, beta=beta, class_weight=weight)(z, y), alpha * ce + (1 - alpha) * (1 - dice))


def test_combo_identities():
    z, y = case()
    torch.testing.assert_close(create_loss("combo", alpha=1, beta=1)(z, y), CrossEntropy()(z, y))
    torch.testing.assert_close(create_loss("combo", alpha=0, smooth=2.0)(z, y), Dice(smooth=2.0)(z, y))
    z, y = case(c=2)
    for beta in (0.0, 0.3, 1.0):
        torch.testing.assert_close(create_loss("combo", alpha=1, beta=beta)(z, y), CrossEntropy()(z, y))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_wrong_claims_are_exact(beta):
    """ln(1 - p_c) where p_c is 1 in floating point: a log-sum-exp of the others, hence about minus the lead."""
    for lead in (1.0, 20.0, 200.0, 1e4):
        z = torch.tensor([0.0, lead, -1.0]).view(1, 3, 1, 1)
        y = torch.zeros(1, 1, 1, dtype=torch.long)
        big = z.double().flatten()
        log_p = big - big.logsumexp(0)
        exact = -beta * log_p[0] - (1 - beta) * (torch.logsumexp(big[[0, 2]], 0) - big.logsumexp(0) + torch.log1p(-log_p[2].exp()))
        assert torch.isclose(TwoSidedCrossEntropy(beta=beta)(z, y), exact.float(), rtol=1e-5)
        assert torch.isfinite(gradient_map(TwoSidedCrossEntropy(beta=beta), z, y)).all()
    z, y = case(c=4, size=3.0)
    loss = TwoSidedCrossEntropy(beta=beta)
    assert torch.autograd.gradcheck(lambda x: loss(x, y[:, :3, :3]), z[:, :, :3, :3].clone().requires_grad_())


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 4.0, 3.0]])
@pytest.mark.parametrize("gamma", [0.1, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("prior", [None, [1.0, 2.0, 3.0, 4.0, 10.0]])
def test_exp_log(prior, gamma, weight):
    z, y = case()
    y = y.masked_fill(y == 3, 2)
    p, g = table(z, y)
    label = g.argmax(1)
    present = [c for c in range(5) if g[:, c].any()]
    dice = [(2 * (p[:, c] * g[:, c]).sum() + 1) / (p[:, c].sum() + g[:, c].sum() + 1) for c in present]
    first = average((-np.log(dice)) ** gamma, present, weight)
    f = g.sum(0) if prior is None else np.array(prior)
    f[f == 0] = 1  # an absent class counts as one pixel in the sum of frequencies
    second = average([np.sqrt(f.sum() / f[t]) * (-np.log(row[t])) ** gamma for row, t in zip(p, label)], label, weight)
    loss = ExpLog(gamma=gamma, prior=prior, class_weight=weight)
    assert np.isclose(loss(z, y), 0.8 * first + 0.2 * second, rtol=1e-9)


def test_exp_log_at_the_ends():
    z, y = case()
    safe = y.masked_fill(y == VOID, 0)
    for gamma in (0.05, 0.3, 1.0):
        for smooth in (0.0, 1.0):
            loss = create_loss("exp_log", gamma=gamma, smooth=smooth)
            for size in (5.0, 15.0, 20.0, 40.0, 1e4):
                for label in (safe, (safe + 1) % 5):
                    for dtype in (torch.float32, torch.float64):
                        x = size * F.one_hot(label, 5).movedim(-1, 1).to(dtype)
                        assert torch.isfinite(loss(x, y)) and torch.isfinite(gradient_map(loss, x, y)).all()
            assert loss(1e4 * F.one_hot(safe, 5).movedim(-1, 1).double(), y) == 0


def unified_np(z, y, variant, share, delta, gamma, rare):
    """As in the printed losses and the authors' code, class by class."""
    p, g = table(z, y)
    tversky, focal = [], 0
    for c in range(p.shape[1]):
        tp, fn, fp = (p[:, c] * g[:, c]).sum(), ((1 - p[:, c]) * g[:, c]).sum(), (p[:, c] * (1 - g[:, c])).sum()
        ce = -g[:, c] * np.log(p[:, c])
        suppress = (1 - p[:, c]) ** gamma
        power = 1 - gamma
        if variant == "asymmetric":
            suppress = 1 if c in rare else suppress
            power = power if c in rare else 1
        focal += ((delta if c in rare else 1 - delta) * suppress * ce).mean()
        if g[:, c].any():
            tversky.append((1 - tp / (tp + delta * fn + (1 - delta) * fp)) ** power)
    return share * np.mean(tversky) + (1 - share) * focal


@pytest.mark.parametrize("rare", [None, "all", [3], [1, 4]])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("variant", ["symmetric", "asymmetric"])
def test_unified_focal(variant, gamma, rare):
    z, y = case()
    y = y.masked_fill(y == 2, 0)
    listed = {None: [1, 2, 3, 4], "all": range(5)}.get(rare if not isinstance(rare, list) else 0, rare)
    for share, delta in ((0.5, 0.6), (1.0, 0.3), (0.2, 0.9)):
        loss = UnifiedFocalLoss(variant=variant, gamma=gamma, delta=delta, tversky_share=share, rare=rare)
        assert np.isclose(loss(z, y), unified_np(z, y, variant, share, delta, gamma, listed), rtol=1e-9)
    assert torch.autograd.gradcheck(lambda x: loss(x, y[:, :3, :3]), z[:, :, :3, :3].clone().requires_grad_())


def test_unified_focal_identities_and_ends():
    z, y = case()
    for variant in ("symmetric", "asymmetric"):
        plain = create_loss("unified_focal", gamma=0, delta=0.5, variant=variant)
        torch.testing.assert_close(plain(z, y), 0.5 * Dice()(z, y) + 0.25 * CrossEntropy()(z, y))
    torch.testing.assert_close(create_loss("unified_focal", tversky_share=0, delta=0.5, gamma=0.7)(z, y), 0.5 * Focal(gamma=0.7)(z, y))
    torch.testing.assert_close(create_loss("unified_focal", tversky_share=1, delta=0.7, gamma=0.0)(z, y),
                               create_loss("tversky", alpha=0.3, beta=0.7)(z, y))
    safe = y.masked_fill(y == VOID, 0)
    for gamma in (0.0, 0.5, 0.95):
        for size in (10.0, 20.0, 1e4):
            x = size * F.one_hot(safe, 5).movedim(-1, 1).float()
            assert torch.isfinite(gradient_map(create_loss("unified_focal", gamma=gamma), x, y)).all()
    assert create_loss("unified_focal")(1e4 * F.one_hot(safe, 5).movedim(-1, 1).float(), y).abs() < 1e-6
    with pytest.raises(ConfigError, match="5 classes"):
        create_loss("unified_focal", rare=[5])(z, y)
    with pytest.raises(ConfigError, match="list of class numbers"):
        create_loss("unified_focal", rare="present")(z, y)


def test_values_and_copies():
    z, y = case()
    for name in ("dice_ce", "dice_focal", "dice_topk", "combo", "exp_log", "unified_focal"):
        loss = create_loss(name)
        values = loss.values(z, y)
        assert len(values) == 2
        assert np.isclose(sum(w * v for w, v in zip(loss.weights, values.values())), loss(z, y))
        assert pickle.loads(pickle.dumps(loss))(z, y) == copy.deepcopy(loss)(z, y) == loss(z, y)
    assert list(Compound([(1, "focal"), (2, Focal(gamma=0)), (1, "dice")]).values(z, y)) == ["Focal 1", "Focal 2", "Dice"]
