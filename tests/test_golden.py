"""The networks here compute what the published code computes: every case of `shared/golden` (PSPNet's is in test_rivals_semseg)."""
import json
import zlib

import numpy as np
import pytest
import torch

from mlmsnet.networks.weights import from_original_config, load_original

CASES = [
    "mobilenetv3_large_1.0", "mobilenetv3_large_0.75", "mobilenetv3_small_1.0", "mobilenetv3_small_0.75",
    "mlms_large_headL", "mlms_large_headS", "mlms_small_headL", "mlms_small_headS",
    "mlmsv2_large_headL", "mlmsv2_large_headS", "mlmsv2_small_headL", "mlmsv2_small_headS",
    "mlms_small_msf1_mlf0", "mlms_small_msf0_mlf1", "mlms_small_msf0_mlf0", "mlms_large_075",
    "baseline_atrous00", "baseline_atrous11",
]  # fmt: skip


def by_rule(name, shape):
    """The weights of a golden case, from the rule in its README."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    x = rng.standard_normal(shape)
    if name.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif name.endswith("running_mean"):
        x = 0.1 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
    else:
        x = x * np.sqrt(1.5 / np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden"
    if not folder.is_dir():
        pytest.skip("shared/golden is not here")
    return json.loads((folder / "cases.json").read_text()), np.load(folder / "outputs.npz")


def test_no_case_is_left_out(golden):
    assert set(golden[0]) - set(CASES) == {"pspnet50"}


@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case):
    spec, expected = golden[0][case], golden[1][case]
    model = from_original_config(spec["config"])
    assert sum(p.numel() for p in model.parameters()) == spec["parameters"]
    assert len(model.state_dict()) == len(spec["keys"])
    load_original(model, {f"module.{k}": by_rule(k, shape) for k, shape in spec["keys"]})
    x = torch.from_numpy(np.random.RandomState(7).standard_normal((1, 3, *spec["input_hw"])).astype(np.float32))
    with torch.inference_mode():
        out = model.eval()(x)
    out = out if isinstance(out, torch.Tensor) else out["out"]
    assert list(out.shape) == spec["output_shape"]
    assert abs(out.mean().item() - spec["mean"]) < 1e-4 and abs(out.std().item() - spec["std"]) < 1e-4
    if out.ndim == 4:
        out = out[..., ::4, ::4]
    assert np.abs(out.numpy() - expected).max() < 1e-4
