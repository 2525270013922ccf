"Maps on one scale, certainty of a search, and Grad-CAM."

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from msinet.errors import InputError
from msinet.figures.panels import share_entropy, share_lead, map_table, settling_epoch, share_maps


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


def test_one_scale_and_one_bar():
    fig = map_table(torch.rand(2, 3, 4, 2), ["a", "b"], vmin=0, vmax=2, label="x")
    assert {ax.images[0].get_clim() for ax in fig.axes[:6]} == {(0, 2)} and len(fig.axes) == 7


def test_texts_must_match_rows():
    with pytest.raises(InputError, match="2 row texts"):
        map_table(torch.rand(3, 3, 4, 2), ["a", "b"])
    with pytest.raises(InputError, match="alphas have shapes"):
        share_maps({"a": torch.zeros(5, 11, 4)})


def test_settled_by_a_loop():
    h = torch.randn(20, 12, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)
    best = h.argmax(-1).T.tolist()
    slow = [next(e for e in range(1, 21) if len(set(b[e - 1 :])) == 1) for b in best]
    assert settling_epoch(h).tolist() == slow


def test_doubt_and_lead_of_known_shares():
    h = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    torch.testing.assert_close(share_entropy(h), torch.tensor([1.75], dtype=torch.float64))
    torch.testing.assert_close(share_lead(h), torch.tensor([0.25], dtype=torch.float64), atol=1e-6, rtol=0)


def test_object_share_follows_masks_and_the_query_has_no_gradient():
    cam = pytest.importorskip("msinet.figures.cam")
    m = np.zeros((1, 8, 4))
    m[:, :4] = 1
    assert cam.object_share(m, m).item() == 1 and cam.object_share(1 - m, m).item() == 0
    with pytest.raises(InputError, match="one mask per map"):
        cam.object_share(np.ones((2, 4, 2)), m)
    e = torch.tensor([3.0, 4.0], requires_grad=True)
    cam.CosineTarget(e)(e).backward()
    torch.testing.assert_close(e.grad, torch.zeros(2))
