"One process and many, one precision and others: the same training."

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from msinet.data.loaders import test_loader as in_order
from msinet.errors import InputError
from msinet.core import set_seed
from msinet.data.items import Item
from msinet.engine.devices import accelerator, broadcast_from_main, check_precision, check_batch_split, gather
from msinet.engine.devices import split_batch, launch, rank_and_world_size, share_bn_statistics
from msinet.engine.learner import adamw, sgd
from msinet.necks import BNNeck, FBLNeck, ReIDNet
from msinet.retrieval.evaluate import embed
from msinet.sam import SAM
from msinet.training.search import SearchStep
from msinet.engine.learner import trainable_params
from msinet.engine.loop import apply_runtime_options
from msinet.space import derived, supernet
from msinet.tcm import Memory
from msinet.config import TRAIN
from msinet.training.train import TrainStep, train

WIDTHS, P, K = (8, 16, 24, 32), 4, 2
Y = torch.arange(P).repeat_interleave(K)


def batches(n, seed, dtype=torch.float64, device="cpu"):
    "This process's images, everybody's labels."
    gen = torch.Generator().manual_seed(seed)
    (r, w), m = rank_and_world_size(), P * K
    for _ in range(n):
        x = torch.randn(m, 3, 64, 32, generator=gen, dtype=dtype)[r * m // w : (r + 1) * m // w]
        yield x.to(device), Y.to(device)


def mild(net, gamma):
    """Small maps and with them small energies: a saturated softmax makes rounding a million times larger, and
    equal forms differ."""
    for n, p in net.named_parameters():
        if n.endswith("gamma"):
            nn.init.constant_(p, gamma)
        if n.endswith("bn.weight"):
            nn.init.constant_(p, 0.3)


def train_step(dtype=torch.float64, device="cpu", synced=True, acc=None, opt=sgd, gamma=0.5, **cfg):
    set_seed(0)
    net = ReIDNet(derived(channels=WIDTHS), FBLNeck(WIDTHS[1:], P)).to(device, dtype).train()
    sam = SAM(WIDTHS[-1]).to(device, dtype)
    mild(net, gamma)
    apply_runtime_options(net, sync_bn=synced, **cfg)
    acc = acc or accelerator(device)
    return TrainStep(
        net,
        acc.prepare_optimizer(opt([p for m in (net, sam) for p in m.parameters() if p.requires_grad], 1e-3, 5e-4)),
        sam,
        acc=acc,
    )


def search_step(dtype=torch.float64, device="cpu", acc=None, **kw):
    set_seed(0)
    net = ReIDNet(supernet(WIDTHS), BNNeck(WIDTHS[1:])).to(device, dtype).train()
    mild(net, 0.5)
    share_bn_statistics(net)
    mems = [Memory(P, WIDTHS[-1]).to(device, dtype) for _ in range(2)]
    for m in mems:
        m.fill(torch.randn(P * K, WIDTHS[-1], dtype=dtype).to(device), Y.to(device))
    chosen = [p for n, p in net.named_parameters() if n.endswith("alpha")]
    rest = [p for n, p in net.named_parameters() if not n.endswith("alpha") and p.requires_grad]
    opts = (
        sgd(rest, 1e-4, 5e-4),
        torch.optim.Adam(chosen, 1e-3, betas=(0.5, 0.999), fused=True if device == "cuda" else None),
    )
    return SearchStep(net, *mems, batches(100, 1, dtype, device), *opts, K=K, acc=acc, **kw)


def weights(step):
    return [
        v.clone()
        for m in (step.net, getattr(step, "sam", None), getattr(step, "c_tr", None), getattr(step, "c_val", None))
        if m is not None
        for v in m.state_dict().values()
    ]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        set_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

    def embed(self, x):
        return self.bn(self.conv(x)).mean((2, 3))


def job(folder):
    "What one process or several do; the first one's answer."
    torch.set_num_threads(1)
    accelerator("cpu")
    out, n = {}, rank_and_world_size()[1]
    step = train_step()
    out["train"] = [[list(step(b).values()) for b in batches(2, 0)], weights(step)]
    for name, kw in dict(search={}, released=dict(alpha_first=True, leak=True, val_stats=True)).items():
        step = search_step(**kw)
        out[name] = [[list(step(b).values()) for b in batches(2, 0)], weights(step)]
    step = train_step(synced=False)
    out["alone"] = [list(step(b).values()) for b in batches(1, 0)]
    items = [Item(f"{folder}/{i}.png", i, 0) for i in range(7)]
    for bs in (2, 8):
        out[f"embed{bs}"] = embed(
            Small(), in_order(items, (16, 8), bs=bs, part=rank_and_world_size()), gather=gather if n > 1 else None
        ).f
    done = train(
        replace(TRAIN["smoke"], data="synth:n_ids=8,n_test=4,cams=2,visits=2,frames=2", epochs=1, out=f"{folder}/{n}")
    )
    out["run"] = done.history[0]["loss"], done.metrics["before"]["mAP"], sorted(p.name for p in done.run.iterdir())
    out["agreed"] = broadcast_from_main(lambda: rank_and_world_size())
    with pytest.raises(InputError, match="do not divide"):
        train(replace(TRAIN["smoke"], batch=6, accumulate=2, out=f"{folder}/bad"))
    assert not os.path.exists(f"{folder}/bad")
    return out


def test_two_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MSINET_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (16, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    one, two = job(str(tmp_path)), launch(job, str(tmp_path), n=2, cpu=True, limit=300)
    for k in ("train", "search", "released"):
        assert_close(one[k], two[k], rtol=1e-9, atol=1e-9)
    for k in ("embed2", "embed8"):
        assert torch.equal(one[k], two[k]) and len(two[k]) == 7
    assert_close(one["run"][0], two["run"][0], rtol=0.1, atol=0)  # each process has statistics of its own here
    assert one["run"][1:] == two["run"][1:] and two["agreed"] == (0, 2)
    # without shared statistics it is another network: that is what sync_bn is for
    assert (torch.stack(one["alone"][0]) - torch.stack(two["alone"][0])).abs().max() > 1e-4


def test_an_error_of_a_process_is_raised_here():
    with pytest.raises(InputError, match="4 identities in a batch do not divide into 2 processes × 4 parts"):
        launch(check_batch_split, 4, 2, 4, n=2, cpu=True, limit=120)
    assert rank_and_world_size() == (0, 1)


def test_mistakes():
    with pytest.raises(InputError, match="expected no or bf16"):
        check_precision(torch.device("cpu"), "fp16")
    with pytest.raises(InputError, match="no, bf16, fp16"):
        check_precision(torch.device("cpu"), "int8")
    with pytest.raises(InputError, match="do not divide"):
        check_batch_split(6, 4)
    check_batch_split(16, 2, 4, 2)


def test_one_part_is_the_plain_step_and_two_are_their_mean():
    (x, y), acc = next(batches(1, 0)), accelerator("cpu", accumulate=2)
    assert split_batch((x, y), 1)[0][0] is x
    step = train_step(acc=acc, synced=False)
    start = copy.deepcopy([step.net, step.sam])
    out, losses = step((x, y)), []
    got = [p.grad for p in trainable_params(step.opt)]
    plain = TrainStep(
        start[0],
        sgd([p for m in start for p in m.parameters() if p.requires_grad], 0.0, 0.0),
        start[1],
        acc=accelerator("cpu"),
    )
    grads = []
    for xi, yi in zip(x.chunk(2), y.chunk(2)):
        losses.append(plain((xi, yi))["loss"])
        grads.append([p.grad.clone() for p in trainable_params(plain.opt)])
    assert_close(out["loss"], torch.stack(losses).mean(), rtol=1e-12, atol=0)
    for g, a, b in zip(got, *grads):
        assert_close(g, (a + b) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "cfg", [dict(recompute=True), dict(channels_last=True), dict(recompute=True, channels_last=True)], ids=str
)
def test_layout_and_recomputation_change_nothing(cfg):
    a, b = train_step(synced=False), train_step(synced=False, **cfg)
    for batch in batches(2, 0):
        assert_close(a(batch), b(batch), rtol=1e-9, atol=1e-9)
    assert_close(weights(a), weights(b), rtol=1e-7, atol=1e-7)
    a, b = search_step(), search_step()
    apply_runtime_options(b.net, **cfg)
    for batch in batches(2, 0):
        assert_close(a(batch), b(batch), rtol=1e-7, atol=1e-7)
    assert_close(weights(a), weights(b), rtol=1e-7, atol=1e-7)


def test_channels_last_stays():
    net = train_step(channels_last=True).net
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
        for m in net.modules()
        if isinstance(m, nn.Conv2d) and m.weight.shape[0] > 1
    ]
    maps = net.backbone(next(batches(1, 0))[0])
    for h in hooks:
        h.remove()
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


class Products(TorchDispatchMode):
    "Which precision products, softmaxes and convolutions get."

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        if name in ("bmm", "_softmax", "convolution", "mm", "nll_loss_forward"):
            self.seen.setdefault(name, set()).update(
                a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()
            )
        return f(*args, **(kwargs or {}))


def test_half_precision_stops_where_it_must():
    batch = next(batches(1, 0, torch.float32))
    want = train_step(torch.float32)(batch)
    half = train_step(torch.float32, acc=accelerator("cpu", "bf16"))
    with Products() as p:
        got = half(batch)
    assert torch.bfloat16 in p.seen["convolution"]
    assert all(p.seen[k] == {torch.float32} for k in ("bmm", "_softmax", "nll_loss_forward"))
    for k in ("loss", "id", "triplet"):
        assert got[k].dtype == torch.float32 and abs(got[k] / want[k] - 1) < 0.15
    step = search_step(torch.float32, acc=accelerator("cpu", "bf16"))
    with Products() as p:
        out = step(batch)
    assert all(p.seen[k] == {torch.float32} for k in ("bmm", "_softmax")) and step.c_tr.c.dtype == torch.float32
    assert (
        abs(out["train"] / search_step(torch.float32)(batch)["train"] - 1) < 0.2
    )  # tau makes a cosine 20 times larger


@pytest.mark.skipif(not os.environ.get("MSINET_TEST_COMPILE"), reason="minutes: set MSINET_TEST_COMPILE=1")
def test_compiled_is_the_same():
    batch = next(batches(1, 0))
    assert_close(train_step(compile=True)(batch), train_step()(batch), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_on_a_gpu_never_waits(precision):
    for make, opt in ((train_step, dict(opt=sgd)), (train_step, dict(opt=adamw)), (search_step, {})):
        step = make(torch.float32, "cuda", acc=accelerator("cuda", precision), **opt)
        data = list(batches(4, 0, torch.float32, "cuda"))
        if make is search_step:
            step.val = iter(list(batches(4, 1, torch.float32, "cuda")))
        step(data[0]), step(data[1])
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(data[2])
        finally:
            torch.cuda.set_sync_debug_mode("default")
