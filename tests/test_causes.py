"What is taken away is exactly what the masks say; occlusion maps and shares against answers that are known."

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.nn import functional as F

from msinet.data.sets import get_data
from msinet.deploy.export import fold
from msinet.errors import InputError
from msinet.figures.cam import cam, object_share
from msinet.figures.causes import causes_figure, embed_changed, erase, fill_gap, flat_correlation, grey_patch, grown
from msinet.figures.causes import half, heat_shares, match_targets, mean_shares, occlusion, partners
from msinet.paper.evidence import mean_over_ids
from msinet.figures.causes import PARTS, patch_masks, masked_images, retrieval_without, shares_figure
from msinet.necks import FBLNeck, ReIDNet
from msinet.rendering.world import mask, synth
from msinet.retrieval.evaluate import embeddings, evaluate
from msinet.space import derived
from msinet.widgets.explorers import which_part_decides

SIZE = (64, 32)


class Reader(nn.Module):
    "Embeds one rectangle of an image, and a constant, so that no embedding is zero."

    def __init__(self, top, left, height, width):
        super().__init__()
        self.rows, self.columns = slice(top, top + height), slice(left, left + width)

    def embed(self, x):
        return torch.cat([x[..., self.rows, self.columns].flatten(1), torch.ones(len(x), 1)], 1)


class Constant(nn.Module):
    def embed(self, x):
        return torch.ones(len(x), 4)


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def data():
    return synth(n_ids=1, n_test=6, cams=4, visits=3)


@pytest.fixture(scope="module")
def p(data):
    return masked_images(data.query, SIZE)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return ReIDNet(derived(channels=(8, 32, 48, 64)), FBLNeck((32, 48, 64))).eval()


def test_masks_erase_exactly_what_they_say(p):
    on, off = p.m == 1, p.m == 0
    far = grown(p.m) == 0
    same = lambda x, where: torch.equal(x.movedim(1, -1)[where], p.x.movedim(1, -1)[where])
    grey = lambda x, where: bool((x.movedim(1, -1)[where] == 0).all())
    changed = {n: f(p) for n, f in PARTS.items()}
    assert torch.equal(changed["nothing"], p.x) and not changed["everything"].any()
    assert same(changed["background"], on) and grey(changed["background"], off)
    assert same(changed["object"], far) and grey(changed["object"], ~far)
    assert same(changed["object, gap filled"], far)
    upper, lower = half(p.m, False) == 1, half(p.m, True) == 1
    for name, part in {"upper half": upper, "lower half": lower}.items():
        assert same(changed[name], ~part) and grey(changed[name], part)
    assert torch.equal(upper | lower, ~far) and not (upper & lower).any()
    assert set(changed["all but the outline"].unique().tolist()) == {-1.0, 1.0}


def test_the_upper_half_is_above_the_lower(p):
    for i in range(len(p.x)):
        rows = [half(p.m, lower)[i].any(1).nonzero() for lower in (False, True)]
        assert rows[0].max() < rows[1].min()
        tall = [int(r.max() - r.min()) for r in rows]
        assert abs(tall[0] - tall[1]) <= 3


def test_a_swapped_wall_keeps_every_pixel_of_the_person(p):
    x = PARTS["background swapped"](p)
    on, off = (v[:, None].expand_as(x) for v in (p.m == 1, p.m == 0))
    assert torch.equal(x[on], p.x[on]) and torch.equal(x[off], p.background[p.other][off])
    assert not torch.equal(x[off], p.x[off])


