"The baselines wherever a backbone is used, and their weights."

import ast
import copy
import sys
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import msinet.backbones
from msinet.backbones import BACKBONES, FCNeck, ScaleBlock, cdnet, network, osnet, resnet50, timm_tools, vit
from msinet.core import Hooks, macs, n_params
from msinet.errors import InputError
from msinet.figures.cam import cam
from msinet.necks import BNNeck, FBLNeck, ReIDNet
from msinet.sam import SAM
from msinet.training.train import TrainStep
from msinet.weights import from_osnet, from_timm, load_initial_weights, load_renamed

tiny_vit = partial(vit, "vit_tiny_patch16_224", (64, 32))
SMALL = dict(resnet50=resnet50, osnet=osnet, cdnet=cdnet, vit=partial(tiny_vit, drop_path=0.0))


@cache
def first(name):
    return SMALL[name]()


small = pytest.mark.parametrize("make", [lambda name=name: copy.deepcopy(first(name)) for name in SMALL], ids=SMALL)


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(n)


def images():
    return torch.randn(4, 3, 64, 32), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    "name, params, shapes",
    [
        ("msinet", 1_949_539, [(256, 32, 16), (384, 16, 8), (512, 16, 8)]),
        ("osnet", 1_905_828, [(256, 32, 16), (384, 16, 8), (512, 16, 8)]),
        ("cdnet", 1_747_448, [(256, 32, 16), (384, 16, 8), (512, 16, 8)]),
        ("resnet50", 23_508_032, [(256, 64, 32), (512, 32, 16), (1024, 16, 8), (2048, 16, 8)]),
        ("resnet50_x0_125", 384_736, [(32, 64, 32), (64, 32, 16), (128, 16, 8), (256, 16, 8)]),
        ("deit_s", 21_639_552, [(384, 16, 8)] * 3),
        ("deit_b", 85_746_432, [(768, 16, 8)] * 3),
        ("vit_b", 85_746_432, [(768, 16, 8)] * 3),
    ],
)
def test_counts_and_maps_at_256x128(name, params, shapes):
    assert name in BACKBONES and len(BACKBONES) == 8
    with torch.device("meta"):
        net = BACKBONES[name]()
        maps = net(torch.zeros(2, 3, 256, 128))
    assert n_params(net) == params
    assert [tuple(m.shape[1:]) for m in maps] == shapes and net.channels == tuple(s[0] for s in shapes)


def test_multiply_accumulates():
    with torch.device("meta"):
        assert macs(cdnet(), (256, 128)) == 948_771_840
        assert macs(ReIDNet(osnet(), FCNeck((512,))), (256, 128)) == 978_875_392
        assert macs(resnet50(), (256, 128)) == 4_053_270_528


@small
def test_a_training_step_reaches_every_parameter(make):
    x, y = images()
    backbone = make()
    net, sam = ReIDNet(backbone, FBLNeck(backbone.channels, 2)), SAM(backbone.channels[-1])
    whole = nn.ModuleList([net, sam]).train()
    ps = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in ps.items()}
    step = TrainStep(net, torch.optim.SGD(ps.values(), 0.1), sam)
    out = step((x, y))
    assert all(torch.isfinite(v) for v in out.values()) and out["sa"] > 0
    assert [n for n, p in ps.items() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()] == []
    assert sum(torch.equal(before[n], p) for n, p in ps.items()) == 0


@small
def test_a_small_step_along_the_alignment_loss_lowers_it(make):
    x, y = images()
    backbone = make().eval()
    sam = SAM(backbone.channels[-1])
    ps = list(backbone.parameters())
    loss = sam(backbone(x)[-1], y)
    grads = torch.autograd.grad(loss, ps, allow_unused=True)
    size = sum(g.square().sum() for g in grads if g is not None).sqrt()
    assert size > 0
    with torch.no_grad():
        for p, g in zip(ps, grads):
            if g is not None:
                p -= 1e-3 * g / size
        assert sam(backbone(x)[-1], y) < loss


