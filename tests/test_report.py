"""Reports from records: what they show, what they survive, how they look in a browser and on paper."""
import os
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from mlmsnet.comparing.report import headline, study_figures, write_markdown, write_report
from mlmsnet.comparing.study import Study, board, collect, factor_label, find_base, pareto, read_study, telling_images
from mlmsnet.core import ConfigError, DataError, load_json, save_json
from mlmsnet.evaluation.evaluate import PerImage
from mlmsnet.training.config import config_hash, parse_config
from mlmsnet.training.metrics import metrics_from_counts
from mlmsnet.training.records import RunFolder, environment

NAMES = ("road", "building", "car", "pole")
BASE = {"model.msf": False, "model.mlf": False}
ENVIRONMENT = environment()
TARGET = np.random.default_rng(0).multinomial(5000, [0.55, 0.3, 0.1, 0.05], 40)


def made_up_run(folder, factors, skill, seed):
    "A run folder with the files that training and evaluation leave"
    settings = [x for k, v in factors.items() for x in (f"--{k}", str(v).lower())]
    settings += ["--data.root", str(folder / "no_such_data")]
    cfg = parse_config("minicity_demo", [*settings, "--train.epochs", "3", "--seed", str(seed)])
    rng, run = np.random.default_rng([seed, round(100 * skill)]), folder / config_hash(cfg)
    z = np.array([3, 2, 1.5, 0]) + skill + 0.05 * rng.normal() + 0.1 * rng.normal(size=TARGET.shape)
    hit = np.round(TARGET / (1 + np.exp(-z))).astype(np.int64)
    matrices = [np.diag(h) for h in hit]
    for m, missed in zip(matrices, TARGET - hit):
        m[np.arange(4), (np.arange(4) + 1) % 4] += missed
    total = sum(matrices)
    m = metrics_from_counts(total, NAMES)
    with RunFolder(run, cfg) as f:
        f.write_history([{"epoch": e, "loss": 2 * 0.6**e, "miou": m.miou * (1 - 0.5**e)} for e in (1, 2, 3)])
        f.write_summary(status="finished", environment=ENVIRONMENT, parameters=10**6, classes=NAMES,
                        data={"train": {"images": 10}, "val": {"images": 40}}, cost={"train_seconds": 90.0, "images_per_second": 9.0},
                        results={"best": {"epoch": 3, "miou": m.miou}, "last": None})
    counts = np.stack([np.stack([np.diag(x), x.sum(1), x.sum(0)], 1) for x in matrices])
    PerImage(tuple(f"scene_{i:02d}" for i in range(40)), counts, NAMES).save(run / "images_val.npz")
    save_json({"metrics": m.to_dict(), "counts": total.tolist(), "split": "val", "images": 40,
               "cost": {"params": 10**6, "macs": round(1e8 * (2 + skill)), "input_hw": [64, 128]}}, run / "evaluation_val.json")
    return run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    "Run folder -> factors: four arms, two seeds"
    folder, out = tmp_path_factory.mktemp("sweep"), {}
    for (msf, mlf), skill in {(True, True): 0.5, (True, False): 0.45, (False, True): 0.02, (False, False): 0.0}.items():
        factors = {"model.msf": msf, "model.mlf": mlf}
        out.update({made_up_run(folder, factors, skill, s): factors for s in (0, 1)})
    return out


@pytest.fixture
def copy(sweep, tmp_path):
    "The same, to be spoilt"
    shutil.copytree(next(iter(sweep)).parent, tmp_path / "runs")
    return {tmp_path / "runs" / r.name: f for r, f in sweep.items()}


@pytest.fixture(scope="module")
def study(sweep):
    return read_study(list(sweep), BASE, sweep, pooled=True, resamples=300)


