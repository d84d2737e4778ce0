"""One contract for every light preset, and the networks of libraries: torchvision's numbers, smp and timm by name, weights, errors."""
import importlib.util
import sys
import warnings

import pytest
import torch
import torchvision

from mlmsnet.core import CheckpointError, ConfigError
from mlmsnet.evaluation.cost import count_macs, count_params
from mlmsnet.networks.layers import fuse_conv_bn
from mlmsnet.networks.mlmsnet import available_models, create_model

HEAVY = {"pspnet", "pspnet101", "psanet", "psanet101"}  # on ResNets; they have tests of their own
PRESETS = [name for name in available_models() if name not in HEAVY]
LIBRARIES = {"smp": "segmentation_models_pytorch", "timm": "timm", "torchvision": "torchvision"}
NAMED = [
    ("torchvision/lraspp_mobilenet_v3_large", {"aux": True}),
    ("smp/Unet", {"encoder": "mobilenet_v2", "decoder_channels": [32, 24, 16, 16, 8]}),
    ("smp/PSPNet", {"encoder": "mobilenet_v2", "psp_out_channels": 64, "aux": True}),
    ("smp/PAN", {"encoder": "mobilenet_v2", "encoder_depth": 3}),
    ("smp/FPN", {"encoder": "tu-mobilenetv3_small_050", "decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}),
    ("timm/mobilenetv3_small_050", {"aux": True}),
    ("timm/mobilenetv3_small_050", {"head": "conv", "output_stride": 16}),
    ("timm/convnext_atto", {}),
]


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def needs(name):
    family = name.split("/")[0]
    if "/" in name and importlib.util.find_spec(LIBRARIES[family]) is None:
        pytest.skip(f"{LIBRARIES[family]} is not installed")


def maps_of(out):
    return [v for value in out.values() for v in (value if isinstance(value, list) else [value])]


# --- the contract ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name,options", [(name, {}) for name in PRESETS] + NAMED)
def test_contract(name, options):
    needs(name)
    model = create_model(name, 5, **options).train()
    for hw in [(33, 47), (32, 32)]:  # odd; and a deepest map of one pixel: a batch of one has no statistics there
        out = model(torch.randn(1, 3, *hw))
        assert all(m.shape == (1, 5, *hw) for m in maps_of(out))
    assert set(out) == ({"out", "aux"} if model.aux is not None else {"out"})
    sum(m.square().mean() for m in maps_of(out)).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    groups = model.backbone_parameters() + model.head_parameters()
    assert sorted(map(id, groups)) == sorted(map(id, model.parameters())) and model.backbone_parameters() and model.head_parameters()
    assert len(model.mean) == len(model.std) == 3 and model.backbone.input_spec()["mean"] == model.mean
    assert len(model.channels) == len(model.strides) and model.num_classes == 5

    model.eval()
    again = create_model(**model.settings).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        expected = model(x)
        assert set(expected) == {"out"}
        assert torch.equal(again(x)["out"], expected["out"])
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))["out"]
    assert (last - expected["out"]).abs().max() < 1e-3 * max(1, expected["out"].abs().max())
    assert count_macs(model, (64, 96)) > 0


@pytest.mark.parametrize("name", ["lraspp", "deeplabv3_mobilenet", "bisenetv2", "efficientvit_b0"])
def test_maps_are_as_declared_and_folding_changes_nothing(name):
    model = create_model(name, 4).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
        maps = model.backbone.features(torch.randn(1, 3, 64, 128))
        assert [m.shape[1:] for m in maps] == [(c, 64 // s, 128 // s) for c, s in zip(model.channels, model.strides)]
        x = torch.randn(1, 3, 48, 40)
        a, b = model(x)["out"], fuse_conv_bn(model)(x)["out"]
    assert (a - b).abs().max() < 1e-3 * a.abs().max()


@pytest.mark.parametrize("name", ["bisenetv2", "efficientvit_b0", "lraspp"])
def test_bfloat16_autocast_is_near(name):
    model = create_model(name, 4).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        full = model(x)["out"]
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)["out"].float()
    assert half.isfinite().all() and (half - full).abs().max() < 0.1 * full.abs().max()


# --- torchvision -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset,name", [("lraspp", "lraspp_mobilenet_v3_large"), ("deeplabv3_mobilenet", "deeplabv3_mobilenet_v3_large")])
def test_same_weights_same_numbers_as_torchvision(preset, name, tmp_path):
    more = {} if preset == "lraspp" else {"aux_loss": True}
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=7, **more)
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    ours = create_model(preset, 7, weights=str(tmp_path / "whole.pth"), **({"aux": True} if more else {}))
    x = torch.randn(2, 3, 49, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x)["out"], theirs.eval()(x)["out"])
        for m in (ours, theirs):  # dropout would differ
            m.train()
            for d in m.modules():
                if isinstance(d, torch.nn.Dropout):
                    d.eval()
        assert all(torch.equal(ours(x)[k], v) for k, v in theirs(x).items())

    other = create_model(preset, 3, weights=str(tmp_path / "whole.pth"))  # another number of classes: only the classifiers start new
    taken, fresh = other.state_dict(), {k for k, v in other.state_dict().items() if v.shape != ours.state_dict()[k].shape}
    assert fresh and all("classifier" in k for k in fresh)
    assert all(torch.equal(v, ours.state_dict()[k]) or "running" in k or "tracked" in k for k, v in taken.items() if k not in fresh)


