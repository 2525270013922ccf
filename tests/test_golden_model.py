"Interactions, cells and names against numbers of the released implementation (float64, see golden/README.md)."

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from msinet.core import n_params
from msinet.necks import FBLNeck, ReIDNet
from msinet.ops import OPS, ChannelGate, CrossAttention, Exchange, Keep
from msinet.space import Cell, derived
from msinet.weights import CELL_NAMES, from_official

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "golden"))
import recipe  # noqa: E402

SHARED = HERE.parent.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder ../shared with the larger golden files")
LETTER = dict(none="N", exc="E", ag="G", cross_att="A")


def close(a, b, rel):
    "Asserts equality relative to the largest value; the tolerances are those of the golden README."
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= rel * b.abs().max().clamp_min(1e-12)


def rename(key):
    "Our name of a released parameter of a cell."
    import re

    for pat, new in CELL_NAMES:
        key = re.sub(pat, new, key)
    return key


@pytest.mark.parametrize("op", LETTER)
def test_interactions_give_the_released_outputs_and_gradients(op):
    g = {
        k.split(".", 1)[1]: torch.from_numpy(v)
        for k, v in np.load(HERE / "golden/a_ops.npz").items()
        if k.startswith(op + ".")
    }
    m = OPS[LETTER[op]](32).double()
    names = {
        "fc1.weight": "mlp.0.weight",
        "fc1.bias": "mlp.0.bias",
        "fc2.weight": "mlp.2.weight",
        "fc2.bias": "mlp.2.bias",
        "gamma": "gamma",
    }
    params = {names[k[6:]]: v for k, v in g.items() if k.startswith("param.")}
    m.load_state_dict(params, strict=True)
    x1, x2 = g["xa"].clone().requires_grad_(), g["xb"].clone().requires_grad_()
    y1, y2 = m(x1, x2)
    close(y1.detach(), g["out_a"], 1e-9)
    close(y2.detach(), g["out_b"], 1e-9)
    ((y1 * g["grad_out_a"]).sum() + (y2 * g["grad_out_b"]).sum()).backward()
    close(x1.grad, g["grad_xa"], 1e-6)
    close(x2.grad, g["grad_xb"], 1e-6)
    own = dict(m.named_parameters())
    for k, v in g.items():
        if k.startswith("grad_param."):
            close(own[names[k[11:]]].grad, v, 1e-6)


@needs_shared
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "name,c_in,c_out,im1,im2",
    [
        ("A", 48, 128, ChannelGate, CrossAttention),
        ("B", 128, 128, Exchange, Keep),
        ("C", 128, 128, CrossAttention, ChannelGate),
    ],
)
def test_cells_give_the_released_outputs_and_gradients(name, c_in, c_out, im1, im2, mode):
    z = np.load(SHARED / "golden/b_cells.npz")
    g = {
        k[len(f"{name}.{mode}.") :]: torch.from_numpy(np.asarray(z[k]))
        for k in z.files
        if k.startswith(f"{name}.{mode}.")
    }
    cell = Cell(c_in, c_out, im1, im2).double()
    released = [k[len("grad_param.") :] for k in g if k.startswith("grad_param.")] + [
        k[len("after.") :] for k in g if k.startswith("after.")
    ]
    sd = cell.state_dict()
    given = {}
    for k in released:
        given[rename(k)] = torch.as_tensor(recipe.param(k, tuple(sd[rename(k)].shape)))
    counters = {k: v for k, v in sd.items() if k.endswith("num_batches_tracked")}
    if mode == "eval":  # eval mode does not change running statistics, so the file has none: take them from the recipe
        back = {rename(k): k for k in released}
        for k in sd:
            if k.endswith(("running_mean", "running_var")) and k not in given:
                bn = k.rsplit(".", 1)[0]
                given[k] = torch.as_tensor(
                    recipe.param(back[f"{bn}.weight"].rsplit(".", 1)[0] + "." + k.rsplit(".", 1)[1], tuple(sd[k].shape))
                )
    cell.load_state_dict({**counters, **given}, strict=True)
    cell.train(mode == "train")
    x = g["x"].clone().requires_grad_()
    y = cell(x)
    close(y.detach(), g["out"], 1e-9 if mode == "eval" else 1e-7)
    (y * g["grad_out"]).sum().backward()
    scale = max(v.norm() for k, v in g.items() if k.startswith("grad_param."))
    assert (x.grad - g["grad_x"]).norm() <= 1e-6 * g["grad_x"].norm()
    own = dict(cell.named_parameters())
    for k, v in g.items():
        if k.startswith("grad_param."):
            assert (own[rename(k[11:])].grad - v).norm() <= 1e-6 * scale, k
    if mode == "train":
        after = cell.state_dict()
        for k, v in g.items():
            if k.startswith("after.") and "num_batches" not in k:
                close(after[rename(k[6:])], v, 1e-7)


@needs_shared
def test_released_names_load_strictly():
    keys = json.loads((SHARED / "design/official_keys.json").read_text())
    shapes = {**keys["msinet_x1_0"], **keys["msinet_x1_0_sam_extra"]}
    n_ids = shapes["classifier.weight"][0]
    sd = {k: torch.as_tensor(recipe.param(k, tuple(s))) for k, s in shapes.items()}
    backbone = derived()
    net = ReIDNet(backbone, FBLNeck(backbone.channels, n_ids)).double().eval()
    net.load_state_dict(from_official(sd), strict=True)
    assert n_params(net, skip=["classifier"]) == 2_328_035
    x = torch.as_tensor(recipe.tensor("x", (2, 3, 64, 32)))
    with torch.no_grad():
        f = net.embed(x)
    assert f.shape == (2, 768) and f.isfinite().all()
    assert torch.equal(net.backbone.stages[2].cell1.im2.gamma.detach(), sd["cells.6._op3.gamma"])
