"The timing tool: medians of ratios; the pipeline's promise."
import numpy as np
import pytest
from PIL import Image

from msinet.bench import bench_data, pillow_path, ratio
from msinet.core import set_seed


def test_ratio_is_of_rounds():
    now, cost = [0.], {"a": iter([99, 4, 6, 8]), "b": iter([99, 2, 3, 2])}
    def f(k): return lambda: now.__setitem__(0, now[0]+next(cost[k]))
    t = ratio({"a": f("a"), "b": f("b")}, 3, clock=lambda: now[0])
    assert t.loc["b"].tolist() == [2, 2, 2, 4] and t.loc["a"].tolist() == [6, 1, 1, 1]


def test_pillow_path_is_the_usual_one():
    "Without the dice, the same numbers as torchvision's transforms."
    try:
        from tvcompat import ensure_torchvision
        ensure_torchvision()
        from torchvision import transforms as T
    except (ImportError, RuntimeError) as e: pytest.skip(f"torchvision does not import: {e}")
    class Still:  # neither mirrored nor erased, cropped back to where it was
        def random(self): return 1.
        def integers(self, lo, hi, n): return np.array([10]*n)
    set_seed(0)
    im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 20, 3), dtype=np.uint8))
    want = T.Compose([T.Resize((32, 16)), T.ToTensor(), T.Normalize((.485, .456, .406), (.229, .224, .225))])(im)
    assert (pillow_path(im, (32, 16), Still())-want).abs().max() < 1e-6


def test_bytes_from_the_cache_are_fast():
    t = bench_data(rounds=5)
    assert list(t) == ["per second", "seconds", "faster", "least", "greatest"] and (t["least"] <= t["greatest"]).all()
    assert t.loc["bytes", "per second"] > 10_000 and t.loc["bytes", "faster"] > 15
