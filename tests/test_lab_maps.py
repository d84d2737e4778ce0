"""Loss maps: faults do what they say and nothing else; every loss has a picture; the page moves without a kernel."""
import json
import re

import cv2
import numpy as np
import pytest
import torch
from _browser import Watch, launch

from mlmsnet.core import ConfigError, DataError
from mlmsnet.data.labels import CITYSCAPES
from mlmsnet.labs import loss_maps as lab
from mlmsnet.labs.loss_maps import BASE, LossMaps, Scene, Spoil, class_shares, draw_maps, faults, look, see, spoil
from mlmsnet.losses.contract import LOSSES, available_losses, create_loss, register_loss
from mlmsnet.losses.scenes import STREET

SCENES = {"minicity": lambda: lab.minicity_scene(4), "toy": lab.toy_scene}
VOID = 255


@pytest.fixture(params=SCENES)
def scene(request):
    return SCENES[request.param]()


def predicted(scene, **how):
    return spoil(scene.mask, scene.table, Spoil(**how))[0].argmax(1)[0].numpy()


# --- faults

@pytest.mark.parametrize("blur", [0, 1, 4])
@pytest.mark.parametrize("confidence", [0.05, 1, 30])
def test_no_fault_predicts_the_truth(scene, blur, confidence):
    logits, target = spoil(scene.mask, scene.table, Spoil(blur=blur, confidence=confidence))
    valid = scene.mask != VOID
    assert logits.dtype == torch.float32 and target.dtype == torch.int64
    assert logits.shape == (1, scene.table.num_classes, *scene.mask.shape)
    np.testing.assert_array_equal(logits.argmax(1)[0].numpy()[valid], scene.mask[valid])
    np.testing.assert_array_equal(target[0].numpy(), scene.mask)


@pytest.mark.parametrize("shift", [-7, -1, 3, 12])
def test_shift_moves_the_prediction_so_many_pixels(scene, shift):
    still, moved = predicted(scene), predicted(scene, shift=shift)
    if shift > 0:
        np.testing.assert_array_equal(moved[:, shift:], still[:, :-shift])
    else:
        np.testing.assert_array_equal(moved[:, :shift], still[:, -shift:])
    assert (moved != still).any()


def test_dropped_classes_are_gone_and_nothing_else_changes(scene):
    names = scene.table.thin
    gone = [scene.table.names.index(n) for n in names]
    before, after = predicted(scene), predicted(scene, drop=names)
    assert np.isin(before, gone).any() and not np.isin(after, gone).any()
    np.testing.assert_array_equal(after[~np.isin(before, gone)], before[~np.isin(before, gone)])


def test_all_classes_dropped_is_no_crash():
    scene = lab.toy_scene()
    assert (predicted(scene, drop=STREET.names) == 0).all()


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_swap_touches_only_the_named_classes(share):
    scene = lab.minicity_scene(4)
    a, b = (CITYSCAPES.names.index(n) for n in ("car", "person"))
    before, after = predicted(scene), predicted(scene, swap=("car", "person"), swap_share=share)
    changed = before != after
    assert np.isin(before[changed], (a, b)).all() and np.isin(after[changed], (a, b)).all()
    assert changed.any() == (share > 0)
    if share == 1:
        np.testing.assert_array_equal(after == a, before == b)
        np.testing.assert_array_equal(after == b, before == a)


def test_swap_changes_whole_regions():
    scene = lab.minicity_scene(4)
    car = CITYSCAPES.names.index("car")
    before, after = predicted(scene), predicted(scene, swap=("car", "truck"), swap_share=0.4)
    count, regions = cv2.connectedComponents((before == car).astype(np.uint8))
    states = [np.unique(after[regions == i]) for i in range(1, count)]
    assert all(len(s) == 1 for s in states) and len({int(s[0]) for s in states}) == 2


@pytest.mark.parametrize("share", [0, 0.001, 0.05, 0.3, 1])
def test_label_noise_has_the_share_asked_for(scene, share):
    _, target = spoil(scene.mask, scene.table, Spoil(label_noise=share))
    target, valid = target[0].numpy(), scene.mask != VOID
    assert (target != scene.mask).sum() == round(share * valid.sum())
    np.testing.assert_array_equal(target[~valid], scene.mask[~valid])
    assert np.isin(target[valid], np.unique(scene.mask[valid])).all()


