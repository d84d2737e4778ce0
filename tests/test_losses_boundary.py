"""Distance maps and boundary losses, against all pairs of pixels, SciPy, and formulas in NumPy with a one-hot."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

from mlmsnet.core import ConfigError, DataError
from mlmsnet.losses import boundary as boundary_module
from mlmsnet.losses.boundary import Boundary, BoundaryDice, BoundaryDoU, DistancePenalizedCE, EdgeBCE, HausdorffDT
from mlmsnet.losses.compound import Compound
from mlmsnet.losses.contract import available_losses, create_loss, gradient_map
from mlmsnet.losses.distance import MAP_CACHE, MapCache, TargetMaps, distance_map, penalty_map, prepare_maps, signed_distance
from mlmsnet.losses.pixel import CrossEntropy, strips
from mlmsnet.losses.region import Dice

VOID = 255
WITH_MAPS = [Boundary(), Boundary(reach=2.0, centered=True), HausdorffDT(), HausdorffDT(reach=3.0, alpha=1.5), BoundaryDice(alpha=0.4),
             DistancePenalizedCE(), DistancePenalizedCE(strength=3, width=2)]


def blobs(c=4, n=2, h=10, w=14, seed=0, void=0.1):
    """Logits, and labels in blobs, so that distances larger than 1 occur; class c - 1 is only in the first image."""
    g = torch.Generator().manual_seed(seed)
    rough = torch.randn(n, c, 4, 5, generator=g)
    rough[1:, c - 1] -= 100
    y = F.interpolate(rough, (h, w), mode="bilinear").argmax(1)
    y[torch.rand(n, h, w, generator=g) < void] = VOID
    return 2 * torch.randn(n, c, h, w, generator=g), y


def value_and_grad(loss, z, y, **kw):
    z = z.detach().clone().requires_grad_()
    value = loss(z, y, **kw)
    return value.detach(), torch.autograd.grad(value, z)[0]


# ---- slow and independent ----

def all_pairs(mask):
    """Distance of each pixel to the nearest one of the other kind, by comparing all pairs; 0 if there is none."""
    points = np.argwhere(np.ones_like(mask))
    out = np.zeros(mask.shape)
    if mask.any() and not mask.all():
        for i, j in points:
            other = np.argwhere(mask != mask[i, j])
            out[i, j] = np.sqrt(((other - (i, j)) ** 2).sum(1)).min()
    return out


def signed_np(mask):
    d = all_pairs(mask)
    return np.where(d == 0, 0, np.where(mask, 0.5 - d, d - 0.5))


def softmax_np(z):
    e = np.exp(z.double().numpy() - z.double().numpy().max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def class_means(z, y, cost, classes="present", per_image=False, weight=None):
    """cost(p_c, g_c, valid) per image -> the mean over valid pixels, classes, and perhaps images."""
    p, t = softmax_np(z), y.numpy()
    rows = [[i] for i in range(len(t))] if per_image else [list(range(len(t)))]
    out = []
    for row in rows:
        n_valid = (t[row] != VOID).sum()
        counted = [c for c in range(p.shape[1]) if (c in classes if isinstance(classes, list) else classes == "all" or (t[row] == c).any())]
        if n_valid:
            per_class = [sum((cost(p[i, c], t[i] == c, t[i] != VOID) * (t[i] != VOID)).sum() for i in row) / n_valid for c in counted]
            out.append(np.average(per_class, weights=None if weight is None else [weight[c] for c in counted]))
    return np.mean(out)


OPTIONS = [{}, {"per_image": True}, {"classes": "all"}, {"classes": [0, 3]}, {"class_weight": [1.0, 2.0, 0.5, 4.0]},
           {"per_image": True, "class_weight": [1.0, 2.0, 0.5, 4.0]}]


def for_numpy(kw):
    return {"weight" if k == "class_weight" else k: v for k, v in kw.items()}


# ---- distance maps ----

@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (7, 12), (15, 15)])
def test_distances_against_all_pairs(shape):
    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.3, 0.7, 0.98, 1):
        mask = rng.random(shape) < share
        torch.testing.assert_close(distance_map(mask), torch.from_numpy(all_pairs(mask)).float())
        torch.testing.assert_close(signed_distance(torch.from_numpy(mask)), torch.from_numpy(signed_np(mask)).float())


@pytest.mark.parametrize("shape", [(300, 500), (713, 713)])
def test_distances_against_scipy(shape):
    """SciPy's exact transform, rounded to float32; and the same bits each time."""
    edt = pytest.importorskip("scipy.ndimage").distance_transform_edt
    rng = np.random.default_rng(1)
    for masks in (rng.random(shape) < 1e-4, np.add.outer(np.arange(shape[0]), np.arange(shape[1])) == 0, rng.random(shape) < 0.5):
        want = (edt(masks) + edt(~masks)).astype(np.float32)
        got = distance_map(masks).numpy()
        assert np.array_equal(got, want)
        for _ in range(3):
            assert np.array_equal(distance_map(masks).numpy(), got)


