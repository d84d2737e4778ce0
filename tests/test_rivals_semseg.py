"""PSPNet, PSANet and the ResNet under them: the published numbers, the definition of the attention, the contract, names, errors."""
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden import by_rule
from torch.autograd import gradcheck

from mlmsnet.core import CheckpointError, ConfigError
from mlmsnet.networks.backbones import available_backbones, create_backbone
from mlmsnet.networks.layers import fuse_conv_bn
from mlmsnet.networks.mlmsnet import available_models, create_model
from mlmsnet.networks.psanet import PSA, PointAttention, mask_size, unroll_masks
from mlmsnet.networks.pspnet import PyramidPooling
from mlmsnet.networks.resnet import DeepResNet, load_resnet, rename_resnet
from mlmsnet.networks.weights import from_original_config, load_original, rename_original, semseg_model
from mlmsnet.training.config import parse_config

LIGHT = {"pspnet": {"bins": (1, 2, 3)}, "psanet": {"mask_h": 5, "mask_w": 7}, "psanet compact": {"compact": True, "mask_h": 3, "mask_w": 4}}
PSA_KEYS = ("psa.reduce.0.weight", "psa.reduce.1", "psa.attention.0.weight", "psa.attention.1", "psa.attention.3.weight",
            "psa.reduce_p.0.weight", "psa.reduce_p.1", "psa.attention_p.0.weight", "psa.attention_p.1", "psa.attention_p.3.weight",
            "psa.proj.0.weight", "psa.proj.1")  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def light(name, **kw):
    """The network on a small backbone."""
    return create_model(name.split()[0], 4, **{"backbone": "resnet18_deep", "output_stride": 16, "hidden": 16, **LIGHT[name], **kw})


# --- the published PSPNet --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pspnet50(shared):
    folder = shared / "golden"
    if not folder.is_dir():
        pytest.skip("shared/golden is not here")
    spec = json.loads((folder / "cases.json").read_text())["pspnet50"]
    file = {f"module.{k}": by_rule(k, shape) for k, shape in spec["keys"]}
    model = load_original(from_original_config(spec["config"]), {"state_dict": file, "epoch": 100})
    return model.eval(), spec, file, np.load(folder / "outputs.npz")["pspnet50"]


def test_golden_pspnet50(pspnet50):
    model, spec, _, expected = pspnet50
    assert sum(p.numel() for p in model.parameters()) == spec["parameters"]
    assert len(model.state_dict()) == len(spec["keys"])
    x = torch.from_numpy(np.random.RandomState(7).standard_normal((1, 3, *spec["input_hw"])).astype(np.float32))
    with torch.inference_mode():
        single = model(x)["out"]
        exact = model.double()(x.double())["out"]  # the golden file is itself rounded to float32, at values up to 30
        model.float()
    assert list(single.shape) == spec["output_shape"]
    assert np.abs(exact[..., ::4, ::4].numpy() - expected).max() < 1e-4
    assert (single - exact).abs().max() < 1e-4
    assert abs(single.mean().item() - spec["mean"]) < 1e-4 and abs(single.std().item() - spec["std"]) < 1e-4


def test_a_semseg_checkpoint_is_loaded_strictly(pspnet50):
    model, _, file, _ = pspnet50
    before = model.head.classify.weight.clone()
    for change, said in (({"module.cls.4.bias": torch.zeros(21)}, r"cls\.4\.bias"),
                         ({"module.psa.reduce.0.weight": torch.zeros(1)}, "psa.reduce")):
        with pytest.raises(CheckpointError, match=said):
            load_original(model, {**file, **change})
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load_original(model, {k: v for k, v in file.items() if "ppm" not in k})
    assert torch.equal(model.head.classify.weight, before)


