"Folded networks give the same embeddings; so do their files."

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from msinet.core import set_seed
from msinet.deploy.export import ExportConfig, fold, run_export, session, to_onnx
from msinet.errors import InputError
from msinet.necks import BNNeck, FBLNeck, ReIDNet
from msinet.ops import CrossAttention
from msinet.space import FUSES, derived, supernet


def make(neck=FBLNeck, after_bn=False, backbone=None, gamma=0.0):
    set_seed(3)
    backbone = backbone or derived('NEGAAGENGAEA', (8, 16, 24, 32))
    net = ReIDNet(backbone, neck(backbone.channels, 5), after_bn)
    for m in net.modules():
        if isinstance(m, CrossAttention):
            nn.init.constant_(m.gamma, gamma)
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            m.momentum = None
    net.train()(torch.randn(8, 3, 64, 32))
    return net.eval()


def close(got, net, x):
    "Within 1e-5, or four times the rounding of the network itself: these random statistics magnify rounding."
    want = copy.deepcopy(net).double().embed(x.double())
    off = lambda e: ((e - want).abs().max() / want.abs().max()).item()
    return off(got) <= max(1e-5, 4 * off(net.embed(x)))


@torch.no_grad()
def test_table_1_at_its_size():
    set_seed(0)
    net, x = ReIDNet(derived(), FBLNeck((256, 384, 512), 5)), torch.randn(2, 3, 128, 64)
    want = net.eval().embed(x)
    assert (fold(net)(x) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize('neck', [BNNeck, FBLNeck])
@pytest.mark.parametrize('after_bn', [False, True])
@torch.no_grad()
def test_same_embedding(neck, after_bn):
    net, x = make(neck, after_bn), torch.randn(3, 3, 70, 32)  # an odd number of rows in the last map but one
    before = copy.deepcopy(net.state_dict())
    f = fold(net)
    assert close(f(x), net, x)
    for k, v in net.state_dict().items():
        assert_close(v, before[k], rtol=0, atol=0)
    left = [n for n, m in f.named_modules() if isinstance(m, nn.BatchNorm2d)]
    sharp = make(neck, after_bn, gamma=0.5).double()  # in single precision its softmax magnifies rounding
    assert_close(fold(sharp)(x.double()), sharp.embed(x.double()), rtol=1e-9, atol=1e-9)
    assert not left and not any('classifier' in n for n, _ in f.named_parameters())


@torch.no_grad()
def test_a_supernet_and_double_precision():
    x = torch.randn(2, 3, 64, 32).double()
    for backbone in (None, supernet((8, 16, 24, 32))):
        net = make(BNNeck, backbone=backbone, gamma=0.5).double()
        assert_close(fold(net)(x), net.embed(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('fuse', FUSES)
@torch.no_grad()
def test_every_fuse_of_the_paper(fuse):
    x = torch.randn(3, 3, 64, 32, dtype=torch.double)
    net = make(backbone=derived('NEGAAGENGAEA', (8, 16, 24, 32), fuse=FUSES[fuse])).double()
    assert_close(fold(net)(x), net.embed(x), rtol=1e-9, atol=1e-10)


def test_other_networks_cannot_be_folded():
    with pytest.raises(InputError, match='expected an MSINet'):
        fold(nn.Linear(2, 2))
    net = make(backbone=derived(channels=(8, 16, 24, 32), fuse=torch.maximum))
    with pytest.raises(InputError, match='not added'):
        fold(net)


@torch.no_grad()
def test_onnx(tmp_path):
    for p in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(p)
    net = make()
    to_onnx(net, tmp_path / 'm.onnx', (64, 32))
    run = session(tmp_path / 'm.onnx')
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx']
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 64, 32)
        assert close(run(x), net, x)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnxruntime', None)
    with pytest.raises(InputError, match='pip install onnx onnxruntime onnxscript') as e:
        to_onnx(make(), tmp_path / 'm.onnx', (64, 32))
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())


def test_export_needs_a_run(tmp_path):
    with pytest.raises(InputError):
        run_export(ExportConfig(str(tmp_path)))
