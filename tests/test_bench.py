"Benchmarks: medians of ratios, counted work, the speed of the pixel cache."

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from msinet.bench.measure import bench_data, pillow_path, ratio
from msinet.bench.all import bench, with_share
from msinet.bench.method import bench_infer, bench_memory
from msinet.cli import BenchConfig, parse_args
from msinet.core import set_seed, threads
from msinet.errors import InputError
from msinet.necks import BNNeck, ReIDNet
from msinet.bench.roofline import Machine, Work, measure_machine, share, work
from msinet.space import derived


def test_ratio_compares_within_rounds():
    now, cost = [0.0], {"a": iter([99, 4, 6, 8]), "b": iter([99, 2, 3, 2])}

    def f(k):
        return lambda: now.__setitem__(0, now[0] + next(cost[k]))

    t = ratio({"a": f("a"), "b": f("b")}, 3, clock=lambda: now[0])
    assert t.loc["b"].tolist() == [2, 2, 2, 4] and t.loc["a"].tolist() == [6, 1, 1, 1]


def test_pillow_path_is_the_usual_one():
    "Without randomness, the same numbers as torchvision's transforms."
    try:
        from msinet.core import ensure_torchvision

        ensure_torchvision()
        from torchvision import transforms as T
    except (ImportError, RuntimeError) as e:
        pytest.skip(f"torchvision does not import: {e}")

    class Still:  # neither flipped nor erased, cropped at the original position
        def random(self):
            return 1.0

        def integers(self, lo, hi, n):
            return np.array([10] * n)

    set_seed(0)
    im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 20, 3), dtype=np.uint8))
    want = T.Compose([T.Resize((32, 16)), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(im)
    assert (pillow_path(im, (32, 16), Still()) - want).abs().max() < 1e-6


def test_bytes_from_the_cache_are_fast():
    t = bench_data(rounds=5)
    assert list(t) == ["per second", "seconds", "faster", "least", "greatest"] and (t["least"] <= t["greatest"]).all()
    assert t.loc["bytes", "per second"] > 10_000 and t.loc["bytes", "faster"] > 15


def test_the_memory_is_faster_than_the_loop():
    with threads(1):
        t = bench_memory(rounds=7)
    assert t.faster["rounds, groups"] > 4 and t.faster["rounds, drawn"] > 2 and t.faster["rounds, one identity"] > 0.9


def test_work_is_counted():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert work(lambda: a @ b) == Work(2 * 3 * 4 * 5, 4 * (12 + 20 + 15))
    assert work(lambda: a.expand(7, 3, 4)[0].T) == Work(0, 0)
    assert work(lambda: a.add_(1)).bytes >= 2 * 48
    for groups in (1, 2, 8):
        conv, x = nn.Conv2d(8, 8, 3, 2, 1, groups=groups), torch.randn(2, 8, 6, 6)
        one = work(lambda: conv(x)).flops
        assert one == 2 * 2 * 8 * 9 * 9 * 8 // groups
        assert work(lambda: conv(x).sum().backward()).flops == 2 * one  # no gradient of the input
        assert work(lambda: conv(x.requires_grad_()).sum().backward()).flops == 3 * one
    up = nn.ConvTranspose2d(4, 6, 3)
    assert (
        work(lambda: up(torch.randn(1, 4, 5, 5)).sum().backward()).flops
        == 2 * work(lambda: up(torch.randn(1, 4, 5, 5))).flops
    )


def test_share_takes_the_tighter_limit():
    m = Machine(100.0, 10.0)
    assert share(Work(50, 1), 1, m) == 0.5 and share(Work(50, 8), 1, m) == 0.8
    t = with_share(pd.DataFrame(dict(seconds=[1.0, 1.0], GFLOP=[50e-9, np.nan], GB=[1e-9, np.nan])), m)
    assert abs(t.share[0] - 0.5) < 1e-9 and np.isnan(t.share[1])
    assert min(measure_machine(n=128, mb=4, rounds=1)) > 0


def test_any_network_can_be_measured():
    class Mean(nn.Module):
        channels = (3, 3, 3)

        def forward(self, x):
            return [x] * 3

    for net in (
        ReIDNet(Mean(), BNNeck((3, 3, 3), 2)),
        ReIDNet(derived(channels=(8, 16, 24, 32), fuse=torch.maximum), BNNeck((16, 24, 32), 2)),
    ):
        t = bench_infer((1, 2), (64, 32), net=net, rounds=1)
        assert t.index.tolist() == ["as trained, 1", "as trained, 2"] and (t.GB > 0).all()


def test_the_shell_measures_all_parts_or_one():
    assert parse_args(["bench"]) == BenchConfig() and BenchConfig().what == "all"
    assert parse_args(["bench", "memory", "--rounds", "2"]) == BenchConfig("memory", 2)
    with pytest.raises(InputError, match="not there"):
        bench(["fridge"])
