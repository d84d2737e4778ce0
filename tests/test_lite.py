"""The components of MLMSNet as options, and the lite preset: cost, contract, settings, errors."""
import functools
import itertools

import pytest
import torch

from mlmsnet.core import ConfigError
from mlmsnet.evaluation.cost import count_macs, count_params
from mlmsnet.networks.backbones import create_backbone
from mlmsnet.networks.fusion import LightHead, SegHead, SeparableConv, shrink
from mlmsnet.networks.layers import fuse_conv_bn
from mlmsnet.networks.mlmsnet import MODELS, BaselineNet, MLMSNet, MLMSOptions, create_model, on_backbone, register_model
from mlmsnet.training.config import Config, ModelConfig, config_hash, parse_config, shipped_configs
from mlmsnet.training.loop import build_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**over):
    return create_model("mlms_lite", 4, backbone="mobilenetv3_small", **over)


@functools.cache
def built(name, **over):
    return create_model(name, 19, **over)


# --- cost --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone,hw", [("large", (713, 713)), ("large", (360, 480)), ("small", (360, 480))])
def test_lite_costs_at_most_half(backbone, hw):
    base, lite = (built(n, backbone=f"mobilenetv3_{backbone}") for n in ("mlms_s", "mlms_lite"))
    assert count_macs(lite, hw) <= 0.5 * count_macs(base, hw)
    assert count_params(lite) < count_params(base)


def test_the_base_costs_what_the_references_say():
    assert count_macs(built("mlms_s"), (713, 713)) / 1e9 == pytest.approx(24.5, abs=0.05)


SAVINGS = [{"output_stride": 16}, {"level_chs": 32}, {"head": "separable"}, {"levels": (1, 2)}, {"branch_chs": 16}]


def test_each_saving_saves():
    base = count_macs(built("mlms_small"), (360, 480))
    for over in SAVINGS:
        assert count_macs(built("mlms_small", **over), (360, 480)) < base, over


# --- contract ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", ["mobilenetv3_large", "mobilenetv3_small", "torchvision/resnet18"])
def test_one_image_trains_at_any_size(backbone):
    model = create_model("mlms_lite", 4, backbone=backbone, aux=True).train()
    for hw in [(32, 32), (33, 47), (97, 65)]:
        out = model(torch.randn(1, 3, *hw))
        assert set(out) == {"out", "aux"} and out["out"].shape == out["aux"].shape == (1, 4, *hw)
    sum(o.square().mean() for o in out.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval()(torch.randn(2, 3, 40, 40))) == {"out"}
    ids = [id(p) for p in model.backbone_parameters() + model.head_parameters()]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_channels_last_and_folding_make_no_difference():
    model = small().eval()
    x = torch.randn(2, 3, 41, 56)
    with torch.no_grad():
        expected = model(x)["out"]
        assert (fuse_conv_bn(model)(x)["out"] - expected).abs().max() < 1e-4
        assert (model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))["out"] - expected).abs().max() < 1e-4


# --- options -----------------------------------------------------------------------------------------------------------------
OPTIONS = {
    "version": (1, 2), "msf": (True, False), "mlf": (True, False), "wide": (True, False), "levels": (None, (0, 2)),
    "level_chs": (None, 8), "branch_chs": (None, 8),
    "fuse_stride": (None, 16), "head": (None, "conv", "separable", "light"), "head_chs": (None, 24),
    "output_stride": (8, 16, 32), "finest_stride": (8, 4),
}  # fmt: skip


def pairs():
    "Every setting of an option beside every setting of another, the rest at random, the first setting more often"
    rng, names = torch.Generator().manual_seed(1), list(OPTIONS)
    def roll(n):
        return int(torch.randint(n, (1,), generator=rng))
    wanted = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in range(len(OPTIONS[a])) for y in range(len(OPTIONS[b]))}
    while wanted:
        a, x, b, y = min(wanted)
        pick = {n: roll(len(OPTIONS[n])) * roll(2) for n in names} | {a: x, b: y}
        wanted -= {(m, pick[m], n, pick[n]) for m, n in itertools.combinations(names, 2)}
        yield {n: OPTIONS[n][i] for n, i in pick.items()}


