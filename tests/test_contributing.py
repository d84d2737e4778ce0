"""The worked examples of CONTRIBUTING.md are run as they stand there; the issue forms are forms."""
import inspect
import re
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from _losses import VOID, case

from mlmsnet.comparing.compare import load_plugin
from mlmsnet.core import ConfigError, DataError
from mlmsnet.data.datasets import DATASETS, create_dataset
from mlmsnet.data.labels import TABLES, get_table
from mlmsnet.data.loaders import train_loader
from mlmsnet.data.transforms import AugmentConfig, TrainTransform
from mlmsnet.losses.contract import LOSSES, available_losses, create_loss, loss_info
from mlmsnet.networks.mlmsnet import MODELS, available_models, create_model
from mlmsnet.training.config import Config, DataConfig, ModelConfig
from mlmsnet.training.loop import build_dataset, build_model

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
REGISTRIES = LOSSES, MODELS, DATASETS, TABLES


def blocks(example):
    """The fenced blocks marked ```python example=NAME, in order, as one text with the lines where they stand."""
    found = re.finditer(rf"^```python example={example}\n(.*?)^```$", GUIDE, re.M | re.S)
    return "\n".join("\n" * (0 if i else GUIDE[:m.start()].count("\n") + 1) + m[1] for i, m in enumerate(found))


