"""Properties of the networks: shapes at odd sizes, a batch of one, gradients, weights by name, errors that say what to do."""
import copy
import importlib.util
import math
import warnings

import pytest
import torch
import torchvision
from torch import nn

from mlmsnet.core import CheckpointError, ConfigError
from mlmsnet.networks.backbones import MobileNetV3, MobileNetV3Classifier, create_backbone
from mlmsnet.networks.fusion import MLF, MSF
from mlmsnet.networks.layers import BatchNorm2d, InvertedResidual, SameConv2d, fuse_conv_bn
from mlmsnet.networks.mlmsnet import MODELS, create_model
from mlmsnet.networks.pretrained import load_mobilenetv3_pytorch, load_torchvision
from mlmsnet.networks.weights import from_original_config, load_original

PRESETS = ["mlms_l", "mlms_s", "mlmsv2_l", "mlmsv2_s", "mlms_small", "baseline"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomise(net):
    """Norms that do something, so that a swapped pair of weights shows."""
    with torch.no_grad():
        for name, t in [*net.named_parameters(), *net.named_buffers()]:
            if t.is_floating_point():
                t.add_(0.1 * torch.rand_like(t) if "running_var" in name else 0.05 * torch.randn_like(t))
    return net


# --- every preset ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_one_image_trains_at_any_size(name):
    model = create_model(name, 5).train()
    for hw in [(33, 47), (32, 32), (97, 65)]:
        out = model(torch.randn(1, 3, *hw))
        assert out["out"].shape == (1, 5, *hw)
        assert ("aux" in out) == (model.aux is not None)
        model.zero_grad()
        sum(o.float().square().mean() for o in out.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval()(torch.randn(1, 3, 40, 40))) == {"out"}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_groups_cover_everything_once(name):
    model = create_model(name, 5)
    ids = [id(p) for p in model.backbone_parameters() + model.head_parameters()]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", PRESETS)
def test_channels_last_folding_and_batch_make_no_difference(name):
    model = randomise(create_model(name, 4)).eval()
    x = torch.randn(2, 3, 41, 56)
    with torch.no_grad():
        expected = model(x)["out"]
        assert (model(x[1:])["out"] - expected[1:]).abs().max() < 1e-4
        assert (fuse_conv_bn(model)(x)["out"] - expected).abs().max() < 1e-4
        assert (model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))["out"] - expected).abs().max() < 1e-4


def test_grad_mode_makes_no_difference_and_the_input_is_not_touched():
    model = randomise(create_model("mlms_small", 4)).eval()
    x = torch.randn(1, 3, 48, 40)
    before = x.clone()
    with torch.no_grad():
        quiet = model(x)["out"]
    assert (model(x)["out"] - quiet).abs().max() < 1e-5
    assert torch.equal(x, before)


def test_fusion_leaves_its_inputs_alone():
    x = torch.randn(2, 8, 9, 9)
    before = x.clone()
    with torch.no_grad():
        for version in (1, 2):
            MSF(8, version=version).eval()(x)
            MLF(16, version=version).eval()([x, x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("over", [
    {"output_stride": 16}, {"output_stride": 32}, {"output_stride": 16, "dilate": True}, {"msf": False}, {"mlf": False},
    {"msf": False, "mlf": False}, {"msf": False, "wide": True}, {"dilations": [2, 4]}, {"padding": "same_tf"}, {"width_mult": 0.75},
    {"aux": False}, {"version": 2, "aux": True}, {"backbone": "torchvision/resnet18"}, {"se_after_act": True},
])  # fmt: skip
def test_overrides(over):
    model = create_model("mlms_small", 3, **over).train()
    assert model(torch.randn(2, 3, 45, 71))["out"].shape == (2, 3, 45, 71)
    maps = model.backbone.features(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == model.channels
    assert [64 // m.shape[2] for m in maps] == model.strides == [96 // m.shape[3] for m in maps]


@pytest.mark.parametrize("name", PRESETS)
def test_settings_build_the_same_network_again(name, tmp_path):
    model = create_model(name, 4, padding="same_tf", mean=(0.5, 0.5, 0.5))
    torch.save({"settings": model.settings, "model": model.state_dict()}, tmp_path / "m.pt")
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    again = create_model(**saved["settings"])
    again.load_state_dict(saved["model"])
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(again.eval()(x)["out"], model.eval()(x)["out"])
    assert again.mean == (0.5, 0.5, 0.5) and again.backbone.padding == "same_tf" and again.settings == model.settings


def test_bfloat16_autocast_is_finite_and_near():
    model = create_model("mlms_small", 4).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        full = model(x)["out"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x)["out"]
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_the_graph_has_no_breaks():
    model = create_model("mlms_small", 3, msf=False, width_mult=0.5).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x)["out"], model(x)["out"], atol=1e-5)


def test_deepcopy_and_pickle_of_weights():
    model = create_model("mlms_small", 3)
    twin = copy.deepcopy(model)
    assert twin.settings == model.settings and all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters()))