def test_no_edge_no_distance():
    for mask in (np.zeros((4, 6), bool), np.ones((4, 6), bool)):
        assert not signed_distance(mask).any() and not distance_map(mask).any()
    assert signed_distance(np.zeros((0, 4, 4), bool)).shape == (0, 4, 4)
    for bad in (np.zeros((3, 3)), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(DataError, match="must be bool"):
            signed_distance(bad)


def test_penalty_map():
    _, y = blobs()
    own = np.stack([np.maximum.reduce([np.where(t == c, all_pairs(t == c), 0) for c in range(4)]) for t in y.numpy()])
    for width in (None, 1.0, 2.5):
        reach = own.max((1, 2), keepdims=True) if width is None else width
        want = np.where(own > 0, np.clip(1 - (own - 1) / reach, 0, None), 0)
        torch.testing.assert_close(penalty_map(y, width), torch.from_numpy(want).float())
    assert not penalty_map(torch.full((1, 3, 3), 2)).any() and not penalty_map(torch.full((2, 3, 3), VOID)).any()
    assert (penalty_map(y)[y == VOID] == 0).all()


# ---- the store ----

def test_store_follows_the_content():
    MAP_CACHE.clear()
    z, y = blobs()
    loss = Boundary()
    first = loss(z, y)
    made = MAP_CACHE.misses
    assert made == 2 * 4  # images times classes of the batch
    for same in (y.clone(), y.to(torch.uint8), y.transpose(1, 2).contiguous().transpose(1, 2)):
        assert loss(z, same) == first
    HausdorffDT()(z, y)  # another loss, the same maps
    assert MAP_CACHE.misses == made
    y[0, 2:6, 2:6] = 1  # the same tensor, another content
    changed = loss(z, y)
    assert changed != first and MAP_CACHE.misses > made
    MAP_CACHE.clear()
    assert loss(z, y) == changed
    other = y.masked_fill(y == VOID, 3)  # void or class 3: not the same labels
    assert Boundary()(z, other) != changed and Boundary()(z, y) == changed


def test_kept_maps_stay_clean():
    _, y = blobs(n=1, h=9)
    maps = TargetMaps(y, y != VOID)
    before = maps.signed(1).clone()
    maps.signed(1).zero_()
    maps.own().zero_()
    torch.testing.assert_close(maps.signed(1), before, rtol=0, atol=0)
    assert maps.own().any()


def test_store_is_bounded():
    store = MapCache(megabytes=1)
    for k in range(10):
        store.get(k, lambda: np.zeros(2**18, np.uint8))  # four of them fit
        assert store.bytes <= store.limit
    assert store.bytes == 2**20 and store.misses == 10
    store.get(9, None)
    store.get("too large", lambda: np.zeros(2**21, np.uint8))
    assert store.hits == 1 and store.bytes == 2**20  # what does not fit pushes nothing out
    store.resize(0)
    assert store.bytes == 0
    z, y = blobs()
    want, limit = Boundary()(z, y), MAP_CACHE.limit
    try:
        MAP_CACHE.resize(0)
        assert Boundary()(z, y) == want and MAP_CACHE.bytes == 0
    finally:
        MAP_CACHE.resize(limit / 2**20)


def test_many_classes():
    """Labels beyond a byte."""
    y = torch.arange(300).view(1, 15, 20)
    y[0, 0, :3] = 299
    y[0, 5, 5] = -1
    z = torch.randn(1, 300, 15, 20)
    maps = {c: signed_distance(y == c) for c in y[y >= 0].unique().tolist()}
    loss = create_loss("boundary", ignore_index=-1)
    assert torch.isclose(loss(z, y), loss(z, y, maps=maps))
    assert torch.equal(TargetMaps(y, y != -1).signed(255), signed_distance(y == 255))


# ---- maps from workers ----

class _Frames(torch.utils.data.Dataset):
    def __len__(self): return 4

    def __getitem__(self, i):
        z, y = blobs(seed=i)
        return z[0], y[0]


def _collate(samples):
    z, y = default_collate(samples)
    return z, y, prepare_maps(y)


def test_maps_from_workers():
    for z, y, maps in DataLoader(_Frames(), batch_size=2, num_workers=1, collate_fn=_collate):
        assert set(maps) == set(y[y != VOID].unique().tolist())
        for loss in WITH_MAPS:
            MAP_CACHE.clear()
            value, grad = value_and_grad(loss, z, y, maps=maps)
            assert MAP_CACHE.misses == 0  # nothing was computed here
            want, slope = value_and_grad(loss, z, y)
            torch.testing.assert_close(value, want)
            torch.testing.assert_close(grad, slope)


def test_a_compound_passes_maps_and_epochs_on():
    z, y = blobs()
    both, maps = Compound([(1, "dice"), (0.5, Boundary()), (0.5, BoundaryDice(alpha=0.1, alpha_step=0.1))]), prepare_maps(y)
    MAP_CACHE.clear()
    value = both(z, y, maps)
    assert MAP_CACHE.misses == 0
    torch.testing.assert_close(value, both(z, y))
    both.set_epoch(3)
    assert both.losses[2].alpha == pytest.approx(0.4)


def test_wrong_maps():
    z, y = blobs()
    maps = prepare_maps(y)
    for loss in (Boundary(), DistancePenalizedCE()):
        with pytest.raises(DataError, match="lack class 1"):
            loss(z, y, maps={c: m for c, m in maps.items() if c != 1})
        with pytest.raises(DataError, match="same target"):
            loss(z[:1], y[:1], maps=maps)
    with pytest.raises(DataError, match="batch axis"):
        prepare_maps(y[0])


# ---- the losses against NumPy ----

@pytest.mark.parametrize("kw", OPTIONS)
def test_boundary_against_numpy(kw):
    z, y = blobs()
    assert np.isclose(Boundary(**kw)(z.double(), y), class_means(z, y, lambda p, g, v: signed_np(g) * p, **for_numpy(kw)))
    for reach in (1.0, 2.2):
        def cost(p, g, v, reach=reach): return np.clip(signed_np(g), -reach, reach) * (p - g)
        assert np.isclose(Boundary(reach=reach, centered=True, **kw)(z.double(), y), class_means(z, y, cost, **for_numpy(kw)))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kw", OPTIONS)
def test_hausdorff_against_numpy(kw, alpha):
    z, y = blobs()
    def cost(p, g, v): return (p - g) ** 2 * (all_pairs((p > 0.5) & v) ** alpha + all_pairs(g) ** alpha)
    assert np.isclose(HausdorffDT(alpha=alpha, **kw)(z.double(), y), class_means(z, y, cost, **for_numpy(kw)))


def test_hausdorff_alpha_zero_is_the_squared_error():
    z, y = blobs()
    want = class_means(z, y, lambda p, g, v: 2 * (p - g) ** 2)
    assert np.isclose(HausdorffDT(alpha=0.0)(z.double(), y), want)


@pytest.mark.parametrize("width", [None, 1.0, 3.0])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 4.0]])
def test_distance_penalized_ce(width, weight):
    z, y = blobs()
    loss = DistancePenalizedCE(strength=2.5, width=width, class_weight=weight)
    ce = CrossEntropy(class_weight=weight)
    w = torch.ones(4) if weight is None else torch.tensor(weight)
    pixels = ce.pixel_map(z, y) * (1 + 2.5 * penalty_map(y, width))
    torch.testing.assert_close(loss.pixel_map(z, y), pixels)
    torch.testing.assert_close(loss(z, y), pixels.sum() / w[y[y != VOID]].sum())
    assert torch.equal(loss.kept_mask(z, y), y != VOID)
    torch.testing.assert_close(create_loss("distance_penalized_ce", strength=0)(z, y), CrossEntropy()(z, y))
    assert loss(z, y) > ce(z, y) * 1.01  # not the plain one under another name


