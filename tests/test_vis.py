"Figures: the same bytes twice, embedded fonts, one meaning for each colour, errors of one line."

import base64

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from msinet import vis
from msinet.errors import InputError

TABLE1 = "GGEGAGGNGAEA"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def alpha(epochs=20):
    push = torch.eye(4)[["NEGA".index(o) for o in TABLE1]]
    return torch.arange(1, epochs + 1)[:, None, None] * 0.05 * push


def images(k):
    return [np.full((8, 4, 3), 10 * i, np.uint8) for i in range(k)]


def test_save_repeats_and_embeds_fonts(tmp_path):
    def draw():
        return vis.draw_genotype(TABLE1, alpha=alpha()[-1])

    (a, png), (b, png2) = vis.save_figure(draw(), "a", tmp_path / "new"), vis.save_figure(draw(), "b", tmp_path / "new")
    pdf = a.read_bytes()
    assert pdf == b.read_bytes() and png.read_bytes() == png2.read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    assert b"/MediaBox [ 0 0 495 " in pdf  # 6.875 inches
    assert plt.imread(png).shape[1] == int(300 * vis.COL2)


def test_style_and_import_change_nothing():
    before = dict(plt.rcParams)
    vis.plot_alphas(alpha())
    vis.curve({"loss": [1.0, 0.5]})
    assert dict(plt.rcParams) == before


def test_style_keeps_interactive_mode_set_inside():
    was = plt.isinteractive()
    with vis.style():
        plt.ion()
    assert plt.isinteractive()
    matplotlib.interactive(was)


def test_plot_alphas_has_twelve_panels_in_network_order():
    fig = vis.plot_alphas(alpha())
    assert len(fig.axes) == 12
    by_cell = np.reshape(fig.axes, (2, 6)).T.flat
    assert "".join(ax.get_title("right") for ax in by_cell) == TABLE1
    for ax in fig.axes:
        shares = np.array([line.get_ydata() for line in ax.lines[:4]])
        np.testing.assert_allclose(shares.sum(0), 1)
        assert [line.get_color() for line in ax.lines[:4]] == list(vis.OP_COLORS.values())


def test_genotype_letters_in_order():
    texts = vis.draw_genotype(TABLE1).texts
    letters = sorted((t.get_position()[0], t.get_text()) for t in texts if t.get_weight() == "bold")
    assert "".join(o for _, o in letters) == TABLE1


def test_strip_frames_and_distances():
    right, d = [True, False, True], [0.1, 0.25, 0.4]
    ax = vis.strip(images(1)[0], images(3), torch.tensor(d), torch.tensor(right))
    want = [vis.QUERY] + [vis.RIGHT if r else vis.WRONG for r in right]
    assert [to_rgb(p.get_edgecolor()) for p in ax.patches] == [to_rgb(c) for c in want]
    assert [t.get_text() for t in ax.texts][:4] == ["query", "0.10", "✗0.25", "0.40"]
    assert all(t.get_size() >= 6 for t in ax.texts)
    assert len(vis.strips([(images(1)[0], images(3), d, right, n) for n in "ab"]).axes) == 2


def test_titles_of_images_of_unlike_sizes_are_on_one_line():
    fig = vis.show_images([np.zeros((h, w, 3), np.uint8) for h, w in ((20, 60), (60, 24), (30, 30))], list("abc"))
    fig.draw_without_rendering()
    assert np.ptp([ax.title.get_window_extent().y0 for ax in fig.axes]) < 1


def test_strips_keep_proportions():
    "Images of a truck, a motorcycle and a square keep their proportions, each in its own box."
    ims = [np.zeros((h, w, 3), np.uint8) for h, w in ((20, 60), (60, 24), (30, 30))]
    ax = vis.strip(ims[0], ims, [0.1, 0.2, 0.3], [True, False, True])
    boxes = [p.get_bbox() for p in ax.patches]
    np.testing.assert_allclose([b.height / b.width for b in boxes], [1 / 3, 1 / 3, 2.5, 1])
    assert all(
        b.y0 == 0 and b.width <= 1 + 1e-9 and b.height <= 2 / 3 + 1e-9 for b in boxes
    )  # the middle one of four: 1/3, 1/3, 1, 2.5
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
    fig = vis.strips(
        [(ims[0], [ims[0]] * 15, np.arange(15) / 15, [True] * 15, "a network with a long name") for _ in range(3)]
    )
    fig.draw_without_rendering()
    assert fig.axes[0].get_position().width * fig.get_figwidth() > 0.9 * vis.COL2  # titles take no width
    names = [t.get_window_extent() for a in fig.axes for t in a.texts if t.get_text().startswith("a net")]
    assert len(names) == 3 and not any(a.overlaps(b) for a, b in zip(names, names[1:]))