def test_initmodel_file_fits_the_backbone(pspnet50, tmp_path):
    model, _, file, _ = pspnet50
    path = tmp_path / "resnet50_v2.pth"
    names = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3", 7: "bn3"}
    init = {re.sub(r"^layer0\.(\d)", lambda m: names[int(m[1])], k.removeprefix("module.")): v for k, v in file.items() if ".layer" in k}
    torch.save({**init, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, path)
    backbone = create_backbone("resnet50_deep", weights=str(path))
    assert all(torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), model.backbone.state_dict().values(), strict=True))
    bare = load_original(DeepResNet(50), {k: v for k, v in file.items() if ".layer" in k})
    assert torch.equal(bare.stem[2].conv.weight, backbone.stem[2].conv.weight)


# --- the attention against its definition ----------------------------------------------------------------------------------
def by_definition(masks, size, kind):
    """Loops over cells and mask elements: weight[n, source, target]."""
    n, _, h, w = masks.shape
    out = masks.new_zeros(n, h * w, h * w)
    for y in range(h):
        for x in range(w):
            for a in range(size[0]):
                for b in range(size[1]):
                    p, q = y + a - (size[0] - 1) // 2, x + b - (size[1] - 1) // 2
                    if 0 <= p < h and 0 <= q < w:
                        here, there = y * w + x, p * w + q
                        source, target = (there, here) if kind == "collect" else (here, there)
                        out[:, source, target] = masks[:, a * size[1] + b, y, x]
    return out


