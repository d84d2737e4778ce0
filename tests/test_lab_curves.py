"""The curves explorer: closed formulas and finite differences, every registered loss, the widget, and the page in a browser."""
import importlib.util
import json
import re
import shutil

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("agg")

from mlmsnet.core import ConfigError  # noqa: E402
from mlmsnet.labs import loss_curves as lab  # noqa: E402
from mlmsnet.labs.loss_curves import (  # noqa: E402
    LossCurves,
    curves_page,
    draw_pixel_curves,
    draw_region_curves,
    listed,
    param_values,
    pixel_curve,
    pixel_scene,
    region_curve,
    region_scene,
    turnable,
)
from mlmsnet.losses.contract import LOSSES, available_losses, create_loss, register_loss  # noqa: E402

P = np.array([0.002, 0.05, 0.3, 0.5, 0.8, 0.97])


@pytest.fixture(scope="module")
def pages():
    few = {"pixel": {"pixel": ["cross_entropy", "focal", "ohem"], "region": ["dice"]},
           "region": {"region": ["dice", "tversky"], "pixel": ["cross_entropy"]}}
    first = {"pixel": ("cross_entropy", "focal"), "region": ("dice",)}
    return {view: curves_page(view, few[view], first[view], "Curves") for view in few}


def data_of(page):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page).group(1))


@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize("gamma", [0, 0.5, 2, 5])
def test_cross_entropy_and_focal_by_formula(classes, gamma):
    value, pull = pixel_curve("cross_entropy", P, classes)
    assert np.allclose(value, -np.log(P)) and np.allclose(pull, 1 - P)
    value, pull = pixel_curve(create_loss("focal", gamma=gamma), P, classes)
    q = 1 - P
    slope = gamma * q ** (gamma - 1) * np.log(P) - q ** gamma / P  # d/dp of -(1-p)^gamma ln p is -q^gamma/p + gamma q^(gamma-1) ln p
    assert np.allclose(value, -q ** gamma * np.log(P)) and np.allclose(pull, np.abs(slope) * P * q)


SMOOTH = ("cross_entropy focal poly1 gce bi_tempered balanced_softmax dice jaccard tversky lovasz_softmax dice_ce").split()


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_is_the_slope(name):
    """Moving z_y by ±h moves the value by the gradient; computed through the value alone."""
    p, classes, h = np.array([0.1, 0.45, 0.8]), 5, 1e-5
    value = []
    for step in (h, -h):
        odds = p / (1 - p) * np.exp(step)  # the other scores stay, so the odds grow by e^h
        value.append(pixel_curve(name, odds / (1 + odds), classes)[0])
    assert np.allclose(np.abs(value[0] - value[1]) / (2 * h), pixel_curve(name, p, classes)[1], rtol=1e-4, atol=1e-7)


def test_pixel_scene_is_what_it_says():
    logits, target = pixel_scene(P, 7)
    prob = logits.softmax(1)
    assert np.allclose(prob[:, 0, 0, 0], P) and np.allclose(prob[:, 1:, 0, 0], (1 - P)[:, None] / 6)
    own = prob.gather(1, target[:, None])[0, 0].flatten()[1:]
    assert np.allclose(own, (np.arange(99) + 0.5) / 99)
    assert (target == 0).sum((1, 2)).tolist() == [1] * len(P)
    for bad in (0, 1, -0.1, float("nan")):
        with pytest.raises(ConfigError):
            pixel_scene([bad])


def test_selection_cuts():
    assert (pixel_curve("ohem", [0.69, 0.71])[1] > 0).tolist() == [True, False]
    assert (pixel_curve(create_loss("ohem", thresh=0.3), [0.29, 0.31])[0] > 0).tolist() == [True, False]
    assert (pixel_curve(create_loss("topk", k=0.5), [0.45, 0.55])[0] > 0).tolist() == [True, False]