def test_more_of_a_fault_contains_less_of_it(scene):
    def wrong(**how): return spoil(scene.mask, scene.table, Spoil(**how))[1][0].numpy() != scene.mask
    assert not (wrong(label_noise=0.02) & ~wrong(label_noise=0.1)).any()
    pair, still = lab.pairs(scene.table)[0], predicted(scene)
    little, much = (predicted(scene, swap=pair, swap_share=k) != still for k in (0.3, 0.8))
    assert not (little & ~much).any()


def test_label_noise_leaves_the_prediction_alone(scene):
    clean, noisy = (spoil(scene.mask, scene.table, Spoil(label_noise=k))[0] for k in (0, 0.2))
    assert torch.equal(clean, noisy)


def test_grow_spreads_rare_classes_or_shrinks_them(scene):
    pole = [scene.table.names.index(n) for n in ("pole",)][0]
    sizes = [(predicted(scene, grow=k) == pole).sum() for k in (-2, 0, 2)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_confidence_scales_and_keeps_the_winner(scene):
    a, b = (spoil(scene.mask, scene.table, Spoil(confidence=k, rough=0.3, shift=2))[0].argmax(1) for k in (1, 3))
    assert (a == b).float().mean() > 0.95
    p = spoil(scene.mask, scene.table, Spoil(confidence=0))[0].softmax(1)
    assert torch.allclose(p, torch.full_like(p, 1 / scene.table.num_classes))


def test_same_faults_same_tensors_other_seed_other_ones(scene):
    pair = lab.pairs(scene.table)[0]
    how = dict(confidence=0.7, shift=2, grow=1, drop=("pole",), swap=pair, swap_share=0.5, label_noise=0.1, blur=2, rough=0.4)
    before = scene.mask.copy()
    (a, s), (b, t), (c, u) = (spoil(scene.mask, scene.table, Spoil(**how, seed=k)) for k in (3, 3, 4))
    assert torch.equal(a, b) and torch.equal(s, t) and not torch.equal(a, c) and not torch.equal(s, u)
    np.testing.assert_array_equal(scene.mask, before)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    spoil(scene.mask, scene.table, Spoil(**how))
    assert torch.equal(state, torch.get_rng_state())


def test_stored_logits_are_spoilt_and_not_written_to():
    scene = lab.toy_scene()
    own = np.random.default_rng(0).standard_normal((5, 48, 96)).astype(np.float32)
    keep = own.copy()
    same, _ = spoil(scene.mask, STREET, Spoil(), logits=own)
    np.testing.assert_array_equal(same[0].numpy(), own)
    out, _ = spoil(scene.mask, STREET, Spoil(drop=("pole",), confidence=2), logits=own)
    np.testing.assert_array_equal(own, keep)
    assert not (out.argmax(1) == 3).any()
    np.testing.assert_allclose(np.sort(out[0].numpy(), 0), 2 * np.sort(own, 0))        # exchanged, not invented
    moved, _ = spoil(scene.mask, STREET, Spoil(shift=3), logits=own)
    np.testing.assert_array_equal(moved[0, :, :, 3:].numpy(), own[:, :, :-3])


def test_stored_prediction_replaces_the_truth():
    scene = lab.toy_scene()
    other = np.roll(scene.mask, 9, 1)
    logits, target = spoil(scene.mask, STREET, Spoil(), prediction=other)
    np.testing.assert_array_equal(logits.argmax(1)[0].numpy()[other != VOID], other[other != VOID])
    np.testing.assert_array_equal(target[0].numpy(), scene.mask)


def test_void_only_and_single_class_masks():
    for value in (VOID, 0):
        mask = np.full((20, 30), value, np.uint8)
        logits, target = spoil(mask, STREET, Spoil(label_noise=0.5, grow=2, drop=("pole",), blur=1, rough=1))
        assert torch.isfinite(logits).all() and (target == VOID).all() == (value == VOID)
        assert draw_maps(Scene(np.zeros((20, 30, 3), np.uint8), mask, STREET), Spoil(), {"dice": "dice", "ohem": "ohem"})


@pytest.mark.parametrize("how, said", [(dict(drop=("poles",)), "Did you mean pole"), (dict(swap=("car", "trcuk")), "truck")])
def test_unknown_classes_are_named(how, said):
    with pytest.raises(ConfigError, match=said):
        predicted(lab.minicity_scene(4), **how)


@pytest.mark.parametrize("how", [dict(label_noise=1.1), dict(swap_share=-1), dict(blur=-1), dict(swap=("car",)), dict(confidence=-2)])
def test_faults_out_of_range(how):
    with pytest.raises(ConfigError):
        Spoil(**how)


def test_scenes_that_do_not_fit():
    image, mask = np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9), np.uint8)
    with pytest.raises(DataError, match="differ in size"):
        Scene(image[1:], mask)
    with pytest.raises(DataError, match="outside 0..4"):
        Scene(image, mask + 7, STREET)
    with pytest.raises(DataError, match="logits"):
        Scene(image, mask, STREET, logits=np.zeros((4, 8, 9)))
    big = np.zeros((400, 900), np.uint8)
    small = Scene(np.dstack([big] * 3), big, STREET, logits=np.zeros((5, 400, 900), np.float32)).small()
    assert small.logits.shape[1:] == small.mask.shape == small.image.shape[:2] and abs(small.mask.size / (128 * 256) - 1) < 0.02