SIZES = [(7, 9), (3, 3), (4, 6), (2, 5), (11, 13), (1, 1), (3, 17)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("hw", [(4, 5), (1, 6), (5, 1)], ids=str)
def test_masks_lie_where_the_definition_puts_them(size, hw):
    masks = torch.randn(2, size[0] * size[1], *hw)
    pairs = unroll_masks(masks, size)
    assert torch.equal(pairs, by_definition(masks, size, "distribute"))
    assert torch.equal(pairs.transpose(1, 2), by_definition(masks, size, "collect"))
    assert torch.equal(unroll_masks(masks.to(memory_format=torch.channels_last), size), pairs)


def reference(psa, x):
    """PSA step by step, with the matrix source × target made by loops (compact: as the channels say)."""
    h, w = psa.mask_size if psa.compact else [(s - 1) // psa.shrink_factor + 1 for s in x.shape[-2:]]
    mixed = []
    for branch in psa.branches:
        small = F.interpolate(branch.reduce(x), (h, w), mode="bilinear", align_corners=True)
        y = branch.mask(branch.inner(small))
        if psa.compact:  # channel j of cell i: collect takes from j, distribute gives to j
            weight = y.flatten(2) if branch.collect else y.flatten(2).transpose(1, 2)
        else:
            weight = by_definition(y, branch.mask_size, "collect" if branch.collect else "distribute")
        weight = weight.softmax(1) if branch.softmax else weight
        mixed.append(torch.stack([(small.flatten(2)[:, :, :, None] * weight[:, None]).sum(2)]).squeeze(0).view_as(small) / branch.norm)
    mixed = psa.proj(torch.cat(mixed, 1))
    return torch.cat([x, F.interpolate(mixed, x.shape[-2:], mode="bilinear", align_corners=True)], 1)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("compact,mask", [(False, (5, 7)), (False, (4, 3)), (False, (9, 11)), (True, (4, 5)), (True, (3, 6))])
@pytest.mark.parametrize("softmax,norm", [(True, 1.0), (False, None)])
def test_attention_is_its_definition(kind, compact, mask, softmax, norm):
    psa = PSA(8, 4, kind, compact, 2, *mask, norm, softmax).double().eval()
    for p in psa.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64, requires_grad=True)
    out, expected, seed = psa(x), reference(psa, x), torch.randn(2, 16, 7, 9, dtype=torch.float64)
    assert (out - expected).abs().max() < 1e-10
    wanted = [x, *psa.parameters()]
    for a, b in zip(torch.autograd.grad((out * seed).sum(), wanted), torch.autograd.grad((expected * seed).sum(), wanted), strict=True):
        assert (a - b).abs().max() < 1e-10
    assert (psa.float()(x.detach().float()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("collect,compact,mask", [
    (True, False, (3, 3)), (False, False, (2, 5)), (True, True, (2, 3)), (False, True, (2, 3)),
])  # fmt: skip
def test_gradients_by_differences(collect, compact, mask):
    branch = PointAttention(3, 2, mask, collect, compact).double().eval()
    x = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: branch(x, (2, 3)), x)
    masks = torch.randn(1, mask[0] * mask[1], 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda m: unroll_masks(m, mask), masks)


def test_collect_sums_to_one_where_it_arrives_and_distribute_too():
    for collect in (True, False):
        pairs = PointAttention(4, 4, (3, 5), collect).pairs(torch.randn(2, 4, 5, 6))
        assert (pairs.sum(2 if collect else 1) - 1).abs().max() < 1e-5  # pairs: here × there; the target is `here` of collect


def test_pyramid_is_its_definition():
    ppm, x = PyramidPooling(10, (1, 3)).eval(), torch.randn(2, 10, 7, 9)
    thirds = torch.stack([torch.stack([x[..., r, c].mean((2, 3)) for c in (slice(0, 3), slice(3, 6), slice(6, 9))], -1)
                          for r in (slice(0, 3), slice(2, 5), slice(4, 7))], -2)  # regions share rows where the bins do not divide
    pooled = zip(ppm.branches, (x.mean((2, 3), keepdim=True), thirds), strict=True)
    spread = [F.interpolate(f(p), (7, 9), mode="bilinear", align_corners=True) for f, p in pooled]
    assert (ppm(x) - torch.cat([x, *spread], 1)).abs().max() < 1e-5


# --- the contract ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LIGHT)
def test_one_image_trains_at_any_size(name):
    model = light(name).train()
    for hw in [(33, 47), (32, 32), (97, 65)]:
        out = model(torch.randn(1, 3, *hw))
        assert {k: v.shape for k, v in out.items()} == dict.fromkeys(("out", "aux"), (1, 4, *hw))
    sum(o.square().mean() for o in out.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval()(torch.randn(1, 3, 40, 40))) == {"out"}
    assert set(light(name, aux=False).train()(torch.randn(2, 3, 40, 40))) == {"out"}
    ids = [id(p) for p in model.backbone_parameters() + model.head_parameters()]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", LIGHT)
def test_folding_layout_batch_and_settings_make_no_difference(name):
    model, x = light(name).eval(), torch.randn(2, 3, 41, 56)
    again = create_model(**model.settings).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(x)["out"]
        assert torch.equal(again(x)["out"], expected)
        for net in (model, fuse_conv_bn(model)):
            assert (net(x[1:])["out"] - expected[1:]).abs().max() < 1e-4
        x = x.to(memory_format=torch.channels_last)
        assert (model.to(memory_format=torch.channels_last)(x)["out"] - expected).abs().max() < 1e-4
    assert (model(x)["out"] - expected).abs().max() < 1e-5  # with gradients


def test_factors_switch_parts_off():
    assert create_model("pspnet", 4, backbone="resnet18_deep", ppm=False).ppm is None
    assert create_model("psanet", 4, backbone="resnet18_deep", psa=False).psa is None


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_backbone_declares_what_it_gives(stride):
    for hw in [(33, 47), (64, 96)]:
        net = create_backbone("resnet18_deep", output_stride=stride).eval()
        with torch.no_grad():
            maps = net.features(torch.randn(1, 3, *hw))
        assert [m.shape[1:] for m in maps] == [(c, -(-hw[0] // s), -(-hw[1] // s)) for c, s in zip(net.channels, net.strides)]
    assert net.strides == [8, min(16, stride), stride]
    dilations = [{m.dilation[0] for m in stage.modules() if getattr(m, "kernel_size", None) == (3, 3)} for stage in net.stages]
    assert dilations == {8: [{1}, {1}, {2}, {4}], 16: [{1}, {1}, {1}, {2}], 32: [{1}] * 4}[stride]


def test_everything_is_found_by_name():
    assert {"pspnet", "pspnet101", "pspnet_mobilenet", "psanet", "psanet101", "psanet_mobilenet"} <= set(available_models())
    assert {f"resnet{n}_deep" for n in (18, 34, 50, 101, 152)} <= set(available_backbones())


# --- names -----------------------------------------------------------------------------------------------------------------
def with_norms(keys):
    """Each norm stands for its five tensors."""
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [name for k in keys for name in ([k] if k.endswith("weight") else [f"{k}.{leaf}" for leaf in leaves])]


@pytest.mark.parametrize("kind,compact", [(0, False), (1, True), (2, False)])
def test_psanet_checkpoint_goes_to_its_places(kind, compact, monkeypatch):
    monkeypatch.setattr("mlmsnet.networks.resnet.RESNET_BLOCKS", {50: (1, 1, 1, 1)})  # the names of the other blocks differ by a number
    section = {"arch": "psa", "classes": 4, "psa_type": kind, "compact": int(compact), "train_h": 65, "train_w": 81}
    model = from_original_config(section)
    assert (model.psa.mask_size, model.psa.compact) == (((5, 6) if compact else (9, 11)), compact)
    keys = with_norms([k for k in PSA_KEYS if kind == 2 or "_p." not in k])
    keys += [f"{h}.{i}" for h in ("cls", "aux") for i in ("0.weight", "4.weight", "4.bias")] + with_norms(["cls.1", "aux.1"])
    keys += [f"layer0.{i}.weight" for i in (0, 3, 6)] + with_norms([f"layer0.{i}" for i in (1, 4, 7)])
    for i in range(1, 5):
        keys += [f"layer{i}.0.{c}.weight" for c in ("conv1", "conv2", "conv3", "downsample.0")]
        keys += with_norms([f"layer{i}.0.{c}" for c in ("bn1", "bn2", "bn3", "downsample.1")])
    own = model.state_dict()
    ours = {k: rename_original(k, dict.fromkeys(keys)) for k in keys}
    assert sorted(ours.values()) == sorted(own)
    file = {f"module.{k}": torch.randn_like(own[n]) if own[n].is_floating_point() else own[n] for k, n in ours.items()}
    load_original(model, {"state_dict": file})
    if kind == 2:
        assert torch.equal(model.psa.branches[1].mask.weight, file["module.psa.attention_p.3.weight"]) and not model.psa.branches[1].collect
    with pytest.raises(CheckpointError, match=r"psa\.attention\.3\.weight"):
        load_original(from_original_config({**section, "train_h": 97}), file)


def test_timm_names_of_the_same_network():
    state = DeepResNet(18).state_dict()
    file = {}
    for name, tensor in state.items():
        if name.startswith("stem"):
            i, kind, leaf = int(name[5]), *name.split(".")[2:]
            key = f"bn1.{leaf}" if (i, kind) == (2, "norm") else f"conv1.{3 * i + (kind == 'norm')}.{leaf}"
        else:
            _, s, b, part, kind, leaf = name.split(".")
            part = f"downsample.{int(kind == 'norm')}" if part == "shortcut" else part if kind == "conv" else part.replace("conv", "bn")
            key = f"layer{int(s) + 1}.{b}.{part}.{leaf}"
        file[key] = torch.randn_like(tensor) if tensor.is_floating_point() else tensor
    net = load_resnet(DeepResNet(18), file)
    assert torch.equal(net.stem[2].norm.weight, file["bn1.weight"]) and torch.equal(net.stem[0].norm.bias, file["conv1.1.bias"])
    assert rename_resnet("layer1.0.conv3.1.weight", {}) is None


def test_timm_resnet50s_computes_the_same():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model("resnet50s", pretrained=False, features_only=True).eval()
    ours = load_resnet(DeepResNet(50, 32), {k: v for k, v in theirs.state_dict().items()}).eval()
    with torch.no_grad():
        for a, b in zip(ours(x := torch.randn(1, 3, 64, 64)), theirs(x)[-3:], strict=True):
            assert (a - b).abs().max() < 1e-4 * b.abs().max()


# --- configs and errors ----------------------------------------------------------------------------------------------------
TRAIN = dict(
    arch="psp", layers=50, sync_bn=True, train_h=713, train_w=713, scale_min=0.5, scale_max=2.0, rotate_min=-10, rotate_max=10,
    zoom_factor=8, ignore_label=255, aux_weight=0.4, train_gpu=[0, 1], workers=16, batch_size=16, batch_size_val=1, base_lr=0.01,
    epochs=200, start_epoch=0, power=0.9, momentum=0.9, weight_decay=1e-4, manual_seed=None, print_freq=10, save_freq=1,
    save_path="exp", weight=None, resume=None, evaluate=False)  # fmt: skip
PSA_TRAIN = {**TRAIN, "arch": "psa", "layers": 101, "train_h": 705, "train_w": 705, "psa_type": 2, "compact": 0, "shrink_factor": 2,
             "mask_h": None, "mask_w": None, "normalization_factor": 1.0, "psa_softmax": 1}  # fmt: skip
SEMSEG = {
    "DATA": dict(data_root="ds", train_list="ds/train.txt", val_list="ds/val.txt", classes=19),
    "TRAIN": TRAIN,
    "TEST": dict(test_list="ds/val.txt", split="val", base_size=2048, test_h=713, test_w=713, scales=[1.0], has_prediction=False,
                 index_start=0, index_step=0, test_gpu=[0], model_path="x.pth", save_folder="y", colors_path="c", names_path="n"),
    "Distributed": dict(dist_url="tcp://127.0.0.1:6789", dist_backend="nccl", multiprocessing_distributed=True, world_size=1, rank=0,
                        use_apex=True, opt_level="O0", keep_batchnorm_fp32=None, loss_scale=None),
}  # fmt: skip


def test_semseg_yaml_is_read():
    cfg = parse_config(SEMSEG)
    assert (cfg.model.name, cfg.model.params) == ("pspnet", {"bins": [1, 2, 3, 6]})
    assert (cfg.loss.name, cfg.loss.aux_weight) == ("cross_entropy", 0.4)
    assert (cfg.augment.crop, cfg.eval.mode, cfg.train.batch_size, cfg.data.name) == ((713, 713), "slide", 16, "cityscapes")
    cfg = parse_config({**SEMSEG, "TRAIN": PSA_TRAIN})
    assert cfg.model.name == "psanet101" and (cfg.model.params["mask_h"], cfg.model.params["mask_w"]) == (89, 89) == mask_size((705, 705))
    assert parse_config({**SEMSEG, "TRAIN": {**TRAIN, "layers": 152}}).model.backbone == "resnet152_deep"
    for train, said in (({**TRAIN, "layers": 18}, "50, 101 or 152"), ({**PSA_TRAIN, "mask_h": 3}, "belong together"),
                        ({**TRAIN, "layer": 50}, "layers")):
        with pytest.raises(ConfigError, match=said) as e:
            parse_config({**SEMSEG, "TRAIN": train})
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("call,said", [
    (lambda: light("pspnet", bins=(0, 2)), "whole numbers"), (lambda: light("pspnet", bins=3), "bins are 3"),
    (lambda: light("pspnet", psa_type=1), "psa_type"), (lambda: light("psanet", psa_type=3), "distribute"),
    (lambda: light("psanet", mask_h=0), "mask_h"), (lambda: light("psanet", shrink_factor=1.5), "shrink_factor"),
    (lambda: light("psanet", normalization_factor=0), "divided"), (lambda: light("pspnet", width_mult=0.5), "width_mult cannot"),
    (lambda: light("pspnet", weights="imagenet"), "PATH"), (lambda: create_backbone("resnet50_deep", output_stride=4), "8, 16 or 32"),
    (lambda: DeepResNet(20), "not 20"), (lambda: create_backbone("resnet50_dep"), "resnet50_deep"),
    (lambda: semseg_model({"arch": "psa", "layers": 50}), "train_h"), (lambda: from_original_config({"arch": "psp"}), "classes"),
    (lambda: unroll_masks(torch.zeros(1, 8, 2, 2), (3, 3)), "must be 9"),
])  # fmt: skip
def test_errors_say_what_to_do(call, said):
    with pytest.raises(ConfigError, match=said) as e:
        call()
    assert "\n" not in str(e.value)