def test_a_sweep_end_to_end(study, tmp_path):
    page = write_report(study, tmp_path / "report.html", title="MSF & <MLF>", figures=tmp_path / "figures")
    table = write_markdown(study, tmp_path / "report.md", title="MSF", figures=tmp_path / "figures")
    text, lines = page.read_text(), table.read_text().splitlines()
    assert "MSF &amp; &lt;MLF&gt;" in text and "<MLF>" not in text
    for g in study.groups:
        miou = np.mean([load_json(e.path)["metrics"]["miou"] for e in g.entries])
        assert f"{100 * miou:.2f} ± " in text and any(f"{100 * miou:.2f} ± " in line for line in lines)
    rows = [line for line in lines if line.startswith("|")]
    assert len({r.count("|") for r in rows}) == 1 and len(rows) == 2 + 4 and sum("(base)" in r for r in rows) == 1
    files = sorted((tmp_path / "figures").glob("*.svg"))
    assert {f.stem for f in files} == {"differences", "cost_macs", "classes", "curves"}
    for f in files:
        assert ET.parse(f).getroot().tag.endswith("svg")
        assert f'href="figures/{f.name}"' in text and f"](figures/{f.name})" in table.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(|href=")#([^)"]+)', text):
        assert target in ids
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", text)  # asks no server for anything
    again = write_report(study, tmp_path / "report.html", title="MSF & <MLF>", figures=tmp_path / "figures")
    assert again.read_text() == text


def test_arms_and_base(study, sweep):
    assert sorted(g.label for g in study.groups) == [f"msf={a}, mlf={b}" for a in ("false", "true") for b in ("false", "true")]
    assert study.factor_keys == ["model.msf", "model.mlf"]
    assert study.comparisons["msf=true, mlf=true"].verdict == "beyond noise"
    assert headline(study).startswith(f"Best: {study.groups[0].label}") and "beyond noise" in headline(study)
    run = study.base.entries[1].record
    for said in (study.base, study.base.label, config_hash(run.config), run.path, str(run.path), run.path.name):
        assert find_base(study.groups, said) is study.base
    with pytest.raises(ConfigError, match="fits 2 arms"):
        find_base(study.groups, {"model.msf": True})
    with pytest.raises(ConfigError, match="unknown base 'msf=flase"):
        find_base(study.groups, "msf=flase, mlf=false")
    again = read_study([str(k) for k in sweep], factors={os.path.relpath(k): v for k, v in sweep.items()})
    assert [g.factors for g in again.groups] == [g.factors for g in study.groups]


def test_old_records_have_no_counts_and_no_cost(copy, tmp_path):
    for r in copy:
        (r / "images_val.npz").unlink()
        save_json({k: v for k, v in load_json(r / "evaluation_val.json").items() if k != "cost"}, r / "evaluation_val.json")
    study = read_study(copy, BASE, copy)
    assert all(c.images is None and c.floor for c in study.comparisons.values()) and telling_images(study) == {}
    assert "GMACs" not in board(study)[0] and board(study)[0]["params (M)"] == 1.0
    assert "no counts per image were kept" in write_markdown(study, tmp_path / "x.md").read_text()
    assert collect(list(copy)[:1])[0].cost["params"] == 10**6


def test_what_is_broken_is_named_and_the_rest_stands(copy, tmp_path):
    runs = list(copy)
    (runs[0] / "evaluation_val.json").write_text("{")
    (runs[1] / "images_val.npz").write_bytes(b"PK")
    (runs[2] / "evaluation_val.json").unlink()
    save_json({**load_json(runs[2] / "summary.json"), "status": "failed", "reason": "TrainingError: a | b"}, runs[2] / "summary.json")
    (runs[3] / "evaluation_val.json").unlink()
    save_json({**load_json(runs[4] / "summary.json"), "format": 99}, runs[4] / "summary.json")
    (runs[5] / "config.yaml").unlink()
    study = read_study(runs, BASE, copy, failures={"0badcafe": "no memory"}, resamples=50)
    why = dict(study.failures)
    assert len(why) == 6 and why["0badcafe"] == "no memory"
    text = " ".join(why.values())
    for reason in ("not valid JSON", "failed: TrainingError: a | b", "trained, not evaluated", "newer mlmsnet", "no config.yaml"):
        assert reason in text, text
    assert len(study.notes) == 1 and "images_val.npz" in study.notes[0]
    page, table = (write(study, tmp_path / "r").read_text() for write in (write_report, write_markdown))
    assert "a | b" in page and "a \\| b" in table and "0 of 2" in page and "0 of 2" in table
    for r in runs:
        (r / "evaluation_val.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no run here has a result yet"):
        write_report(runs, tmp_path / "none.html")
    with pytest.raises(DataError, match="no run here has a result yet"):
        write_markdown([], tmp_path / "none.md")