# --- batch norm ------------------------------------------------------------------------------------------------------------
def test_batchnorm_is_torchs_but_for_a_single_value():
    ours, theirs = BatchNorm2d(6), nn.BatchNorm2d(6)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for shape in [(2, 6, 1, 1), (1, 6, 1, 2), (3, 6, 4, 4)]:
        x = torch.randn(shape)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    single = torch.randn(1, 6, 1, 1, requires_grad=True)
    before = ours.running_mean.clone()
    out = ours(single)
    out.sum().backward()
    assert torch.equal(ours.running_mean, before) and single.grad.abs().min() > 0 and ours.weight.grad is not None
    assert torch.allclose(out, ours.eval()(single))
    with pytest.raises(ValueError, match="more than 1 value"):
        theirs(single)


def test_sync_batchnorm_conversion_keeps_the_keys():
    model = create_model("mlms_small", 3)
    keys = list(model.state_dict())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert list(synced.state_dict()) == keys
    assert not any(type(m) is BatchNorm2d for m in synced.modules())


# --- backbones -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["large", "small"])
def test_torchvision_weights_give_torchvisions_numbers(size):
    theirs = randomise(getattr(torchvision.models, f"mobilenet_v3_{size}")(weights=None)).eval()
    ours = load_torchvision(MobileNetV3Classifier(size, se_after_act=True), theirs.state_dict()).eval()
    x = torch.randn(2, 3, 97, 131)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 1e-5
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


TORCHVISION = ["mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v2", "resnet18", "efficientnet_b0", "regnet_y_400mf",
               "shufflenet_v2_x1_0", "mnasnet1_0"]  # fmt: skip


