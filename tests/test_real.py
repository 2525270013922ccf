"""Is the rendered world like the real one? Networks that learnt real people on rendered ones, and the other way round.

The released files and the real images are not part of the project: where they are missing these tests are left out.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from msinet.backbones import network
from msinet.core import set_seed
from msinet.data.items import image_files, Item, ReIDData
from msinet.data.sets import get_data
from msinet.paper.evidence import paired
from msinet.retrieval.evaluate import evaluate, Pixels
from msinet.weights import load_initial_weights, open_net

SHARED = Path(__file__).parent.parent.parent / "shared"
WEIGHTS, VEHICLES = SHARED / "weights", SHARED / "data/khoavr/images"


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="released weights are not here")
def test_networks_that_learnt_real_people_know_rendered_ones():
    data, ap = get_data("synth:n_ids=8,n_test=16", (256, 128)), {}
    for name in ("market1501", "msmt17", "random"):
        set_seed(0)
        net = network("osnet", channels=(16, 64, 96, 128), size=(256, 128)).eval()
        if name != "random":
            load_initial_weights(net, WEIGHTS / f"osnet_x0_25_{name}.pth", fresh=True)
        ap[name] = evaluate(net, data, (256, 128)).ap
    pids = [i.pid for i in data.query]
    assert paired(ap["market1501"], ap["random"], pids).low > 0.3  # people, to both of them
    assert paired(ap["msmt17"], ap["market1501"], pids).value > 0  # the order that is reported of real sets


def vehicles() -> ReIDData:
    "507 real vehicles by two cameras: an image of each is a query, the other in the gallery."
    numbers, items = {}, []
    for p in image_files(VEHICLES):
        who, cam = re.fullmatch(r"(.+)_cam(\d)", Path(p).stem).groups()
        items.append(Item(str(p), numbers.setdefault(who, len(numbers)), int(cam)))
    of = lambda cam: [i for i in items if i.cam == cam]
    return ReIDData(name="vehicles", train=[], query=of(1), gallery=of(2))


@pytest.mark.skipif(not VEHICLES.is_dir(), reason="the real images are not here")
def test_rendered_vehicles_teach_to_find_real_ones():
    data = vehicles()
    data = ReIDData(name="vehicles", train=[], query=data.query[::6], gallery=data.gallery)
    pids = [i.pid for i in data.query]
    net, about = open_net("zoo:msinet-vehicles")
    found, pixels = evaluate(net, data, about["size"]), evaluate(Pixels(), data, (64, 64))
    assert paired(found.ap, pixels.ap, pids).low > 0.3
    assert np.nanmean(found.ap) > 0.55
    set_seed(0)
    names = ("backbone", "genotype", "channels", "rho", "size")
    untrained = network(**{k: about[k] for k in names}).eval()
    with torch.no_grad():
        assert paired(found.ap, evaluate(untrained, data, about["size"]).ap, pids).low > 0.3