@pytest.mark.parametrize("size", [4, 37, 2000])
@pytest.mark.parametrize("precision", [0.5, 0.8, 1.0])
def test_region_scene_and_dice(size, precision):
    recall = np.array([0.02, 0.31, 0.7, 0.98])
    logits, target = region_scene(recall, precision, size)
    prob, obj = logits.softmax(1)[:, 1].numpy(), target.numpy() == 1
    tp = (prob * obj).sum((1, 2))
    assert (obj.sum((1, 2)) == size).all()
    assert np.allclose(tp / size, recall, atol=1e-6) and np.allclose(tp / prob.sum((1, 2)), precision, rtol=1e-4)
    f1 = 2 * precision * recall / (precision + recall)
    assert np.allclose(region_curve(create_loss("dice", classes=[1]), recall, precision, size), 1 - f1, atol=1e-4)
    back = 1 - 2 * ((1 - prob) * ~obj).sum((1, 2)) / ((1 - prob).sum((1, 2)) + (~obj).sum((1, 2)))
    assert np.allclose(region_curve("dice", recall, precision, size), (1 - f1 + back) / 2, atol=1e-4)


def test_batched_rows_equal_single_calls():
    logits, target = region_scene([0.1, 0.6], 0.8, [30, 700])
    for name in available_losses("region") + available_losses("compound") + ["cross_entropy", "focal"]:
        loss = create_loss(name)
        single = [float(loss(logits[i:i + 1], target[i:i + 1])) for i in range(2)]
        assert np.allclose(lab.picture_losses(loss, logits, target).detach(), single, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("name", available_losses())
def test_every_loss_has_finite_curves(name):
    for curve in (*pixel_curve(name, P[::2], 5), region_curve(name, [0.02, 0.5, 0.98], 0.8, [4, 100, 2000])):
        assert np.isfinite(curve).all() and len(curve) == 3
    for param in turnable(name):
        values = param_values(param)
        assert param.default in values and len(values) == len(set(values)) <= 24
        for v in values[:1] + values[-1:]:
            assert param.check(v) == v or v is None


def test_pure_functions_leave_no_trace():
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    draw_pixel_curves(["focal"])
    draw_region_curves({"Dice of the object": create_loss("dice", classes=[1])}, size=60)
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)


def test_figures_show_what_is_asked():
    fig = draw_pixel_curves({"focal": {"gamma": 5}, "mine": lambda z, y: z.softmax(1)[:, 0].mean()})
    left, right = fig.axes
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["focal gamma=5", "mine"]
    assert np.allclose(left.lines[0].get_ydata(), -(1 - lab.GRID_P) ** 5 * np.log(lab.GRID_P))
    assert len({line.get_color() for line in right.lines}) == len({line.get_linestyle() for line in right.lines}) == 2
    fig = draw_region_curves(["dice", "hausdorff_dt"] if "hausdorff_dt" in available_losses() else ["dice"], relative=True)
    assert all(np.isclose(np.abs(line.get_ydata()).max(), 1) for ax in fig.axes for line in ax.lines)
    assert draw_pixel_curves({}).axes


def test_a_loss_registered_on_the_spot_appears():
    register_loss("halfway", lambda logits, target: 0.5 * (1 - logits.softmax(1)[:, 0].mean()))
    try:
        assert "halfway" in listed("pixel")["yours"] and "halfway" in listed("region")["yours"]
        live = LossCurves(("halfway",))
        assert live.picker.ticks["halfway"].value and list(live.params["losses"]) == ["halfway"]
        assert np.allclose(pixel_curve("halfway", P)[0], 0.5 * (1 - P))
        first = data_of(curves_page("pixel", {"yours": ["halfway"]}))["losses"][0]["y"]
        del LOSSES["halfway"]
        register_loss("halfway", lambda logits, target: logits.softmax(1)[:, 0].mean())  # another loss of that name: no stale curve
        assert data_of(curves_page("pixel", {"yours": ["halfway"]}))["losses"][0]["y"] != first
    finally:
        LOSSES.pop("halfway", None)


def test_widget():
    live = LossCurves(("dice",), view="region")
    seen = [live.image.value]
    for change in ({"size": 4}, {"precision": 0.5}, {"losses": ["dice", "cross_entropy"]}, {"losses": {"dice": {"smooth": 100}}},
                   {"relative": True}):
        live.set(**change)
        seen.append(live.image.value)
        assert live.message.value == ""
    assert len(set(seen)) == len(seen)
    assert live.params["losses"] == {"dice": {"smooth": 100}} and "smooth 100" in live.image.alt
    live.picker.ticks["cross_entropy"].value = True
    live.picker.ticks["dice"].value = False
    assert list(live.params["losses"]) == ["cross_entropy"] and len(live.picker.panel.children) == 1
    live.reset()
    assert live.params["losses"] == {"dice": {"smooth": 0}} and live.params["size"] == 250
    live.set(losses=[])
    assert live.message.value == "" and live.params["losses"] == {}