def dou_np(z, y, alpha_max, rows):
    p, t, out = softmax_np(z), y.numpy(), []
    for row in rows:
        per_class = []
        for c in [c for c in range(p.shape[1]) if (t[row] == c).any()]:
            g = t[row] == c
            edge = 0
            for m in g:
                for i, j in np.argwhere(m):
                    around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                    edge += not all(0 <= a < m.shape[0] and 0 <= b < m.shape[1] and m[a, b] for a, b in around)
            pc = p[row][:, c] * (t[row] != VOID)
            alpha = min(1 - 2 * edge / g.sum(), alpha_max)
            both, tp = (pc**2).sum() + g.sum(), (pc * g).sum()
            per_class.append((both - 2 * tp) / (both - (1 + alpha) * tp))
        out.append(np.mean(per_class))
    return np.mean(out)


@pytest.mark.parametrize("alpha_max", [-1.0, 0.0, 0.5, 0.8])
def test_boundary_dou_against_numpy(alpha_max):
    z, y = blobs(h=20, w=30)
    z = z + 3 * F.one_hot(y.masked_fill(y == VOID, 0), 4).movedim(-1, 1)
    assert np.isclose(BoundaryDoU(alpha_max=alpha_max)(z.double(), y), dou_np(z, y, alpha_max, [[0, 1]]))
    assert np.isclose(BoundaryDoU(alpha_max=alpha_max, per_image=True)(z.double(), y), dou_np(z, y, alpha_max, [[0], [1]]))
    if alpha_max == -1:
        torch.testing.assert_close(BoundaryDoU(alpha_max=-1)(z, y), Dice(squared=True)(z, y))