def test_options_combine_or_are_refused():
    x, done = torch.randn(1, 3, 33, 40), 0
    for over in pairs():
        strides = [4] * (over["finest_stride"] == 4) + [min(s, over["output_stride"]) for s in (8, 16, 32)]
        levels = over["levels"] or range(len(strides))
        if len(strides) - 1 not in levels:
            with pytest.raises(ConfigError, match="the deepest|light head"):
                small(**over)
            continue
        used = [strides[i] for i in levels]
        light = over["head"] == "light" or (over["head"] is None and over["version"] == 2)
        if (over["branch_chs"] and over["wide"]) or (light and over["head_chs"]) or (over["fuse_stride"] or used[0]) not in used:
            with pytest.raises(ConfigError):
                small(**over)
            continue
        model, done = small(**over), done + 1
        assert (model.msf is None, model.mlf is None) == (not over["msf"], not over["mlf"])
        assert model.fuse_stride == (over["fuse_stride"] or used[0])
        with torch.no_grad():
            assert model.eval()(x)["out"].shape == (1, 4, 33, 40)
        again = create_model(**model.settings)
        assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert done > 10


def test_new_options_leave_the_presets_as_they_were():
    for name in ("mlms_s", "mlmsv2_l"):
        keys = set(create_model(name, 4).state_dict())
        assert not [k for k in keys if k.startswith("project")]
        assert keys == set(create_model(name, 4, levels=(0, 1, 2), level_chs=1000, fuse_stride=8).state_dict())


def test_projection_only_narrows():
    model = small(level_chs=32)  # the levels have 24, 48 and 96 channels
    maps = [torch.randn(1, c, 8, 8) for c in model.channels]
    assert [p(m).shape[1] for p, m in zip(model.project, maps)] == [24, 32, 32]
    assert model.project[0](maps[0]) is maps[0]


def test_a_level_at_stride_4():
    for backbone, chs in (("mobilenetv3_small", [16, 24, 48, 96]), ("mobilenetv3_large", [24, 40, 112, 160])):
        model, x = create_model("mlms_lite", 4, backbone=backbone, finest_stride=4, output_stride=16).eval(), torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            maps = model.backbone.features(x)
            assert model.logits(maps).shape[-2:] == (16, 24)
        assert [m.shape[1] for m in maps] == model.channels == chs
        assert [64 // m.shape[2] for m in maps] == model.strides == [4, 8, 16, 16]


def test_what_a_preset_chose_for_its_backbone_falls_away_with_it():
    register_model("for_this_test", MLMSOptions(output_stride=16, finest_stride=4), on_backbone(MLMSNet))
    try:
        assert create_model("for_this_test", 4, backbone="mobilenetv3_small").strides == [4, 8, 16, 16]
        assert create_model("for_this_test", 4, backbone="torchvision/resnet18").strides == [8, 16, 32]
        with pytest.raises(ConfigError, match="output_stride cannot be set"):
            create_model("for_this_test", 4, backbone="torchvision/resnet18", output_stride=16)
    finally:
        MODELS.pop("for_this_test")


def test_fuse_stride_is_the_size_of_the_logits():
    model, x = small(output_stride=16, fuse_stride=16).eval(), torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        assert model.logits(model.backbone.features(x)).shape[-2:] == (7, 5)
    assert shrink(torch.ones(1, 2, 13, 9), 2).shape[-2:] == (7, 5) and (shrink(torch.ones(1, 2, 13, 9), 2) == 1).all()


def test_deepest_level_alone_without_fusion_is_the_baseline():
    net = MLMSNet(create_backbone("mobilenetv3_small"), 4, wide=False, msf=False, mlf=False, levels=(2,)).eval()
    base = BaselineNet(create_backbone("mobilenetv3_small"), 4).eval()
    base.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 47, 61)
    with torch.no_grad():
        assert torch.equal(net(x)["out"], base(x)["out"])