@small
def test_embeds_alone_as_in_a_batch_and_after_bn(make):
    x, _ = images()
    backbone = make()
    for neck, d in (
        (BNNeck, backbone.channels[-1]),
        (FBLNeck, backbone.channels[-1] + 2 * (backbone.channels[-2] // 3)),
    ):
        for after_bn in (False, True):
            net = ReIDNet(backbone, neck(backbone.channels), after_bn).eval()
            with torch.no_grad():
                f = net.embed(x)
                assert f.shape == (4, d)
                assert_close(net.embed(x[1:2]), f[1:2], rtol=1e-3, atol=1e-4)


@small
def test_cells_give_maps_to_hooks_and_to_gradcam(make):
    x, _ = images()
    backbone = make().eval()
    net = ReIDNet(backbone, BNNeck(backbone.channels)).eval()
    with Hooks(net.backbone.cells, lambda i, m, inp, out: out.shape) as h, torch.no_grad():
        q = net.embed(x[:1])[0]
    assert h.out and all(len(s) == 4 for s in h.out.values())
    heat = cam(net, x[1:2], q, backbone.cells[1 if backbone.channels[0] > 192 else -1])
    assert heat.shape == (1, 64, 32) and 0 <= heat.min() <= heat.max() <= 1 and heat.max() > 0.5


@small
def test_a_copy_and_its_state_dict_are_complete(make):
    x, _ = images()
    net = make().eval()
    twin = copy.deepcopy(net)
    inside = {id(m) for m in twin.modules()}
    assert all(id(c) in inside for c in twin.cells)
    fresh = make().eval()
    for t in fresh.state_dict().values():
        t.zero_()
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        for a, b, c in zip(net(x), twin(x), fresh(x)):
            assert_close(a, b)
            assert_close(a, c)


def test_block_with_one_stream_is_a_plain_residual_block():
    block, x = ScaleBlock(16, 16, (2,)).eval(), torch.randn(2, 16, 6, 4)
    with torch.no_grad():
        inner = block.streams[0](block.open(x))
        gate = block.gate.mlp(inner.mean((2, 3), keepdim=True)).sigmoid()
        assert_close(block(x), (block.close(gate * inner) + x).relu())


def test_resnet50_with_stride_2_is_timms_and_stride_1_has_its_weights():
    timm, x = timm_tools(), torch.randn(1, 3, 64, 32)
    theirs = timm.create_model("resnet50", num_classes=0).eval()
    a, b = resnet50(last_stride=2).eval(), resnet50().eval()
    a.load_state_dict(theirs.state_dict())
    b.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert_close(a(x)[-1], theirs.forward_features(x))
        assert_close(a(x)[-2], b(x)[-2])
        assert b(x)[-1].shape[-2:] == (4, 2) and a(x)[-1].shape[-2:] == (2, 1)


def test_vit_is_timms_at_its_own_size_of_patches():
    timm, x = timm_tools(), torch.randn(1, 3, 64, 32)
    net = tiny_vit().eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(64, 32)).eval()
    theirs.load_state_dict(net.net.state_dict())
    with torch.no_grad():
        last, tokens = (
            net(x)[-1],
            theirs.forward_features(x * net.scale + net.shift),
        )  # in the normalisation of its weights
    assert_close(last.flatten(2).mT, tokens[:, 1:])
    whole = tiny_vit(cls=True).eval()
    whole.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert_close(whole(x)[-1][:, :, 0, 0], tokens[:, 0])
    assert whole.channels == (192,) * 4


def test_distilled_deit_loses_its_second_token_and_nothing_else():
    timm = timm_tools()
    made = {}

    def keep(*a, create=timm.create_model, **kw):
        net = create(*a, **kw)
        made["pos"] = net.pos_embed.detach().clone()
        return net

    with pytest.MonkeyPatch.context() as m:
        m.setattr(timm, "create_model", keep)
        net = vit("deit_tiny_distilled_patch16_224", (224, 224)).eval()
    assert made["pos"].shape[1] == 2 + 196
    assert_close(net.net.pos_embed.detach(), torch.cat([made["pos"][:, :1], made["pos"][:, 2:]], 1))
    assert not [n for n, _ in net.named_parameters() if "dist" in n]
    with torch.no_grad():
        assert [m.shape for m in net(torch.randn(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 3


def test_position_embeddings_are_resampled_in_order_and_the_class_token_keeps_its_own():
    timm = timm_tools()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    rows = torch.arange(14.0)[:, None, None].expand(14, 14, 192)
    with torch.no_grad():
        theirs.pos_embed.copy_(torch.cat([torch.full((1, 192), -9.0), rows.reshape(196, 192)])[None])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(timm, "create_model", lambda *a, **kw: theirs)
        pos = vit("vit_tiny_patch16_224", (256, 128), 12).net.pos_embed.detach()[0]
    assert_close(pos[0], torch.full((192,), -9.0))
    grid = pos[1:].view(21, 10, 192)
    assert (grid.diff(dim=0) > 0).all() and grid.diff(dim=1).abs().max() < 1e-4


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: tiny_vit()(torch.zeros(1, 3, 32, 64)), "32×64"),
        (lambda: vit("resnet50"), "resnet50"),
        (lambda: vit("vit_no_such_thing"), "vit_no_such_thing"),
    ],
)
def test_mistakes_are_named_in_one_line(call, says):
    with pytest.raises(InputError, match=says) as e:
        call()
    assert "\n" not in str(e.value) and "expected" in str(e.value)


def test_timm_is_only_imported_when_needed(monkeypatch):
    tree = ast.parse(open(msinet.backbones.__file__, encoding="utf-8").read())
    assert not [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and "timm" in ast.unparse(n)]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        resnet50()


def torchreid_like(n_ids=10):
    "Our own OSNet under the released names, worked out by asking each released name where it goes."
    conv = lambda n: [f"{n}.conv.weight", *bn(f"{n}.bn")]
    bn = lambda n: [f"{n}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    light = lambda n: [f"{n}.conv1.weight", f"{n}.conv2.weight", *bn(f"{n}.bn")]
    names = [
        *conv("conv1"),
        *conv("conv5"),
        *conv("conv2.2.0"),
        *conv("conv3.2.0"),
        "fc.0.weight",
        "fc.0.bias",
        *bn("fc.1"),
        "classifier.weight",
        "classifier.bias",
    ]
    for n in (f"conv{s}.{i}" for s in (2, 3, 4) for i in (0, 1)):
        lights = ["conv2a", *(f"conv2{s}.{i}" for s, t in zip("bcd", (2, 3, 4)) for i in range(t))]
        names += [*conv(f"{n}.conv1"), *conv(f"{n}.conv3"), *(k for s in lights for k in light(f"{n}.{s}"))]
        names += [f"{n}.gate.{f}.{k}" for f in ("fc1", "fc2") for k in ("weight", "bias")] + (
            conv(f"{n}.downsample") if n.endswith("0") else []
        )
    ours = ReIDNet(osnet(), FCNeck((512,), n_ids)).state_dict()
    goes = {n: next(iter(from_osnet({n: 0}))) for n in names}
    assert sorted(goes.values()) == sorted(ours)
    return {n: ours[g].clone() for n, g in goes.items()}


def test_released_osnet_loads_completely():
    sd = torchreid_like()
    assert (
        sum(v.numel() for k, v in sd.items() if "running" not in k and "tracked" not in k and "classifier" not in k)
        == 2_169_508
    )
    net = ReIDNet(osnet(), FCNeck((512,), 10))
    for wrapped in (sd, dict(state_dict=sd), {f"module.{k}": v for k, v in sd.items()}):
        assert load_renamed(net, from_osnet(wrapped)) == []
    assert_close(
        net.backbone.stages[1].blocks[1].streams[3][2].each.weight.detach(), sd["conv3.1.conv2d.2.conv2.weight"]
    )
    assert_close(net.backbone.stages[0].blocks[0].shortcut.bn.weight.detach(), sd["conv2.0.downsample.bn.weight"])
    old = {k: v for k, v in sd.items() if "num_batches" not in k}
    assert load_renamed(net, from_osnet(old)) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sd: sd.pop("backbone.stages.2.end.conv.weight"),
        lambda sd: sd.update({"backbone.stages.2.end.conv.weight": torch.zeros(512, 256, 1, 1)}),
        lambda sd: sd.update({"backbone.stages.3.end.conv.weight": torch.zeros(1)}),
    ],
    ids=["missing", "shape", "extra"],
)
def test_a_backbone_that_does_not_fit_is_refused_and_nothing_changes(spoil):
    sd = {k: v + 1 for k, v in from_osnet(torchreid_like()).items()}
    spoil(sd)
    net = ReIDNet(osnet(), FCNeck((512,), 10))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match="1 tensors.*stages.[23].end.conv.weight"):
        load_renamed(net, sd)
    assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["conv2.0.IN.weight", "layer1.0.conv1.weight", "conv6.0.conv.weight", "conv4.2.0.conv.weight"]
)
def test_names_that_are_not_osnets_are_refused(name):
    with pytest.raises(InputError, match=name):
        from_osnet({name: torch.zeros(1)})


