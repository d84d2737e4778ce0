"""MLMS-L on a CPU: ours against the plain eager NCHW network with the same weights.

    python benchmarks/networks.py [--quick] [--json FILE] [--threads N]

The peer is written out below as one would write the paper down: h-swish as x·relu6(x + 3)/6, linear layers in the
squeeze-and-excite, every batch norm by itself, `x.clone()` in the fusion, contiguous NCHW. Ours runs channels_last with native
kernels, and for inference with folded batch norms. Both get the same weights through `load_original`, and must agree to 1e-4
before anything is timed. They take turns; the ratio of the medians is the result.
"""
import argparse

import torch
import torch.nn.functional as F
from _bench import record, table, timed
from torch import nn

from mlmsnet.networks.layers import fuse_conv_bn, make_divisible
from mlmsnet.networks.mlmsnet import create_model
from mlmsnet.networks.weights import load_original


# --- the plain network -----------------------------------------------------------------------------------------------------
class PlainSwish(nn.Module):
    def forward(self, x):
        return x * (F.relu6(x + 3) / 6)


class PlainSE(nn.Module):
    def __init__(self, c):
        super().__init__()
        s = make_divisible(c // 4)
        self.fc = nn.Sequential(nn.Linear(c, s), nn.ReLU(inplace=True), nn.Linear(s, c))

    def forward(self, x):
        gate = F.relu6(self.fc(x.mean((2, 3))) + 3) / 6
        return x * gate[:, :, None, None]


class PlainBlock(nn.Module):
    def __init__(self, i, h, o, k, s, se, act):
        super().__init__()
        depthwise = [nn.Conv2d(h, h, k, s, k // 2, groups=h, bias=False), nn.BatchNorm2d(h)]
        gate = PlainSE(h) if se else nn.Identity()
        project = [nn.Conv2d(h, o, 1, bias=False), nn.BatchNorm2d(o)]
        if i == h:
            self.conv = nn.Sequential(*depthwise, act(), gate, *project)
        else:
            self.conv = nn.Sequential(nn.Conv2d(i, h, 1, bias=False), nn.BatchNorm2d(h), act(), *depthwise, gate, act(), *project)
        self.skip = s == 1 and i == o

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


def plain_layer(c, rows):
    blocks = []
    for k, t, o, se, hs, s in rows:
        blocks.append(PlainBlock(c, make_divisible(c * t), o, k, s, se, PlainSwish if hs else lambda: nn.ReLU(inplace=True)))
        c = o
    return nn.Sequential(*blocks)


class PlainConv(nn.Module):
    def __init__(self, i, o, k=1, d=1, conv="conv"):
        super().__init__()
        self.name = conv
        setattr(self, conv, nn.Conv2d(i, o, k, padding=k // 2 * d, dilation=d, bias=False))
        self.bn, self.relu = nn.BatchNorm2d(o), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(getattr(self, self.name)(x)))


class PlainMSF(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.blocks = nn.ModuleList(PlainConv(c, c, 3, d, "atrous_conv") for d in (6, 12, 18))
        self.atten, self.bn_atten = nn.Conv2d(4 * c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.fuse = PlainConv(4 * c, 2 * c)

    def forward(self, x):
        x = torch.cat([x] + [b(x) for b in self.blocks], 1)
        return self.fuse(x * torch.sigmoid(self.bn_atten(self.atten(F.adaptive_avg_pool2d(x, 1)))))


class PlainMLF(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.atten, self.bn_atten = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
        self.fuse = PlainConv(c, c)

    def forward(self, x):
        y = x.clone()
        y += x * torch.sigmoid(self.bn_atten(self.atten(F.adaptive_avg_pool2d(x, 1))))
        return self.fuse(y)


def plain_head(i, h, classes):
    filters = [nn.Conv2d(i, h, 3, padding=1, bias=False), nn.BatchNorm2d(h), nn.ReLU(inplace=True)]
    return nn.Sequential(*filters, nn.Dropout2d(0.1), nn.Conv2d(h, classes, 1))


class PlainMLMS(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer0 = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), PlainSwish()))
        self.layer1 = plain_layer(16, [(3, 1, 16, 0, 0, 1), (3, 4, 24, 0, 0, 2), (3, 3, 24, 0, 0, 1)])
        self.layer2 = plain_layer(24, [(5, 3, 40, 1, 0, 2), (5, 3, 40, 1, 0, 1), (5, 3, 40, 1, 0, 1)])
        self.layer3 = plain_layer(40, [(3, 6, 80, 0, 1, 1), (3, 2.5, 80, 0, 1, 1), (3, 2.3, 80, 0, 1, 1), (3, 2.3, 80, 0, 1, 1),
                                       (3, 6, 112, 1, 1, 1), (3, 6, 112, 1, 1, 1)])
        self.layer4 = plain_layer(112, [(5, 6, 160, 1, 1, 1)] * 3)
        self.msf0, self.msf1, self.msf2, self.mlf = PlainMSF(40), PlainMSF(112), PlainMSF(160), PlainMLF(624)
        self.cls, self.aux = plain_head(624, 256, classes), plain_head(112, 64, classes)

    def forward(self, x):
        size = x.shape[-2:]
        a = self.layer2(self.layer1(self.layer0(x)))
        b = self.layer3(a)
        c = self.layer4(b)
        y = self.cls(self.mlf(torch.cat([self.msf0(a), self.msf1(b), self.msf2(c)], 1)))
        out = {"out": F.interpolate(y, size=size, mode="bilinear", align_corners=True)}
        if self.training:
            out["aux"] = F.interpolate(self.aux(b), size=size, mode="bilinear", align_corners=True)
        return out


# --- the race --------------------------------------------------------------------------------------------------------------
def step(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    model.train()

    def run():
        out = model(x)
        loss = F.cross_entropy(out["out"], y) + 0.4 * F.cross_entropy(out["aux"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return run


def look(model, x):
    def run():
        with torch.inference_mode():
            return model(x)["out"]
    return run


def result(what, h, w, t):
    return {"what": what, "size": f"{h}x{w}", "plain_s": t["plain"], "ours_s": t["ours"], "ratio": t["plain"] / t["ours"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small images and few repeats: a check that it runs, not a result")
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    repeats = 3 if args.quick else 7
    last = torch.channels_last
    rows = []

    for h, w in [(129, 161)] if args.quick else [(361, 481), (713, 713)]:
        plain = PlainMLMS(19).eval()
        ours = load_original(create_model("mlms_l", 19), plain.state_dict()).eval()
        x = torch.randn(1, 3, h, w)
        nhwc = x.to(memory_format=last)
        fused = fuse_conv_bn(ours).to(memory_format=last)
        gap = (look(plain, x)() - look(fused, nhwc)()).abs().max().item()
        assert gap < 1e-4, f"the two networks differ by {gap}"
        t = timed({"plain": look(plain, x), "ours": look(fused, nhwc)}, repeats)
        rows.append(result("inference, batch 1", h, w, t))

    h, w, n = (97, 129, 2) if args.quick else (361, 481, 4)
    plain = PlainMLMS(19)
    ours = load_original(create_model("mlms_l", 19), plain.state_dict()).to(memory_format=last)
    x, y = torch.randn(n, 3, h, w), torch.randint(0, 19, (n, h, w))
    t = timed({"plain": step(plain, x, y), "ours": step(ours, x.to(memory_format=last), y)}, repeats if args.quick else 5)
    rows.append(result(f"training step, batch {n}", h, w, t))
    table(rows)
    if args.json:
        record(args.json, "networks", rows, quick=args.quick)


if __name__ == "__main__":
    main()