def edge_np(z, y, k, w):
    p, t = softmax_np(z), y.numpy()
    edge, flat = [], []
    for n, i, j in np.argwhere(t != VOID):
        for a, b in ((i + k, j), (i, j + k)):
            if a < t.shape[1] and b < t.shape[2] and t[n, a, b] != VOID:
                same = (p[n, :, i, j] * p[n, :, a, b]).sum()
                (flat if t[n, a, b] == t[n, i, j] else edge).append(same)
    return w * np.mean(-np.log(1 - np.array(edge))) + (1 - w) * np.mean(-np.log(flat))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_edge_bce_against_numpy(width):
    z, y = blobs()
    assert np.isclose(EdgeBCE(width=width, edge_weight=0.3)(z.double(), y), edge_np(z, y, width, 0.3))
    loss = EdgeBCE(width=width)
    assert torch.autograd.gradcheck(lambda x: loss(x, y[:, :6, :7]), z[:, :, :6, :7].double().requires_grad_())


def test_edge_bce_corners():
    z, y = blobs()
    assert EdgeBCE(width=64)(z, y) == 0  # no pair is that far apart
    perfect = 50.0 * F.one_hot(y.masked_fill(y == VOID, 0), 4).movedim(-1, 1)
    assert EdgeBCE()(perfect, y) < 1e-5 and EdgeBCE()(perfect[:, [2, 3, 1, 0]], y) < 1e-5  # swapped classes, the same edges


def test_boundary_dice():
    z, y = blobs()
    kw = {"class_weight": [1, 2, 3, 4], "per_image": True}
    loss = create_loss("boundary_dice", alpha=0.3, reach=4.0, **kw)
    torch.testing.assert_close(loss(z, y), 0.7 * Dice(**kw)(z, y) + 0.3 * Boundary(reach=4.0, **kw)(z, y))
    seen = []
    for epoch in (0, 1, 10, 1000, 1):
        loss.set_epoch(epoch)
        seen.append(round(loss.alpha, 4))
    assert seen == [0.3, 0.31, 0.4, 0.5, 0.31]
    fixed = create_loss("boundary_dice", alpha=0.7)  # above alpha_max: the schedule never lowers it
    fixed.set_epoch(50)
    assert fixed.alpha == 0.7
    with pytest.raises(ConfigError, match="alpha is 2"):
        create_loss("boundary_dice", alpha=2)


# ---- properties ----

@pytest.mark.parametrize("loss", WITH_MAPS, ids=repr)
def test_gradcheck_with_options(loss):
    z, y = blobs(h=5, w=6, c=3)
    assert torch.autograd.gradcheck(lambda x: loss(x, y), z.double().requires_grad_())


@pytest.mark.parametrize("name", available_losses("boundary"))
def test_void_logits_cannot_matter(name):
    """Void in blobs: whatever is predicted there, also a whole region, moves no distance map."""
    z, y = blobs(void=0)
    y[0, 2:8, 3:9] = VOID
    hard = 3 * z
    value, grad = value_and_grad(create_loss(name), hard, y)
    for c in range(4):
        dirty = hard.clone()
        dirty[0, :, 2:8, 3:9] = 0
        dirty[0, c, 2:8, 3:9] = 100
        value2, grad2 = value_and_grad(create_loss(name), dirty, y)
        assert value == value2 and torch.equal(grad, grad2)


