"""The race: fair, repeatable, stopped on demand, forgiving; its page works without a kernel."""
import json
import math
import re
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _browser import Watch, launch

pytest.importorskip("ipywidgets")

from mlmsnet.comparing.compare import LossSpec, parse_losses
from mlmsnet.core import ConfigError, DataError
from mlmsnet.labs import loss_race
from mlmsnet.labs.loss_race import (
    CATEGORIES,
    Entrant,
    Lap,
    LossRace,
    Runner,
    TinyNet,
    TrackConfig,
    load_race,
    race,
    race_figure,
    race_track,
    save_race,
)
from mlmsnet.losses.contract import LOSSES, register_loss


@pytest.fixture(scope="module")
def track():
    return race_track(TrackConfig(train=6, val=3, height=32, width=64))


@pytest.fixture
def broken():
    @register_loss("broken_for_a_test")
    def broken_for_a_test(logits, target):
        raise RuntimeError("no luck <today>")
    yield "broken_for_a_test"
    LOSSES.pop("broken_for_a_test")


def entrants(*names, steps=3):
    return [Entrant(spec, steps=steps) for spec in parse_losses(list(names))]


def numbers(laps):
    return [(p.step, p.loss, p.miou, p.acc, *("nan" if math.isnan(v) else v for v in p.iou)) for p in laps]


def test_same_race_twice_for_any_number_of_threads(track):
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            laps = list(race(*entrants("dice_ce", steps=5), track))
            assert torch.get_num_threads() == threads  # as it was
            runs.append(laps)
    finally:
        torch.set_num_threads(before)
    assert numbers(runs[0]) == numbers(runs[1])
    assert all((a.shown == b.shown).all() for a, b in zip(*runs))


def test_same_weights_and_same_order_for_every_loss(track, monkeypatch):
    """Recorded inside the race: the weights before the first step, and every batch"""
    seen, original = {}, loss_race._train_step

    def spy(net, optimizer, criterion, x, y, name, step):
        seen.setdefault(name, []).append((x.clone(), y.clone(), {k: v.clone() for k, v in net.state_dict().items()} if step == 0 else None))
        return original(net, optimizer, criterion, x, y, name, step)

    monkeypatch.setattr(loss_race, "_train_step", spy)
    for e in entrants("cross_entropy", "dice", "ohem", steps=4):
        list(race(e, track))
    first, *others = seen.values()
    for other in others:
        assert len(other) == len(first) == 4
        for (xa, ya, wa), (xb, yb, wb) in zip(first, other):
            assert torch.equal(xa, xb) and torch.equal(ya, yb)
            assert wa is None or all(torch.equal(v, wb[k]) for k, v in wa.items() if "running" not in k and "num_batches" not in k)
    assert not all(torch.equal(first[0][0], x) for x, *_ in first)


def test_other_seed_other_race(track):
    a, b = (next(race(Entrant(LossSpec("dice"), steps=2, seed=s), track)) for s in (0, 1))
    assert a.miou != b.miou
    assert Entrant(LossSpec("dice"), seed=1).label == "dice, seed 1"


def test_leaves_random_numbers_alone(track):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(race(*entrants("focal", steps=2), track))
    assert torch.equal(torch.rand(3), expected)


def test_scores_are_those_of_numpy(track):
    """mIoU, accuracy and IoU of the last lap, counted pixel by pixel from a network trained alongside"""
    laps = list(race(*entrants("cross_entropy", steps=2), track, shown=3))
    pred, y = laps[-1].shown, track.val[1].numpy()
    valid, iou = y != 255, []
    for c in range(7):
        hit, union = ((pred == c) & (y == c)).sum(), (((pred == c) | (y == c)) & valid).sum()
        iou.append(hit / union if union else math.nan)
    np.testing.assert_allclose(laps[-1].iou, iou, atol=1e-6, equal_nan=True)
    occurs = [v for c, v in enumerate(iou) if (y == c).any()]
    assert laps[-1].acc == pytest.approx((pred == y)[valid].mean(), abs=1e-6)
    assert laps[-1].miou == pytest.approx(np.nanmean(iou), abs=1e-6) or laps[-1].miou == pytest.approx(np.mean(occurs), abs=1e-6)