def test_page_covers_all_listed_losses():
    page = curves_page("pixel", first=("cross_entropy",))
    data, names = data_of(page), sum(listed("pixel").values(), [])
    assert [x["name"] for x in data["losses"]] == names
    assert len(re.findall(r'<input type="checkbox" data-loss="\d+"', page)) == len(names)
    assert len(page) < 250_000 and "://" not in page
    for x in data["losses"]:
        settings = int(np.prod([len(p["texts"]) for p in x["params"]]))
        assert len(x["y"]) == settings and all(len(y) == 2 * len(lab.PAGE_P) for y in x["y"])
        assert all(isinstance(v, int) for y in x["y"] for v in y)


def test_page_numbers_and_determinism(pages):
    data = data_of(pages["region"])
    tversky = next(x for x in data["losses"] if x["name"] == "tversky")
    alpha, beta = (p["texts"] for p in tversky["params"])
    y = tversky["y"][alpha.index("1") * len(beta) + beta.index("0.5")]
    y = np.array(y).reshape(len(lab.PAGE_SIZE), len(lab.PAGE_PRECISION), len(lab.PAGE_R)) * tversky["unit"][0]
    assert np.allclose(y[2, 0], region_curve(create_loss("tversky", alpha=1, beta=0.5), lab.PAGE_R, 0.5, 60), atol=2e-3)
    lab._page_loss.cache_clear()
    again = curves_page("region", {"region": ["dice", "tversky"], "pixel": ["cross_entropy"]}, ("dice",), "Curves")
    assert again == pages["region"]


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        try:
            path = shutil.which("chromium") or shutil.which("google-chrome")
            found = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except Exception as e:
            pytest.skip(f"no Chromium to start: {str(e).splitlines()[0]}")
        yield found
        found.close()


@pytest.mark.parametrize("width", [1000, 390])
def test_page_in_chromium(pages, browser, tmp_path, width):
    file = tmp_path / "page.html"
    file.write_text("<!doctype html><meta name=viewport content='width=device-width'>" + pages["pixel"] + pages["region"])
    tab, errors, asked = browser.new_page(viewport={"width": width, "height": 900}), [], []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.on("request", lambda r: asked.append(r.url))
    tab.goto(file.as_uri())
    one, two = tab.locator(".mlms-explorer").all()

    def curves(at, panel=0):
        return [p.get_attribute("d") for p in at.locator(".mlms-panels > svg").nth(panel).locator("svg > path[stroke-width]").all()]

    before = curves(one)
    assert len(before) == 2 and one.locator("[data-of]:visible").count() == 2
    one.get_by_role("checkbox", name="ohem").focus()
    tab.keyboard.press("Space")  # ticks the box
    assert len(curves(one)) == 3 and one.get_by_role("slider", name="thresh").is_visible()
    one.get_by_role("slider", name="gamma").focus()
    tab.keyboard.press("ArrowRight")
    after = curves(one)
    assert after[1] != before[1] and after[0] == before[0] and "gamma=3" in one.locator(".mlms-key").inner_text()
    assert one.get_by_role("slider", name="gamma").get_attribute("aria-valuetext") == "3"
    assert "focal gamma=3" in one.locator(".mlms-panels > svg").first.get_attribute("aria-label")
    one.get_by_role("checkbox", name="each curve").check()
    assert curves(one)[1] != after[1]
    one.get_by_role("button", name="reset").click()
    assert curves(one) == before

    before = curves(two), curves(two, 1)
    two.get_by_role("slider", name="precision").focus()
    tab.keyboard.press("ArrowLeft")
    assert curves(two) != before[0] and curves(two, 1) != before[1]
    two.get_by_role("combobox", name="squared").select_option("yes")
    assert "squared=yes" in two.locator(".mlms-key").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not errors and asked == [file.as_uri()]
    tab.close()
