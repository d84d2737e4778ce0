"""Two processes, each with half of a batch, must hold the loss of the whole batch, and gradients whose mean is its gradient."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mlmsnet.losses.contract import available_losses, create_loss, loss_info, share_statistics

PROCESSES = 2
VOID = 255
# Losses that must see all pixels at once (they select or sort them): each process does so among its own.
LOCAL = {"ohem": "selects among the pixels of a process", "topk": "selects among the pixels of a process",
         "dice_topk": "its top-k part selects among the pixels of a process", "lovasz_softmax": "sorts the pixels of a process"}


def batch():
    """Four images with very different numbers of valid pixels and classes"""
    g = torch.Generator().manual_seed(3)
    y = torch.randint(0, 4, (4, 12, 10), generator=g)
    y[0, :9] = VOID
    y[1, :, 5:] = VOID
    y[2] = y[2].clamp(max=1)
    y[3, 0] = VOID
    return 2 * torch.randn(4, 4, 12, 10, generator=g, dtype=torch.float64), y


def variants(name):
    """The ways in which a loss is tried: as it is, and per image where it can be"""
    if name not in LOCAL:
        yield {}
    if "per_image" in loss_info(name).defaults and name != "dice_topk":
        yield {"per_image": True}


def value_and_grad(loss, z, y):
    z = z.clone().requires_grad_()
    value = loss(z, y)
    return value.item(), torch.autograd.grad(value, z)[0]


def worker(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    z, y = batch()
    part = slice(rank * 2, rank * 2 + 2)
    found = {}
    for name in available_losses():
        for kw in variants(name):
            whole, slope = value_and_grad(create_loss(name, **kw), z, y)
            value, grad = value_and_grad(share_statistics(create_loss(name, **kw)), z[part], y[part])
            error = (grad / PROCESSES - slope[part]).abs().max().item() / max(slope.abs().max().item(), 1e-12)
            alone, _ = value_and_grad(share_statistics(share_statistics(create_loss(name, **kw)), False), z[part], y[part])
            found[f"{name} {kw}"] = {"whole": whole, "shared": value, "alone": alone, "grad_error": error}
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = tmp_path_factory.mktemp("shards")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code = "import sys, test_losses_distributed as t; t.worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(r), str(port), str(out)], env=env) for r in range(PROCESSES)]
    assert all(p.wait(240) == 0 for p in processes)
    return [json.loads((out / f"{r}.json").read_text()) for r in range(PROCESSES)]


@pytest.mark.parametrize("name", available_losses())
def test_two_shards_equal_one_batch(found, name):
    if not list(variants(name)):
        pytest.skip(f"{name}: {LOCAL[name]}")
    for kw in variants(name):
        for rank in range(PROCESSES):
            r = found[rank][f"{name} {kw}"]
            assert r["shared"] == pytest.approx(r["whole"], rel=1e-9, abs=1e-12), f"{name} {kw}: value on process {rank}"
            assert r["grad_error"] < 1e-8, f"{name} {kw}: gradient on process {rank}"


def test_sharing_is_not_a_formality(found):
    """Without it, each process has another loss: the mean of two Dice losses is not the Dice loss of the batch."""
    for name in ("cross_entropy {}", "dice {}", "dice_ce {}"):
        a, b = (found[r][name] for r in range(PROCESSES))
        assert abs((a["alone"] + b["alone"]) / 2 - a["whole"]) > 1e-4, name