def test_a_base_without_a_result_and_arms_of_other_splits(copy, tmp_path):
    other = [r for r, f in copy.items() if f == {"model.msf": True, "model.mlf": True}]
    for r in other:  # scored on fewer images
        kept = PerImage.load(r / "images_val.npz")
        PerImage(kept.names[:-1], kept.counts[:-1], NAMES).save(r / "images_val.npz")
        e = load_json(r / "evaluation_val.json")
        save_json({k: v for k, v in e.items() if k != "counts"}, r / "evaluation_val.json")
    study = read_study(copy, BASE, copy, resamples=50)
    assert study.comparisons["msf=true, mlf=true"].images is None and "scene_39" in study.notes[0]
    assert study.comparisons["msf=true, mlf=false"].images is not None
    for r, f in copy.items():
        if f == BASE:
            (r / "evaluation_val.json").unlink()
    study = read_study(copy, BASE, copy)
    assert study.comparisons == {} and "has no result yet" in study.notes[0] and "vs base" not in board(study)[0]
    assert "has no result yet" in write_markdown(study, tmp_path / "r.md").read_text()


def test_small_things():
    assert pareto([]) == [] and pareto([(1, 1), (1, 2), (1, 2)]) == [1]
    assert factor_label({"arm": "lite", "train.lr": 0.1}) == "lite, lr=0.1"
    assert study_figures.__doc__ and telling_images(Study([])) == {}


def test_in_a_browser(study, tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    page = write_report(study, tmp_path / "r.html", title="MSF × MLF")
    with api.sync_playwright() as p:
        path = next((b for b in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(b).exists()), None)
        try:
            browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except api.Error as e:
            pytest.skip(f"no browser: {str(e).splitlines()[0]}")
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390  # wide things scroll by themselves
        with tab.expect_download() as got:
            tab.click("#differences a")
        assert got.value.suggested_filename == "differences.svg" and ET.parse(got.value.path()).getroot().tag.endswith("svg")
        tab.emulate_media(media="print")
        tab.set_viewport_size({"width": 703, "height": 1000})  # A4 less its margins, at 96 pixels per inch
        assert tab.evaluate("document.querySelector('.details').getBoundingClientRect().top") < 1032  # the summary fits on one sheet
        whole = "[...document.querySelectorAll('.scroll, .figure')].every(e => e.scrollWidth <= e.clientWidth + 1)"
        assert tab.evaluate(whole)  # nothing is cut off
        assert not tab.is_visible("figcaption")
        browser.close()


def test_runs_on_other_images_have_no_best(tmp_path):
    """Runs that were scored on different splits stand on one page, but nothing is called the best, and it says why."""
    a, b = (made_up_run(tmp_path / n, {"model.msf": n == "a"}, 0.3, 0) for n in "ab")
    record = load_json(b / "evaluation_val.json")
    save_json({**record, "split": "small.txt"}, b / "evaluation_val.json")
    study = read_study([a, b])
    assert headline(study).startswith("No best")
    write_report(study, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "not scored on the same images" in page and "split val; minicity, split small.txt" in page and "Best:" not in page
    assert headline(read_study([a])).startswith("Best")