def test_a_filled_gap_knows_nothing_of_what_was_there(p):
    where = grown(p.m)
    other = erase(p.x, where, torch.randn(p.x.shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(fill_gap(other, where), fill_gap(p.x, where))
    assert not fill_gap(p.x, torch.ones_like(where)).any(), "grey where nothing is known"
    torch.testing.assert_close(fill_gap(p.x, torch.zeros_like(where)), p.x)


@pytest.mark.parametrize("size", [(128, 64), (64, 64), (30, 17), (1, 5), (5, 1)])
def test_gaps_are_filled_in_images_of_any_size(size):
    x, where = torch.full((2, 3, *size), 0.7), torch.zeros(2, *size)
    where[:, : size[0] // 2 + 1, : size[1] // 2] = 1
    torch.testing.assert_close(fill_gap(x, where), x)


def test_a_mask_is_read_at_the_size_of_the_network(data):
    m = masked_images(data.query, (128, 64)).m
    truth = torch.from_numpy(np.stack([mask(i) for i in data.query]))
    assert m.shape[1:] == (128, 64) and 0 <= m.min() and m.max() <= 1
    torch.testing.assert_close(m.mean((1, 2)), truth.mean((1, 2)), atol=0.01, rtol=0)


def test_partners_are_strangers_and_the_same_each_time(data):
    j = partners(data.query)
    assert all(data.query[a].pid != data.query[b].pid for a, b in enumerate(j.tolist()))
    assert all(data.query[a].cam != data.query[b].cam for a, b in enumerate(j.tolist()))
    assert torch.equal(j, partners(data.query)) and not torch.equal(j, partners(data.query, seed=1))
    with pytest.raises(InputError, match="two or more identities"):
        partners([i for i in data.query if i.pid == data.query[0].pid])


def test_images_without_masks_are_an_error(tmp_path):
    from PIL import Image

    from msinet.data.items import Item

    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for f in files:
        Image.new("RGB", (32, 64)).save(f)
    with pytest.raises(InputError, match="has no mask"):
        masked_images([Item(f, i, 0) for i, f in enumerate(files)], SIZE)


def test_a_patch_is_clipped_at_the_edge(p):
    x = grey_patch(56, -4, 16, 16)(p)
    assert not x[..., 56:, :12].any() and torch.equal(x[..., :56, :], p.x[..., :56, :])
    assert torch.equal(x[..., 12:], p.x[..., 12:])


def test_retrieval_without_nothing_is_the_evaluation_and_readers_lose_what_they_read(data):
    edge = Reader(0, 0, 64, 4)
    t = retrieval_without(edge, data, SIZE)
    r = evaluate(edge, data, SIZE)
    assert t.loc[("nothing", "R1"), "value"] == pytest.approx(r.cmc(1))
    assert t.loc[("nothing", "mAP"), "value"] == pytest.approx(r.mean_ap())
    assert (t.low <= t.value).all() and (t.value <= t.high).all()
    assert not t.loc["nothing"][["change", "change_low", "change_high"]].to_numpy().any()
    own = retrieval_without(edge, data, SIZE, same_cam_ok=True)["value"].xs("R1", level=1)
    assert own["nothing"] > 0.5 and own["object"] == pytest.approx(own["nothing"], abs=0.1)
    assert own["background"] < own["nothing"] / 2 and own["everything"] < own["nothing"] / 2


def test_an_intervention_of_ones_own(data):
    t = retrieval_without(Reader(0, 0, 8, 8), data, SIZE, dict(corner=grey_patch(0, 0, 8, 8)))
    assert t.index.tolist() == [("corner", "R1"), ("corner", "mAP")]


def test_embeddings_of_only_zeros_can_be_ranked(net):
    f = embed_changed(net, torch.zeros(3, 3, *SIZE))
    torch.testing.assert_close(f.norm(dim=1), torch.ones(3))


def test_a_constant_network_has_a_map_of_zeros(p):
    assert not occlusion(Constant(), p.x[:3], patch=16).any()


def test_a_network_that_reads_one_place_has_its_map_there(p):
    heat = occlusion(Reader(24, 8, 8, 8), p.x[:4], patch=8, stride=4)
    near = torch.zeros(SIZE)
    near[17:39, 1:23] = 1  # what a patch of 8 that touches the place can cover
    assert (heat * (1 - near)).abs().max() < 1e-5
    at = heat.flatten(1).argmax(1)
    assert all(24 <= int(k) // 32 < 32 and 8 <= int(k) % 32 < 16 for k in at)


def test_occlusion_by_a_loop(p):
    x, read = p.x[:2], Reader(0, 0, 40, 32)
    to = torch.randn(2, 3 * 40 * 32 + 1, generator=torch.Generator().manual_seed(0))
    got = occlusion(read, x, to, patch=24, stride=16, colour=1.0, bs=3)
    slow, count = torch.zeros(2, *SIZE), torch.zeros(SIZE)
    for i in (0, 16, 32, 40):
        for j in (0, 8):
            y = x.clone()
            y[..., i : i + 24, j : j + 24] = 1
            d = F.cosine_similarity(read.embed(x), to) - F.cosine_similarity(read.embed(y), to)
            slow[:, i : i + 24, j : j + 24] += d[:, None, None]
            count[i : i + 24, j : j + 24] += 1
    torch.testing.assert_close(got, slow / count, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size, patch, stride", [((64, 32), 16, 16), ((65, 33), 16, 8), ((20, 50), 20, 7)])
def test_patches_cover_every_pixel(size, patch, stride):
    w = patch_masks(size, patch, stride)
    assert w.shape[1:] == size and w.sum(0).min() >= 1 and (w.sum((1, 2)) == patch**2).all()
    assert len(w) == len(torch.unique(w.flatten(1), dim=0))


@pytest.mark.parametrize("patch, stride", [(0, 1), (33, 8), (8, 9), (8, -1)])
def test_patches_that_leave_something_out_are_an_error(patch, stride):
    with pytest.raises(InputError, match="expected 0 < stride <= patch <= 32"):
        patch_masks(SIZE, patch, stride)


def test_shares_of_an_even_map_are_the_area_of_the_mask(net, data, p):
    torch.testing.assert_close(object_share(torch.ones(len(p.m), 8, 4), p.m), p.m.mean((1, 2)))
    t = heat_shares(net, data, SIZE, fold(net), patch=8)
    n = len(data.query)
    assert len(t) == 3 * n and t.kind.unique().tolist() == ["energy", "Grad-CAM", "occlusion"]
    for _, rows in t.groupby("kind"):
        np.testing.assert_allclose(rows.even, p.m.mean((1, 2)), rtol=1e-5)
    assert t.own.dropna().between(0, 1).all() and t["another image"].dropna().between(0, 1).all()
    m = mean_shares(t)
    e = t[t.kind == "energy"]
    assert m.loc[("energy", "own"), "value"] == pytest.approx(e.own.mean(), rel=1e-5)
    assert m.loc[("energy", "own - even"), "value"] == pytest.approx((e.own - e.even).mean(), rel=1e-4)
    assert m.loc[("occlusion", "flat grey")].isna()[:3].all() and m.loc[("occlusion", "flat grey"), "n"] == 0


def test_another_images_share_is_that_of_its_partner(net, data, p):
    t = heat_shares(net, data, SIZE, patch=16)
    e = net(p.x).maps[-1].detach().square().sum(1)
    want = object_share(e[p.other], p.m)
    np.testing.assert_allclose(t[t.kind == "energy"]["another image"], want, rtol=1e-4)


def test_a_map_that_is_always_the_same_correlates_fully_with_flat_grey(p):
    class Fixed(nn.Module):
        def __init__(self, follow):
            super().__init__()
            self.follow = follow

        def forward(self, x):
            m = torch.arange(8.0).view(1, 1, 4, 2).expand(len(x), 1, 4, 2)
            m = m + self.follow * F.adaptive_avg_pool2d(x[:, :1], (4, 2))
            return type("Out", (), dict(maps=[m]))

    torch.testing.assert_close(flat_correlation(Fixed(0), p.x), torch.ones(len(p.x)))
    assert flat_correlation(Fixed(50), p.x).abs().mean() < 0.9


def test_targets_are_means_of_true_matches(net, data):
    q, g = embeddings(net, data, SIZE)
    got = match_targets(q, g)
    for i in (0, 7):
        ok = (g.pid == q.pid[i]) & (g.cam != q.cam[i])
        torch.testing.assert_close(got[i], F.normalize(g.f[ok].mean(0), dim=0))
    torch.testing.assert_close(match_targets(q._replace(pid=q.pid + 1000), g), q.f)  # without a match: itself


def test_grad_cam_takes_a_target_for_each_image(net, p):
    to = net.embed(p.x[3:5]).detach()
    both = cam(net, p.x[:2], to)
    for i in range(2):
        np.testing.assert_allclose(both[i], cam(net, p.x[i : i + 1], to[i])[0], atol=1e-3)


def test_a_folded_network_is_embedded_by_the_same_name(net, p):
    torch.testing.assert_close(fold(net).embed(p.x), net.embed(p.x), atol=1e-4, rtol=1e-4)


def test_no_values_have_no_mean():
    i = mean_over_ids([np.nan, np.nan], [1, 2])
    assert np.isnan(i.value) and i.n == 0
    assert mean_over_ids([1.0, np.nan, 3.0], [1, 2, 3])[::3] == (2.0, 2)


def test_figures_show_every_row(data):
    t = retrieval_without(Reader(0, 0, 64, 32), data, SIZE)
    ax = causes_figure(dict(a=t, b=t), "mAP")
    assert [v.get_text() for v in ax.get_yticklabels()] == list(PARTS) and len(ax.lines) == 2
    np.testing.assert_allclose(ax.lines[0].get_xdata(), 100 * t.xs("mAP", level=1).value)
    values = dict(own=0.5, even=0.3, **{"flat grey": np.nan, "another image": 0.4})
    index = pd.MultiIndex.from_product([["energy"], values])
    m = pd.DataFrame([(v, v - 0.1, v + 0.1, 5) for v in values.values()], index, ["value", "low", "high", "n"])
    ax = shares_figure(dict(a=m))
    assert len(ax.lines) == 3 and sorted(float(v.get_ydata()[0]) for v in ax.lines) == [0.3, 0.4, 0.5]


def test_the_panel_redraws_for_every_part_and_patch(net, data):
    p = which_part_decides(net, data, SIZE, k=3)
    seen = {p.image.value}
    for name in p.controls["taken"].options:
        p.set(taken=name)
        assert p.error is None, p.error
        seen.add(p.image.value)
    assert len(seen) >= len(PARTS)
    before = p.image.value
    p.clickable.places.children[13].click()
    assert p.error is None and p.values()["row"] == 6 and p.values()["column"] == 2 and p.image.value != before
    p.set(query=5)
    assert p.error is None and "image/png" in p._repr_mimebundle_()


def test_the_panel_takes_any_network_with_embeddings(data):
    p = which_part_decides(Reader(0, 0, 64, 32), data, SIZE, k=2)
    p.set(taken="a patch", row=3)
    assert p.error is None


def test_rendered_sets_on_disk_have_masks_too():
    d = get_data("synth:n_ids=1,n_test=3,cams=3,visits=2", (32, 16))
    assert masked_images(d.query, (32, 16)).m.mean() > 0.1