@pytest.mark.parametrize("name", ["mobilenetv3_large", "mobilenetv3_small", *(f"torchvision/{n}" for n in TORCHVISION)])
def test_declared_channels_and_strides_are_true(name):
    backbone = create_backbone(name).train()
    maps = backbone.features(torch.randn(1, 3, 65, 97))  # a batch of one in training
    assert [m.shape[1] for m in maps] == backbone.channels
    for m, s in zip(maps, backbone.strides):
        assert tuple(m.shape[-2:]) == (math.ceil(65 / s), math.ceil(97 / s))
    assert backbone.strides == sorted(backbone.strides) and len(backbone.mean) == len(backbone.std) == 3


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", ["timm/mobilenetv3_large_100", "timm/resnet18"])
def test_timm(name):
    backbone = create_backbone(name).eval()
    maps = backbone.features(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == backbone.channels and [64 // m.shape[2] for m in maps] == backbone.strides


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_is_optional():
    with pytest.raises(ConfigError, match="pip install timm"):
        create_backbone("timm/mobilenetv3_large_100")


def test_dilating_a_removed_stride_keeps_the_numbers_of_the_coarse_grid():
    coarse, dense = MobileNetV3("large", output_stride=32), MobileNetV3("large", output_stride=8, dilate=True)
    dense.load_state_dict(coarse.state_dict())
    x = torch.randn(1, 40, 17, 23)
    with torch.no_grad():  # the first four blocks of layer 3 have no squeeze-and-excite, which would look at the whole map
        a, b = coarse.eval().stages[2][:4](x), dense.eval().stages[2][:4](x)
    assert b.shape[-2:] == x.shape[-2:]
    assert (b[..., ::2, ::2] - a).abs().max() < 1e-5


@pytest.mark.parametrize("n", range(5, 12))
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding(n, kernel):
    conv = SameConv2d(2, 2, kernel, 2, kernel // 2)
    plain = conv(torch.randn(1, 2, n, n))
    conv.same = True
    x = torch.randn(1, 2, n, n)
    assert conv(x).shape == plain.shape == (1, 2, -(-n // 2), -(-n // 2))
    total = (-(-n // 2) - 1) * 2 + kernel - n
    by_hand = nn.functional.pad(x, [total // 2, total - total // 2] * 2)
    assert torch.allclose(conv(x), nn.functional.conv2d(by_hand, conv.weight, conv.bias, 2))


def test_a_block_with_zero_projection_is_the_identity():
    block = InvertedResidual(8, 24, 8, se=True, act="hswish")
    nn.init.zeros_(block.project.norm.weight)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x)


# --- weights ---------------------------------------------------------------------------------------------------------------
def consecutive(state):
    """Our classifier's names in those of mobilenetv3.pytorch (blocks numbered in one row), written without the library's rules."""
    stages = {}
    for k in state:
        if k.startswith("backbone.stages."):
            i, j = map(int, k.split(".")[2:4])
            stages.setdefault((i, j), len(stages) + 1)
    out = {}
    for k, v in state.items():
        p = k.split(".")
        if k.startswith("backbone.stem."):
            out[f"features.0.{'01'[p[2] == 'norm']}.{p[3]}"] = v
        elif k.startswith("backbone.stages."):
            i, j = int(p[2]), int(p[3])
            expands = f"backbone.stages.{i}.{j}.expand.conv.weight" in state
            at = {"expand": 0, "depthwise": 3 if expands else 0, "project": 7 if expands else 4, "se": 5 if expands else 3}[p[4]]
            if p[4] == "se":
                linear = v[:, :, 0, 0] if p[-1] == "weight" else v
                out[f"features.{stages[i, j]}.conv.{at}.fc.{0 if p[5] == 'squeeze' else 2}.{p[6]}"] = linear
            else:
                out[f"features.{stages[i, j]}.conv.{at + (p[5] == 'norm')}.{p[6]}"] = v
        elif k.startswith("conv."):
            out[f"conv.{'01'[p[1] == 'norm']}.{p[2]}"] = v
        else:
            out[k] = v
    return out


@pytest.mark.parametrize("size,width", [("large", 1.0), ("large", 0.75), ("small", 1.0), ("small", 0.75)])
def test_mobilenetv3_pytorch_names(size, width):
    source = randomise(MobileNetV3Classifier(size, num_classes=10, width_mult=width))
    file = {f"module.{k}": v for k, v in consecutive(source.state_dict()).items()}
    classifier = load_mobilenetv3_pytorch(MobileNetV3Classifier(size, num_classes=10, width_mult=width), file)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), classifier.state_dict().values()))
    model = create_model("mlms_l", 3, backbone=f"mobilenetv3_{size}", width_mult=width)
    load_mobilenetv3_pytorch(model, file)  # the classifier is dropped
    assert all(torch.equal(a, b) for a, b in zip(source.backbone.state_dict().values(), model.backbone.state_dict().values()))


def test_imagenet_file(shared):
    file = shared / "weights" / "mobilenet_v3_small_imagenet_fp16.pth"
    if not file.is_file():
        pytest.skip("the ImageNet file is not in shared/weights")
    model = create_model("mlms_small", 11, weights=str(file))
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    assert model.backbone.padding == "same_tf" and model.backbone.se_after_act and model.backbone.stem.norm.eps == 1e-3
    stored = torch.load(file, weights_only=True)
    assert torch.equal(model.backbone.stem.conv.weight, stored["features.0.0.weight"].float())
    theirs = torchvision.models.mobilenet_v3_small(weights=None)
    theirs.load_state_dict({k: v.float() for k, v in stored.items()})
    ours = load_torchvision(MobileNetV3Classifier("small", se_after_act=True), stored)
    ours.backbone.set_padding("symmetric")
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert (ours.eval()(x) - theirs.eval()(x)).abs().max() < 1e-3  # logits up to 10
    symmetric = create_model("mlms_small", 11, weights=str(file), padding="symmetric", mean=(0.4, 0.4, 0.4))  # what is asked for wins
    assert symmetric.backbone.padding == "symmetric" and symmetric.mean == (0.4, 0.4, 0.4)


def test_original_checkpoints_are_strict(tmp_path):
    config = {"arch": "mlms", "mode": "small", "large": False, "classes": 3, "base_lr": 0.01}
    file = original_names(create_model("mlms_small", 3))
    target = from_original_config(config)
    load_original(target, {"state_dict": {f"module.{k}": v for k, v in file.items()}, "epoch": 3})
    load_original(target, {**file, "classifier.0.weight": torch.zeros(4, 4), "conv.0.weight": torch.zeros(4, 4, 1, 1)})
    before = copy.deepcopy(target.state_dict())
    less, more, other = dict(file), {**file, "extra.weight": torch.zeros(1)}, {**file, "cls.4.weight": torch.zeros(19, 128, 1, 1)}
    del less["aux.4.bias"]
    shape = r"cls.4.weight \(19, 128, 1, 1\)"
    for state, said in [(less, "aux.classify.bias"), (more, "extra.weight"), (other, shape), ({}, "no state_dict")]:
        with pytest.raises(CheckpointError, match=said):
            load_original(target, state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), target.state_dict().values()))  # nothing was loaded
    with pytest.raises(CheckpointError, match="another network"):
        load_original(create_model("mlmsv2_l", 3), file)
    torch.save(file, tmp_path / "c.pth")
    load_original(target, tmp_path / "c.pth")


def original_names(model):
    """Version 1 in the original's names, written without the library's rules."""
    out = {}
    for k, v in model.state_dict().items():
        p = k.split(".")
        leaf = p[-1]
        if p[0] == "backbone":
            continue
        if p[0] in ("head", "aux"):
            top = "cls" if p[0] == "head" else "aux"
            out[f"{top}.{4 if p[1] == 'classify' else 0 if p[2] == 'conv' else 1}.{leaf}"] = v
            continue
        top, rest = ("msf" + p[1], p[2:]) if p[0] == "msf" else ("mlf", p[1:])
        norm = rest[-2] == "norm"
        if rest[0] == "branches":
            out[f"{top}.blocks.{rest[1]}.{'bn' if norm else 'atrous_conv'}.{leaf}"] = v
        elif rest[0] == "attention":
            out[f"{top}.{'bn_atten' if norm else 'atten'}.{leaf}"] = v
        else:
            out[f"{top}.fuse.{'bn' if norm else 'conv'}.{leaf}"] = v
    stage = {k: v for k, v in consecutive({**{f"backbone.{n}": t for n, t in model.backbone.state_dict().items()}}).items()}
    sizes = [len(s) for s in model.backbone.stages]
    for k, v in stage.items():
        n, rest = int(k.split(".")[1]), k.split(".", 2)[2]
        if n == 0:
            out[f"layer0.0.{rest}"] = v
        else:
            i = next(i for i in range(4) if n <= sum(sizes[: i + 1]))
            out[f"layer{i + 1}.{n - 1 - sum(sizes[:i])}.{rest}"] = v
    return out


# --- errors ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call,said", [
    (lambda: create_model("mlms_x", 3), "mlms_l"), (lambda: create_model("mlms_l", 3, wyde=True), "Did you mean wide"),
    (lambda: create_model("baseline", 3, msf=False), "Valid: .*output_stride"), (lambda: create_model("mlms_l", 1), "at least 2"),
    (lambda: create_model("mlms_l", 3, version=3), "version"), (lambda: create_model("mlms_l", 3, dilations=(0,)), "dilations"),
    (lambda: create_model("mlms_l", 3, output_stride=4), "8, 16 or 32"),
    (lambda: create_model("mlms_l", 3, backbone="mobilenetv3_larg"), "mobilenetv3_large"),
    (lambda: create_model("mlms_l", 3, backbone="torchvision/rsnet18"), "resnet18"),
    (lambda: create_model("mlms_l", 3, weights="imagenet", width_mult=0.75), "PATH"),
    (lambda: create_model("mlms_l", 3, backbone="torchvision/resnet18", width_mult=0.5), "width_mult cannot"),
    (lambda: create_backbone("torchvision/vit_b_16"), "convolutional"), (lambda: create_backbone("mobilenetv3_large", foo=1), "foo"),
    (lambda: from_original_config({"arch": "pspnet", "layers": 18, "classes": 19}), "50, 101 or 152"),
    (lambda: from_original_config({"arch": "mlms"}), "classes"),
])  # fmt: skip
def test_errors_say_what_to_do(call, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=said) as e:
            call()
    assert "\n" not in str(e.value)


def test_wrong_weights(tmp_path):
    small = MobileNetV3Classifier("small")
    torch.save(torchvision.models.mobilenet_v3_large(weights=None).state_dict(), tmp_path / "large.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="large.pth: made for another network"):
        create_model("mlms_small", 3, weights=str(tmp_path / "large.pth"))
    with pytest.raises(CheckpointError, match="other.pth: not MobileNetV3 weights"):
        create_model("mlms_small", 3, weights=str(tmp_path / "other.pth"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        create_model("mlms_small", 3, weights=str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="torchvision/resnet18"):
        load_torchvision(create_backbone("torchvision/resnet18"), small.state_dict())


def test_registry_lists_our_presets():
    assert set(PRESETS) <= set(MODELS)