@pytest.mark.parametrize(
    "name,timms",
    [("resnet50", "resnet50"), ("deit_s", "deit_small_distilled_patch16_224"), ("deit_s", "deit_small_patch16_224")],
)
def test_files_of_timm_load_strictly(name, timms, tmp_path):
    "All but the classifier of a file of timm is used; missing, superfluous and other tensors are refused by name."
    sd = timm_tools().create_model(timms, num_classes=3).state_dict()
    net = network(name, "", None, 3, (64, 32), 2)
    key = next(k for k in sd if k.endswith("bias"))
    neck = {k: v.clone() for k, v in net.state_dict().items() if k.startswith("neck.")}

    def go(sd):
        torch.save(sd, tmp_path / "w.pth")
        return load_initial_weights(net, str(tmp_path / "w.pth"))

    for bad in (
        {k: v for k, v in sd.items() if k != key},
        sd | {key: torch.zeros(1)},
        sd | {f"{key}s": torch.zeros(1)},
        torchreid_like(),
        dict(sd, **{key: 3}),
    ):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(InputError, match="does not fit"):
            go(bad)
        assert_close(net.state_dict(), before, rtol=0, atol=0)
    left = go(sd)
    assert left and all(k.startswith(("fc.", "head")) or k == "dist_token" for k in left)
    own = net.state_dict()
    assert_close(own[("backbone.net." if name == "deit_s" else "backbone.") + key], sd[key])
    assert all(torch.equal(v, own[k]) for k, v in neck.items())
    assert len(from_timm(sd, net)) == len([k for k in own if k.startswith("backbone.")])