@pytest.mark.parametrize("name", available_losses("boundary"))
def test_strips(name, monkeypatch):
    z, y = blobs(n=3)
    value, grad = value_and_grad(create_loss(name), z, y)
    monkeypatch.setattr(boundary_module, "strips", lambda x: strips(x, 2 * x.shape[1] * x.shape[3] * x.element_size() / 2**20 * 1.01))
    value2, grad2 = value_and_grad(create_loss(name), z, y)
    torch.testing.assert_close(value, value2)
    torch.testing.assert_close(grad, grad2)


@pytest.mark.parametrize("name", available_losses("boundary"))
def test_shift_is_monotonic(name):
    """A disc predicted further and further off never gets cheaper; the losses with distances never stop to grow.

    Distance-penalised cross-entropy is the exception: far from all edges a mistake costs less, so it is watched while the discs overlap.
    """
    y = ((torch.arange(40)[:, None] - 20) ** 2 + (torch.arange(80)[None] - 20) ** 2 <= 49).long()[None]
    loss = create_loss(name)
    reach = range({"edge_bce": 9, "distance_penalized_ce": 14}.get(name, 30))
    values = np.array([loss(8.0 * F.one_hot(y.roll(s, -1), 2).movedim(-1, 1), y).item() for s in reach])
    growing = {"edge_bce": 3, "boundary": 30, "boundary_dice": 30, "hausdorff_dt": 30}.get(name, 14)
    assert (np.diff(values[:growing]) > 0).all() and (np.diff(values) > -1e-4).all()


def test_perfect_is_zero():
    _, y = blobs()
    sure = 1e4 * F.one_hot(y.masked_fill(y == VOID, 0), 4).movedim(-1, 1).float()
    for loss in (Boundary(centered=True), HausdorffDT(), DistancePenalizedCE(), BoundaryDoU()):
        value, grad = value_and_grad(loss, sure, y)
        assert value == 0 and not grad.any()
    assert Boundary()(sure, y) < 0
    torch.testing.assert_close(gradient_map(Boundary(), sure / 5e3, y), gradient_map(Boundary(centered=True), sure / 5e3, y))


def test_void_images_have_no_say():
    z, y = blobs(n=3)
    y[1] = VOID
    rest = [0, 2]
    for name in available_losses("boundary"):
        torch.testing.assert_close(create_loss(name)(z, y), create_loss(name)(z[rest], y[rest]))
    for name in ("boundary", "hausdorff_dt", "boundary_dou"):
        each = torch.stack([create_loss(name)(z[i:i + 1], y[i:i + 1]) for i in rest])
        torch.testing.assert_close(create_loss(name, per_image=True)(z, y), each.mean())


def test_inside_a_compound():
    z, y = blobs()
    both = Compound([(0.5, "hausdorff_dt"), (1.0, "distance_penalized_ce")])
    torch.testing.assert_close(both(z, y), 0.5 * HausdorffDT()(z, y) + DistancePenalizedCE()(z, y))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    z, y = blobs()
    for name in available_losses("boundary"):
        value, grad = value_and_grad(create_loss(name), z, y)
        value2, grad2 = value_and_grad(create_loss(name), z.cuda(), y.cuda())
        torch.testing.assert_close(value2.cpu(), value)
        torch.testing.assert_close(grad2.cpu(), grad)


def test_the_training_loop_tells_a_loss_its_epoch(tmp_path):
    """`boundary_dice` shifts its weight from epoch to epoch; without `set_epoch` it would stay at its start for ever"""
    import _tiny

    from mlmsnet.training.config import parse_config
    from mlmsnet.training.loop import fit
    root = _tiny.write_data(tmp_path / "data")
    params = {"alpha": 0.1, "alpha_step": 0.2, "alpha_max": 0.4}
    cfg = parse_config(_tiny.settings(root, loss={"name": "boundary_dice", "params": params}, train={"epochs": 3}))
    seen = []
    fit(cfg, tmp_path / "run", progress=False, on_epoch=lambda trainer: seen.append(trainer.loss.alpha))
    assert seen == pytest.approx([0.1, 0.3, 0.4])
