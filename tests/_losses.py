"""What several tests of losses share: a random case with void, and the smallest network that a loss must teach."""
import torch

VOID = 255


def case(c=5, n=2, h=6, w=9, seed=0, size=2.0):
    """Logits in float64 and labels, a fifth of them void"""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, c, (n, h, w), generator=g)
    y[torch.rand(n, h, w, generator=g) < 0.2] = VOID
    return size * torch.randn(n, c, h, w, generator=g).double(), y


def share_learnt(loss, steps=150):
    """Train a two-layer network on one mask with a thin line and a small square; the share of the pixels that it then gets right"""
    y = torch.zeros(1, 16, 24, dtype=torch.long)
    y[:, 9:] = 1
    y[:, 2:12, 5] = 2
    y[:, 6:9, 14:17] = 2
    y[:, 0] = VOID
    torch.manual_seed(0)
    colour = torch.tensor([[.2, .5, .9], [.5, .5, .4], [.9, .2, .2], [0, 0, 0]])
    x = (colour[y.masked_fill(y == VOID, 3)].permute(0, 3, 1, 2) - 0.5) + 0.05 * torch.randn(1, 3, 16, 24)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 3, 1))
    opt = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        opt.zero_grad()
        loss(net(x), y).backward()
        opt.step()
    with torch.no_grad():
        return (net(x).argmax(1) == y)[y != VOID].float().mean().item()