def test_backbone_weights_and_wrong_files(tmp_path):
    net = torchvision.models.mobilenet_v3_large(weights=None)
    torch.save(net.state_dict(), tmp_path / "large.pth")
    model = create_model("lraspp", 4, weights=str(tmp_path / "large.pth"))
    assert torch.equal(model.backbone.net["16"][0].weight, net.features[16][0].weight)
    torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict(), tmp_path / "small.pth")
    with pytest.raises(CheckpointError, match="made for another network"):
        create_model("lraspp", 4, weights=str(tmp_path / "small.pth"))
    with pytest.raises(CheckpointError, match="nowhere.pth"):
        create_model("deeplabv3_mobilenet", 4, weights="nowhere.pth")


def test_published_sizes():
    assert count_params(create_model("lraspp", 21)) == 3_221_538  # as torchvision states with its weights
    assert count_params(create_model("deeplabv3_mobilenet", 21, aux=True)) == 11_029_328
    b0 = create_model("efficientvit_b0", 19)  # Cai et al. 2023: 0.7 M, 4.4 GMACs
    assert 0.65e6 < count_params(b0) < 0.75e6 and 4.35e9 < count_macs(b0, (1024, 2048)) < 4.45e9
    bi = create_model("bisenetv2", 19, aux=False)  # Yu et al. 2020: 21.15 GFLOPs at 512 × 1024
    assert 3.2e6 < count_params(bi) < 3.5e6 and 20e9 < count_macs(bi, (512, 1024)) < 26e9


# --- names and options -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name,options,says", [
    ("torchvision/lrasp_mobilenet_v3_large", {}, "Did you mean lraspp_mobilenet_v3_large"),
    ("keras/Unet", {}, "before the slash stands torchvision, smp or timm"),
    ("lraspp", {"aus": True}, "Did you mean aux"),
    ("smp/Unett", {}, "Did you mean Unet"),
    ("smp/Unet", {"encoder": "mobilenet_v3"}, "Did you mean mobilenet_v2"),
    ("smp/Unet", {"decoder_chanels": 3}, "Did you mean decoder_channels"),
    ("smp/UnetPlusPlus", {"encoder": "mit_b0"}, "cannot be built"),
    ("timm/mobilenetv3_smal_050", {}, "Did you mean mobilenetv3_small_050"),
    ("timm/mobilenetv3_small_050", {"head": "lrasp"}, "Did you mean lraspp"),
])  # fmt: skip
def test_wrong_names_are_answered_with_the_nearest(name, options, says):
    if name.split("/")[0] in LIBRARIES:
        needs(name)
    with pytest.raises(ConfigError, match=says) as e:
        create_model(name, 5, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name,module,package", [
    ("smp/Unet", "segmentation_models_pytorch", "segmentation-models-pytorch"), ("timm/resnet18", "timm", "timm"),
])  # fmt: skip
def test_a_missing_package_is_named(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        create_model(name, 5)


def test_smp_gives_its_own_numbers_and_normalisation(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder, small = "tu-mobilenetv3_small_050", {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}
    theirs = smp.FPN(encoder, encoder_weights=None, classes=4, **small).eval()
    torch.save(theirs.state_dict(), tmp_path / "fpn.pt")
    ours = create_model("smp/FPN", 4, encoder=encoder, weights=str(tmp_path / "fpn.pt"), **small).eval()
    wants = smp.encoders.get_preprocessing_params(encoder)
    assert ours.mean == tuple(wants["mean"]) and ours.std == tuple(wants["std"])
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(ours(x)["out"], theirs(x))
        padded = torch.zeros(1, 3, 64, 96)
        padded[..., :50, :70] = x[..., :50, :70]
        assert torch.equal(ours(x[..., :50, :70])["out"], theirs(padded)[..., :50, :70])


def test_stages_that_nothing_uses_take_no_gradient():
    pytest.importorskip("segmentation_models_pytorch")
    model = create_model("smp/PSPNet", 4, encoder="mobilenet_v2", psp_out_channels=64)
    assert count_params(model, trainable=True) < 0.2 * count_params(model)
    assert all(m.running_mean.abs().max() == 0 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))  # building left no trace


def test_timm_mean_comes_from_timm_and_transformers_fit_any_size():
    timm = pytest.importorskip("timm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_model("timm/vit_tiny_patch16_224", 3).train()
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert model.mean == tuple(cfg.mean) and model.multiple == 16
    assert model(torch.randn(1, 3, 33, 50))["out"].shape == (1, 3, 33, 50)


def test_efficientvit_agrees_with_another_hand():
    timm = pytest.importorskip("timm")
    from mlmsnet.networks.efficientvit import EfficientViT, load_efficientvit

    theirs = timm.create_model("efficientvit_b0", pretrained=False).eval()
    for m in theirs.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
        if hasattr(m, "qkv"):
            m.eps = 1e-15
    ours = load_efficientvit(EfficientViT(), theirs.state_dict()).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert (ours(x)[-1] - theirs.forward_features(x)).abs().max() < 1e-4