# --- looks and pictures

def test_shares_add_up_to_one_and_are_what_they_say():
    scene = lab.minicity_scene(8)
    logits, target, views = see(scene, BASE, {n: n for n in ("cross_entropy", "ohem", "dice")})
    p = logits.softmax(1)[0].numpy()
    y = target[0].numpy()
    valid = y != VOID
    onehot = (np.arange(19)[:, None, None] == y).astype(float)
    pull = np.sqrt(((p - onehot) ** 2).sum(0))                        # cross-entropy by hand
    by_hand = np.array([pull[valid & (y == c)].sum() for c in range(19)])
    np.testing.assert_allclose(views[0].shares, by_hand / by_hand.sum(), rtol=1e-4)
    np.testing.assert_allclose(lab._ce_pull(logits, target)[valid], pull[valid], atol=1e-5)
    for v in views:
        assert v.shares.sum() == pytest.approx(1) and (v.shares[[c for c in range(19) if not (y == c).any()]] == 0).all()
    assert class_shares(np.zeros((2, 2)), np.zeros((2, 2), int), 3).sum() == 0


@pytest.fixture(scope="module")
def tiny():
    toy = lab.toy_scene()
    return Scene(toy.image[8:40:2, 10:90:2], toy.mask[8:40:2, 10:90:2], STREET)


@pytest.mark.parametrize("how", [dict(blur=1, rough=0.3, drop=("pole",)), dict(confidence=40, label_noise=0.1)], ids=str)
def test_every_loss_has_finite_maps(tiny, how):
    logits, target = spoil(tiny.mask, STREET, Spoil(**how))
    for name in available_losses():
        v = look(name, logits, target)
        assert v.error == "", (name, v.error)
        assert np.isfinite(v.pull).all() and np.isfinite(v.value), name
        assert (v.pull[tiny.mask == VOID] == 0).all(), name
        assert v.shares.sum() == pytest.approx(1) or (v.pull == 0).all(), name
        assert v.pixels is None or (np.isfinite(v.pixels).all() and v.pixels.shape == tiny.mask.shape), name
        assert v.value == pytest.approx(float(create_loss(name)(logits, target)), rel=1e-4, abs=1e-6), name


def test_every_loss_has_a_picture(tiny):
    _, _, views = seen = see(tiny, BASE, {n: n for n in available_losses()})
    texts = {t.get_text() for t in lab.draw_views(tiny, *seen).axes[0].texts}
    assert texts >= set(available_losses()) and len(views) == len(available_losses())


def test_a_loss_that_fails_shows_its_message_and_the_others_their_maps():
    def broken(logits, target): raise ValueError("no loss <today>")
    def endless(logits, target): return (logits - logits.detach()).abs().sqrt().sum()
    scene = lab.toy_scene()
    _, _, views = see(scene, BASE, {"bad": broken, "nan": endless, "unknown": "dise", "dice": "dice"})
    assert [bool(v.error) for v in views] == [True, True, True, False]
    assert "no loss <today>" in views[0].error and "not finite" in views[1].error and "dice" in views[2].error
    fig = lab.draw_views(scene, *see(scene, BASE, {"bad": broken, "dice": "dice"}))
    texts = " ".join(t.get_text() for t in fig.axes[0].texts)
    assert "no loss <today>" in texts.replace("\n", " ") and "pull against cross-entropy" in texts