def test_it_learns(track):
    laps = list(race(*entrants("dice_ce", steps=40), track, laps=4))
    assert laps[-1].miou > laps[0].miou + 0.1 and laps[-1].loss < laps[1].loss
    assert sum(p.numel() for p in TinyNet(7).parameters()) < 30_000


def test_a_loss_that_explodes_is_named(track):
    @register_loss("nan_for_a_test")
    def nan_for_a_test(logits, target):
        return logits.sum() * math.nan
    try:
        with pytest.raises(DataError, match="nan_for_a_test.*step 0.*learning rate"):
            list(race(*entrants("nan_for_a_test"), track))
    finally:
        LOSSES.pop("nan_for_a_test")


def test_stops_within_one_step(track, monkeypatch):
    """Told to stop while step 3 is running: step 3 ends, step 4 never begins"""
    runner, steps, original = Runner(track), [], loss_race._train_step

    def step(net, optimizer, criterion, x, y, name, k):
        steps.append(k)
        if k == 3:
            runner.stop()
        return original(net, optimizer, criterion, x, y, name, k)

    monkeypatch.setattr(loss_race, "_train_step", step)
    runner.start(entrants("cross_entropy", "dice", steps=500))
    assert runner.join(60) and not runner.running
    assert steps == [0, 1, 2, 3] and list(runner.results) == ["cross_entropy, steps 500"]


def test_stop_from_another_thread_then_start_again(track):
    seen = threading.Event()
    runner = Runner(track, laps=100_000, notice=seen.set)
    runner.start(entrants("cross_entropy", steps=100_000))
    assert seen.wait(60) and not runner.join(0.01) and runner.running
    runner.stop()
    assert runner.join(30)
    assert 0 <= runner.results["cross_entropy, steps 100000"][-1].step < 100_000
    runner.start(entrants("dice"))
    assert runner.join(60) and runner.results["dice, steps 3"][-1].step == 3


def test_results_are_kept_and_added(track):
    runner = Runner(track)
    runner.start(entrants("cross_entropy", "dice"))
    assert runner.join(60)
    first = dict(runner.results)
    runner.start(entrants("dice", "focal:gamma=4", "cross_entropy"))
    assert runner.join(60)
    assert list(runner.results) == ["cross_entropy, steps 3", "dice, steps 3", "focal:gamma=4, steps 3"]
    assert all(runner.results[k] is v for k, v in first.items())  # not run again


def test_a_failing_loss_is_reported_and_the_next_one_runs(track, broken):
    lab = LossRace((broken, "dice"), track, steps=3)
    lab.start_button.click()
    assert lab.wait(60)
    assert list(lab.results) == ["dice, steps 3"]
    assert lab.errors == {f"{broken}, steps 3": "RuntimeError: no luck <today>"}
    assert "no luck &lt;today&gt;" in lab.message.value and lab.image.value


def test_buttons(track):
    lab = LossRace(("cross_entropy",), track, steps=800, laps=800)
    nothing = lab.image.value
    assert lab.stop_button.disabled
    lab.start_button.click()
    assert lab.runner.running and not lab.stop_button.disabled
    deadline = time.monotonic() + 60
    while not lab.results and time.monotonic() < deadline:
        time.sleep(0.01)
    lab.stop_button.click()
    assert lab.wait(60)
    assert lab.stop_button.disabled and lab.results["cross_entropy, steps 800"][-1].step < 800
    assert lab.image.value != nothing  # what was run stays in the plot
    lab.steps.value = 20
    lab.choose.value = ("dice", "ohem")
    lab.start_button.click()
    assert lab.wait(60)
    assert list(lab.results) == ["cross_entropy, steps 800", "dice, steps 20", "ohem, steps 20"]
    lab.clear_button.click()
    assert lab.results == {} and lab.image.value == nothing