def test_activation_and_overlay():
    x = torch.zeros(2, 3, 4, 2)
    x[0, :, 2, 1] = 5.0
    a = vis.activation(x)
    assert a.argmax() == 2 * 2 + 1 and a.sum() == 1 and a[0].max() == 1
    x[1, :2, 0, 0], x[1, 0, 3, 1] = torch.tensor([3.0, 4.0]), -5.0  # equal energies
    e = vis.activation(x)[1]
    assert e[0, 0] == e[3, 1] == 1 and e.sum() == 2
    im = images(2)[1]
    np.testing.assert_allclose(vis.overlay(im, a[0], alpha=0), im / 255)
    both = vis.overlay(np.stack(images(2)), a, alpha=0.3)
    np.testing.assert_allclose(both[0], vis.overlay(images(2)[0], a[0], alpha=0.3))


def test_rgb_takes_both_orders_and_types():
    im = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    first = torch.tensor(im).permute(2, 0, 1)
    for form in (im, first, first / 255, im / 255, (first / 255).bfloat16()):
        np.testing.assert_allclose(vis.rgb(form), im / 255, atol=4e-3)


def test_curve_skips_empty_epochs():
    line = vis.curve({"mAP": [None, 0.2, float("nan"), 0.4]}).lines[0]
    assert line.get_xdata().tolist() == [2, 4] and line.get_ydata().tolist() == [0.2, 0.4]


def test_gap_draws_the_means():
    d = {"one": np.arange(20.0).reshape(2, 10), "two": [3.0, 5.0]}
    ax = vis.gap(d)
    assert [e[0].get_ydata()[0] for e in ax.containers] == [9.5, 4.0]
    half = [
        np.ptp(e[2][0].get_segments()[0][:, 1]) / 2 for e in ax.containers
    ]  # means of a query each: 4.5 and 14.5; 3 and 5
    np.testing.assert_allclose(half, 1.96 * np.array([5.0, 1.0]) / 2**0.5)


def test_drawing_into_given_axes_and_figures():
    fig, axs = plt.subplots(1, 2)
    assert vis.curve({"loss": [1, 2]}, ax=axs[0]) is axs[0]
    assert axs[0].xaxis.get_major_ticks()[0].label1.get_size() == 7
    whole = plt.figure(layout="constrained")
    left, _ = whole.subfigures(1, 2)
    assert vis.show_images(images(2), fig=left) is left
    n = len(plt.get_fignums())
    assert vis.data_uri(left.axes[0]).startswith("data:image/png;base64,iVBOR")
    assert len(plt.get_fignums()) == n - 1
    assert base64.b64decode(vis.data_uri(whole).split(",")[1])[:4] == b"\x89PNG"


T = torch.rand
MISTAKES = dict(
    alphas=lambda: vis.plot_alphas(T(5, 11, 4)),
    no_epochs=lambda: vis.plot_alphas(T(0, 12, 4)),
    genotype_short=lambda: vis.draw_genotype("GGEG"),
    genotype_letter=lambda: vis.draw_genotype("X" * 12),
    genotype_alpha=lambda: vis.draw_genotype(TABLE1, alpha=T(4, 12)),
    activation=lambda: vis.activation(T(3, 4, 4)),
    denormalise=lambda: vis.denormalise(T(4, 4)),
    rgb_grey=lambda: vis.rgb(T(4, 5)),
    rgb_range=lambda: vis.rgb(3 * T(3, 4, 5) - 1),
    overlay_count=lambda: vis.overlay(T(2, 3, 8, 4), T(3, 4, 2)),
    overlay_shape=lambda: vis.overlay(T(3, 8, 4), T(1, 4, 2)),
    no_images=lambda: vis.show_images([]),
    titles=lambda: vis.show_images(T(2, 3, 8, 4), titles=["a"]),
    colours=lambda: vis.show_images(T(2, 3, 8, 4), colors=["k"]),
    grid=lambda: vis.feature_grid(T(1, 2, 4, 4)),
    rows=lambda: vis.feature_rows([T(2, 4, 4)], ["a", "b"]),
    no_rows=lambda: vis.feature_rows([], []),
    distances=lambda: vis.strip(T(3, 8, 4), T(2, 3, 8, 4), [0.1], [True, True]),
    right=lambda: vis.strip(T(3, 8, 4), T(2, 3, 8, 4), [0.1, 0.2], [True]),
    no_strips=lambda: vis.strips([]),
    gap=lambda: vis.gap({"a": T(2, 3, 4)}),
    no_gap=lambda: vis.gap({}),
    curve=lambda: vis.curve({"a": T(2, 3)}),
    cmc_percent=lambda: vis.cmc_plot({"a": [50, 60]}),
    cmc_falls=lambda: vis.cmc_plot({"a": [0.5, 0.4]}),
)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_in_one_line_and_leave_no_figure(name):
    with pytest.raises(InputError) as e:
        MISTAKES[name]()
    assert "\n" not in str(e.value) and ", expected " in str(e.value) and ": " in str(e.value)
    assert not plt.get_fignums()