@pytest.fixture
def example(request, monkeypatch):
    """Run an example as a module of its own; whatever it registers is gone afterwards."""
    available_losses(), available_models()  # modules that are imported late register but once: before, not during
    before = [dict(r) for r in REGISTRIES]
    code = blocks(request.param)
    assert code, f"no block is marked example={request.param}"
    module = types.ModuleType(f"contributing_{request.param}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    try:
        exec(compile(code, f"CONTRIBUTING.md, example {request.param}", "exec"), module.__dict__)
        yield module
    finally:
        for registry, was in zip(REGISTRIES, before):
            registry.clear()
            registry.update(was)


def run(name):
    return pytest.mark.parametrize("example", [name], indirect=True)


@run("loss")
def test_loss(example):
    logits, target = case()
    loss, leaf = create_loss("phuber", tau=4), logits.clone().requires_grad_()
    loss(leaf, target).backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0
    p = logits.softmax(1).gather(1, target.masked_fill(target == VOID, 0).unsqueeze(1)).squeeze(1)[target != VOID].numpy()
    assert np.isclose(loss(logits, target), np.where(p > 1 / 4, -np.log(p), 1 + np.log(4) - 4 * p).mean())
    rubbish = logits.masked_fill((target == VOID).unsqueeze(1), float("nan"))
    assert loss(rubbish, target) == loss(logits, target)
    leaf = logits.clone().requires_grad_()
    nothing = loss(leaf, torch.full_like(target, VOID))
    nothing.backward()
    assert nothing == 0 and (leaf.grad == 0).all()
    with pytest.raises(ConfigError, match="tau"):
        create_loss("phuber", tau=0.5)


@run("loss")
def test_loss_passes_what_every_loss_passes(example):
    """The property tests of tests/test_losses.py that take nothing but a loss's name, and three that take a case."""
    import test_losses
    assert loss_info("phuber").family == "pixel"
    tests = [f for name, f in vars(test_losses).items() if name.startswith("test_") and list(inspect.signature(f).parameters) == ["name"]]
    assert len(tests) > 10
    ran = 0
    for test in tests:
        try:
            test("phuber")
            ran += 1
        except pytest.skip.Exception:  # asks for a parameter that this loss does not have
            pass
    assert ran > 10
    for one in test_losses.CASES:
        for mode in ("float32", "float16"):
            test_losses.test_finite("phuber", one, mode)
    for rubbish in (1e4, float("nan"), float("inf")):
        test_losses.test_void_leaks_nothing("phuber", rubbish)


@run("loss")
def test_loss_as_a_plugin(example, tmp_path):
    """The same code in a file of one's own, with no family."""
    del LOSSES["phuber"]
    file = tmp_path / "mine.py"
    file.write_text(blocks("loss").replace('family="pixel", ', ""), encoding="utf-8")
    assert load_plugin(file) == ["phuber"] and loss_info("phuber").family == "yours"


@run("network")
def test_network(example):
    model = build_model(Config(model=ModelConfig(name="sumnet", params={"sum_chs": 8})), 4, aux=True).train()
    assert model.settings["sum_chs"] == 8
    before = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.SGD([{"params": model.backbone_parameters()}, {"params": model.head_parameters()}], lr=0.1)
    for size in [(32, 32), (33, 47), (65, 40)]:
        out = model.train()(torch.randn(1, 3, *size))
        assert set(out) == {"out", "aux"} and all(o.shape == (1, 4, *size) for o in out.values())
        target = torch.randint(0, 4, (1, *size))
        optimiser.zero_grad()
        sum(create_loss("cross_entropy")(o, target) for o in out.values()).backward()
        optimiser.step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert set(model.eval()(torch.randn(1, 3, *size))) == {"out"}
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


@run("network")
def test_network_refuses(example):
    with pytest.raises(ConfigError, match="Did you mean sum_chs"):
        create_model("sumnet", 4, sum_chz=8)
    with pytest.raises(ConfigError, match="sum_chs is 0"):
        create_model("sumnet", 4, sum_chs=0)


@run("dataset")
def test_dataset(example, tmp_path):
    folder, rng = tmp_path / "train", np.random.default_rng(0)
    folder.mkdir()
    for name in "ab":
        cv2.imwrite(str(folder / f"{name}.jpg"), rng.integers(0, 256, (40, 56, 3), np.uint8))
        cv2.imwrite(str(folder / f"{name}_label.png"), np.repeat(np.arange(4, dtype=np.uint8), 10)[:, None].repeat(56, 1))
    data = build_dataset(Config(data=DataConfig(name="crossings", root=str(tmp_path))), "train")
    assert data.names == ["a", "b"] and data.num_classes == 3 and data.table == get_table("crossings")
    assert data[0].image.shape == (40, 56, 3) and data[0].mask[::10, 0].tolist() == [255, 0, 1, 2]
    loader = train_loader(data, TrainTransform(AugmentConfig(crop=(32, 48))), batch_size=2)
    loader.set_epoch(0)
    (x, y, index), = loader
    assert x.shape == (2, 3, 32, 48) and x.isfinite().all() and sorted(index.tolist()) == [0, 1]
    assert set(y.unique().tolist()) <= {0, 1, 2, 255}
    cv2.imwrite(str(folder / "b_label.png"), np.full((40, 56), 7, np.uint8))
    with pytest.raises(DataError, match="b_label.png.*7"):
        create_dataset("crossings", tmp_path)[1]
    (folder / "b_label.png").unlink()
    with pytest.raises(DataError, match="b_label.png.*missing"):
        create_dataset("crossings", tmp_path)
    with pytest.raises(ConfigError, match="split"):
        create_dataset("crossings", tmp_path, "trian")


def test_nothing_stays_registered():
    assert "phuber" not in available_losses() and "sumnet" not in available_models()
    assert "crossings" not in DATASETS and "crossings" not in TABLES


def test_the_guide_names_what_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", GUIDE)
    paths = re.findall(r"`((?:nbs|tools|tests|benchmarks|mlmsnet)/[\w./]*)`", GUIDE)
    commands = re.findall(r"(?:python|compare) ((?:nbs|tools|benchmarks)/[\w./]+)", GUIDE)
    assert links and paths and commands
    assert not [p for p in [*links, *paths, *commands] if not (ROOT / p).exists()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)\s", GUIDE)) <= targets
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^##? (.+)$", GUIDE, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) <= anchors
    assert "`_FAMILIES`" in GUIDE and "_FAMILIES" in (ROOT / "mlmsnet/losses/contract.py").read_text()
    assert "`_ELSEWHERE`" in GUIDE and "_ELSEWHERE" in (ROOT / "mlmsnet/networks/mlmsnet.py").read_text()


NEEDED = {"markdown": "value", "dropdown": "options", "checkboxes": "options"}  # beside `label`, of which markdown has none


@pytest.mark.parametrize("name", ["bug_report", "result_that_differs", "idea"])
def test_form(name):
    form = yaml.safe_load((FORMS / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["body"]
    assert any(field["type"] != "markdown" for field in form["body"])
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]+", i) for i in ids)
    for field in form["body"]:
        kind, attributes = field["type"], field["attributes"]
        assert kind in {"markdown", "input", "textarea", "dropdown", "checkboxes"}
        assert attributes[NEEDED.get(kind, "label")]
        assert kind == "markdown" or attributes["label"]
        assert all(set(o) <= {"label", "required"} and o["label"] for o in attributes["options"]) if kind == "checkboxes" else True
        assert set(field.get("validations", {})) <= {"required"}
        assert isinstance(field.get("validations", {}).get("required", False), bool)
    if name != "idea":
        text = (FORMS / f"{name}.yml").read_text(encoding="utf-8")
        assert "doctor" in ids and "config" in ids and "`mlmsnet doctor`" in text and "`config.yaml`" in text
    if name == "result_that_differs":
        assert "summary" in ids


def test_the_chooser_and_the_pull_request():
    chooser = yaml.safe_load((FORMS / "config.yml").read_text(encoding="utf-8"))
    assert isinstance(chooser["blank_issues_enabled"], bool)
    assert all(set(link) == {"name", "url", "about"} and link["url"].startswith("https://") for link in chooser["contact_links"])
    assert (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8").count("- [ ]") >= 3