def test_redraws_at_most_four_times_a_second(track, monkeypatch):
    lab = LossRace(("cross_entropy",), track, steps=30, laps=30)
    times, now = [], [0.0]
    monkeypatch.setattr(loss_race.time, "monotonic", lambda: now[0])
    lab._next_time = 0.0
    monkeypatch.setattr(loss_race, "picture", lambda fig: times.append(now[0]) or b"x")
    lab.runner._thread = object()  # as if it ran
    for i in range(200):
        now[0] = i * 0.01
        lab._noticed()
    lab.runner._thread = None
    assert 7 <= len(times) <= 9 and min(np.diff(times)) >= 0.25 - 1e-9


def test_hyper_parameters_of_one_loss(track):
    lab = LossRace(("focal",), track, steps=2)
    sliders = {w.description: w for w in lab.params.children}
    assert "gamma" in sliders
    sliders["gamma"].value = 5
    assert [e.loss for e in lab.entrants()] == [LossSpec("focal", {"gamma": 5})]
    lab.choose.value = ("focal", "dice")
    assert lab.params.children == () and [e.loss.params for e in lab.entrants()] == [{}, {}]
    with pytest.raises(ConfigError, match="gamma"):
        lab.start("focal:gama=1")


def test_a_users_loss_appears(track):
    @register_loss("mine_for_a_test")
    def mine_for_a_test(logits, target):
        return F.cross_entropy(logits, target, ignore_index=255)
    try:
        lab = LossRace(("mine_for_a_test",), track, steps=2)
        assert "mine_for_a_test" in lab.choose.options
        lab.start_button.click()
        assert lab.wait(60) and list(lab.results) == ["mine_for_a_test, steps 2"]
    finally:
        LOSSES.pop("mine_for_a_test")


def test_a_race_on_file(track, tmp_path):
    laps = {e.label: list(race(e, track)) for e in entrants("cross_entropy", "dice")}
    save_race(laps, track, tmp_path / "race.npz")
    back, again = load_race(tmp_path / "race.npz")
    assert again is track and [numbers(v) for v in back.values()] == [numbers(v) for v in laps.values()]
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(DataError, match="bad.npz"):
        load_race(tmp_path / "bad.npz")


def fake_laps(steps, start, size=(32, 64)):
    rng = np.random.default_rng(start)
    iou = (0.5,) * 6 + (math.nan,)
    return [Lap(s, 1.0, 0.2 + s / 50 + start / 100, 0.6 + s / 100, iou, rng.integers(0, 7, (2, *size), dtype=np.uint8)) for s in steps]


def test_many_losses_fit_into_the_figure(track):
    results = {f"a_loss_with_a_rather_long_name:alpha=0.{i}": fake_laps((0, 5, 10), i) for i in range(11)}
    fig = race_figure(results, track)
    assert len(fig.axes) == 2 + 1 + 16 and fig.get_figheight() < 11
    looks = {loss_race._look(i) for i in range(24)}
    assert len(looks) == 24 and len(race_figure({}, track).axes) >= 3
    assert len(CATEGORIES.names) == 7


def test_page(track, tmp_path):
    lab = LossRace((), track, results={"cross_entropy": fake_laps((0, 5, 10), 1), "dice <b>": fake_laps((0, 4, 8, 10), 2)})
    page = lab.static_html()
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page).group(1))
    assert data["texts"] == [["0", "4", "5", "8", "10"]] and len(set(data["frames"])) == 5
    assert page == lab.static_html() and "http" not in page and "dice <b>" not in page
    file = tmp_path / "race.html"
    file.write_text("<!doctype html><meta charset=utf-8>" + page)
    with launch() as browser:
        tab = browser.new_page(viewport={"width": 390, "height": 900})
        watch = Watch(tab, (file.as_uri(),))
        tab.goto(file.as_uri())
        slider, img = tab.get_by_role("slider", name="step"), tab.locator("img")
        last = img.get_attribute("src")
        slider.focus()
        tab.keyboard.press("Home")
        assert img.get_attribute("src") == data["frames"][0] != last
        assert "after 0 steps" in img.get_attribute("alt") and tab.locator("output").inner_text() == "0"
        tab.keyboard.press("ArrowRight")
        assert img.get_attribute("src") == data["frames"][1] and slider.get_attribute("aria-valuetext") == "4"
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        watch.check()