def test_kinds_of_head():
    kinds = (1, None, SegHead), (2, None, LightHead), (1, "light", LightHead), (2, "conv", SegHead), (2, "separable", SegHead)
    for version, kind, cls in kinds:
        head = small(version=version, head=kind).head
        assert type(head) is cls
        if cls is SegHead:
            assert isinstance(head.conv, SeparableConv) == (kind == "separable")
    assert small(head_chs=40).head.classify.in_channels == 40


# --- config ------------------------------------------------------------------------------------------------------------------
def test_config_knows_every_option_and_unset_ones_change_no_hash():
    given = {"name": "mlms_s", "levels": "[0,2]", "level_chs": 48, "fuse_stride": 16, "output_stride": 16, "head": "separable",
             "head_chs": 32, "backbone": "mobilenetv3_small"}
    cfg = parse_config(None, [str(a) for k, v in given.items() for a in (f"--model.{k}", v)])
    assert cfg.model == ModelConfig("mlms_s", backbone="mobilenetv3_small", output_stride=16, levels=(0, 2), level_chs=48, fuse_stride=16,
                                    head="separable", head_chs=32)
    model = build_model(cfg, 5)
    assert (model.levels, model.fuse_stride, model.head.classify.in_channels) == ((0, 2), 16, 32)
    assert config_hash(cfg) != config_hash(Config(model=ModelConfig("mlms_s", backbone="mobilenetv3_small", output_stride=16)))


@pytest.mark.parametrize("name", [n for n in shipped_configs() if n.endswith("_lite")])
def test_shipped_configs(name):
    cfg = parse_config(name)
    model = build_model(cfg, 11)
    assert cfg.model.name == model.settings["name"] == "mlms_lite"
    assert model.strides == [8, 8, 8]


def test_settings_survive_a_checkpoint(tmp_path):
    model = small(levels=(0, 2), head_chs=24, padding="same_tf").eval()
    torch.save({"settings": model.settings, "model": model.state_dict()}, tmp_path / "m.pt")
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    again = create_model(**saved["settings"]).eval()
    again.load_state_dict(saved["model"])
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(again(x)["out"], model(x)["out"])


# --- errors ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("over,word", [
    ({"head": "seperable"}, "Did you mean separable"), ({"head": "light", "head_chs": 64}, "light head has no hidden"),
    ({"head": None, "head_chs": 64}, "light head has no hidden"), ({"head_chs": 0}, "head_chs is 0"),
    ({"head_chs": 1.5}, "whole number"), ({"level_chs": -8}, "level_chs is -8"), ({"level_chs": True}, "whole number"),
    ({"branch_chs": 0}, "branch_chs is 0"),
    ({"branch_chs": 8, "wide": True}, "wide false"),
    ({"levels": ()}, "levels are"), ({"levels": (0, 1)}, "the deepest, 2"),
    ({"levels": (2, 0)}, "rising order"), ({"levels": (0, 0, 2)}, "rising order"), ({"levels": (0, 3)}, "positions among [0, 1, 2]"),
    ({"levels": 2}, "positions among"), ({"levels": ("a", 2)}, "positions among"), ({"fuse_stride": 32}, "have strides 8, 8, 8"),
    ({"output_stride": 16, "fuse_stride": 8, "levels": (1, 2)}, "have strides 16, 16"), ({"finest_stride": 2}, "finest_stride is 2"),
    ({"dilations": ()}, "whole numbers"),
    ({"dilations": 3}, "whole numbers"), ({"dilations": ("a",)}, "whole numbers"), ({"version": 3}, "version is 3"),
    ({"version": 3, "msf": False, "mlf": False}, "version is 3"),
    ({"head_ch": 64}, "Did you mean head_chs"),
])  # fmt: skip
def test_errors_name_the_mend(over, word):
    with pytest.raises(ConfigError) as e:
        small(**over)
    assert word in str(e.value) and "\n" not in str(e.value)


def test_config_refuses_wrong_types():
    for flag, value in (("--model.head", "round"), ("--model.levels", "two"), ("--model.level_chs", "many"), ("--model.head_chs", "1.5")):
        with pytest.raises(ConfigError):
            parse_config(None, [flag, value])