def test_ratio_to_cross_entropy_is_flat_for_cross_entropy():
    scene = lab.toy_scene()
    logits, target, (v,) = see(scene, BASE, {"ce": lambda z, y: torch.nn.functional.cross_entropy(z, y, ignore_index=VOID)})
    valid = scene.mask != VOID
    rgb = lab._against(v.pull, lab._ce_pull(logits, target), valid)
    assert v.pixels is None and np.ptp(rgb[valid].astype(int), 0).max() <= 4


# --- the shell

@pytest.fixture(scope="module")
def maps():
    return LossMaps()


@pytest.fixture(scope="module")
def html(maps):
    return maps.static_html()


def test_live_controls(maps):
    assert set(n for n, _ in maps.widgets["losses"].options) >= set(available_losses())
    before = maps.image.value
    maps.set(drop=("pole",), swap="car ↔ truck", label_noise=0.05)
    assert maps.image.value != before and maps.message.value == ""
    assert "no pole" in maps.image.alt and "5% wrong labels" in maps.image.alt
    maps.set(scene="toy street")
    assert maps.params["drop"] == () and [v for _, v in maps.widgets["drop"].options] == ["pole"] and maps.message.value == ""
    maps.set(losses=())
    assert "choose 1 to 4 losses" in maps.message.value
    maps.set(losses=("dice",))
    assert maps.message.value == ""
    with pytest.raises(ConfigError, match="Did you mean"):
        maps.set(shfit=1)


def test_own_losses_and_scenes():
    register_loss("test_maps_mse", lambda logits, target: logits.square().mean())
    try:
        scene = lab.toy_scene()
        mine = LossMaps({"strict OHEM": create_loss("ohem", thresh=0.95), "mse": "test_maps_mse"}, (scene.image, scene.mask, STREET))
        assert "test_maps_mse" in mine.losses and "strict OHEM: loss" in mine.image.alt and "mse: loss" in mine.image.alt
        logits = np.random.default_rng(0).standard_normal((5, 48, 96)).astype(np.float32)
        assert LossMaps(("dice",), {"net": Scene(scene.image, scene.mask, STREET, logits)}).message.value == ""
    finally:
        del LOSSES["test_maps_mse"]


def test_page_is_small_and_self_contained(maps, html):
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html).group(1))
    assert 15 <= len(data["frames"]) <= 30 and len(set(data["frames"])) == len(data["frames"])
    assert len(html) < 1_000_000 and "://" not in html
    assert all(a.startswith("Gradient maps for:") for a in data["alts"]) and len(set(data["alts"])) == len(data["alts"])
    assert html == maps.static_html()


def test_faults_fit_every_table():
    for table in (CITYSCAPES, STREET, lab.LabelTable("two", ("a", "b"), ((0, 0, 0), (9, 9, 9)))):
        for name, strengths in faults(table).items():
            assert len(strengths) == 3 and all(s == s.known(table) for s in strengths), (table.name, name)


def test_page_moves_by_keyboard_in_a_browser(html, tmp_path):
    file = tmp_path / "maps.html"
    file.write_text(f'<!doctype html><meta charset="utf-8"><body style="max-width:700px">{html}', encoding="utf-8")
    with launch() as browser:
        page = browser.new_page(viewport={"width": 800, "height": 900})
        watch = Watch(page, (file.as_uri(),))
        page.goto(file.as_uri(), wait_until="load")
        image = page.locator(".mlms-explorer img")
        assert image.evaluate("e => e.complete && e.naturalWidth > 600")
        seen = {image.get_attribute("src")}
        page.get_by_label("strength").focus()
        page.keyboard.press("ArrowRight")
        seen.add(image.get_attribute("src"))
        assert page.get_by_label("strength").get_attribute("aria-valuetext") == "3"
        page.get_by_label("fault").select_option("wrong labels")
        seen.add(image.get_attribute("src"))
        assert len(seen) == 3 and "10% wrong labels" in image.get_attribute("alt")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
        watch.check()
        page.close()


def test_camvid_is_offered_where_it_is_found(shared):
    root = shared / "data" / "camvid"
    if not (root / "val").is_dir():
        pytest.skip("no CamVid among the reference data")
    scenes = lab.stock_scenes(root)
    name = next(n for n in scenes if n.startswith("CamVid"))
    mine = LossMaps(("cross_entropy", "dice"), {name: scenes[name]})
    assert mine.message.value == "" and mine.scene(name).table.num_classes == 11
