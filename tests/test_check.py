"The self-check: one fault of each kind, exclusion lists, exit codes."

import os
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from msinet.data.check import CheckConfig, check_data, describe_check, draw_check, run_check, write_exclusions
from msinet.data.sets import get_data
from msinet.errors import InputError
from msinet.rendering.world import synth

RNG = np.random.default_rng(0)


def noise(p):
    p.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (24, 12, 3), dtype=np.uint8)).save(p)
    return p


@pytest.fixture
def market(tmp_path):
    root = tmp_path / "Market-1501-v15.09.15"
    for p in range(1, 6):
        for c in (1, 2):
            for k in range(3):
                noise(root / "bounding_box_train" / f"{p:04d}_c{c}s1_{k:06d}_01.jpg")
    for p in (6, 7):
        noise(root / "query" / f"{p:04d}_c1s1_000000_01.jpg")
        for c in (2, 3):
            noise(root / "bounding_box_test" / f"{p:04d}_c{c}s1_000000_01.jpg")
    return root


def one(root, k=0):
    return sorted((root / "bounding_box_train").glob("*.jpg"))[k]


def cut(p):
    p.write_bytes(p.read_bytes()[: -len(p.read_bytes()) // 2])


def copy(a, b):
    shutil.copy(a, b)


FAULTS = {  # kind -> (how to make it, is it a stop)
    "truncated": (lambda r: cut(one(r)), True),
    "unreadable": (lambda r: one(r).write_text("<html>404</html>"), True),
    "empty": (lambda r: one(r).write_bytes(b""), True),
    "two identities": (lambda r: copy(one(r), r / "bounding_box_train" / "0005_c1s1_000099_01.jpg"), True),
    "in train and test": (lambda r: copy(one(r), r / "bounding_box_test" / "0006_c4s1_000099_01.jpg"), True),
    "duplicate": (lambda r: copy(one(r), r / "bounding_box_train" / "0001_c1s1_000099_01.jpg"), False),
    "no positive": (lambda r: noise(r / "query" / "0008_c1s1_000000_01.jpg"), False),
    "shared identity": (lambda r: noise(r / "bounding_box_train" / "0006_c1s1_000000_01.jpg"), False),
    "odd name": (lambda r: noise(r / "query" / "holiday.jpg"), False),
    "not an image": (lambda r: (r / "query" / "Thumbs.db").write_bytes(b"x"), False),
}


def test_a_sound_copy_is_safe(market):
    c = check_data(f"M={market}")
    assert c.safe and not len(c.faults) and c.cameras["train"].to_dict() == {1: 15, 2: 15, 3: 0}
    assert any("as published" in n for n in c.notes) and c.counts.loc["train", "published images"] == 12936
    assert run_check(CheckConfig(f"M={market}"), say=lambda t: None) == 0


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_found_and_mended(market, tmp_path, kind):
    make, stop = FAULTS[kind]
    make(market)
    before = {p: p.read_bytes() for p in market.rglob("*") if p.is_file()}
    c = check_data(f"M={market}")
    assert (
        set(c.faults.kind) == {kind}
        and c.safe == (not stop)
        and c.table.loc[kind, "verdict"] == ("stop" if stop else "note")
    )
    said = []
    assert run_check(CheckConfig(f"M={market}"), say=said.append) == int(stop)
    assert kind in said[0] and ("not safe" in said[0]) == stop
    fix = tmp_path / "lists" / "bad.txt"
    assert run_check(CheckConfig(f"M={market}", fix=str(fix)), say=said.append) == 0
    assert {p: p.read_bytes() for p in market.rglob("*") if p.is_file()} == before, "the data are never touched"
    again = check_data(f"M={market}::exclude={fix}")
    assert again.safe and not set(again.stops)
    assert run_check(CheckConfig(f"M={market}::exclude={fix}", fix=str(fix)), say=said.append) == 0, (
        "an old list is kept"
    )
    assert check_data(f"M={market}::exclude={fix}").safe


def test_missing_images_of_a_list_are_found(tmp_path):
    root = tmp_path / "MSMT17_V1"
    name = lambda p, c: f"{p:04d}/{p:04d}_000_{c:02d}_0303morning_0008_0.jpg"
    for part, rows in dict(train=[(0, 1), (1, 2)], val=[(0, 3), (1, 3)], query=[(0, 1)], gallery=[(0, 2)]).items():
        for r in rows:
            noise(root / ("train" if part in ("train", "val") else "test") / name(*r))
        (root / f"list_{part}.txt").write_text("".join(f"{name(*r)} {r[0]}\n" for r in rows))
    assert check_data(f"MS={root}").safe, "the same numbers on both sides are different people"
    (root / "train" / name(0, 3)).unlink()
    c = check_data(f"MS={root}")
    assert c.stops == ["missing"] and c.faults.path[0].endswith(name(0, 3))
    write_exclusions(c, tmp_path / "bad.txt")
    assert check_data(f"MS={root}::exclude={tmp_path / 'bad.txt'}").safe


def test_queries_may_be_in_the_gallery(tmp_path):
    for n in (
        "image_train/0001_c001_1_0.jpg",
        "image_train/0002_c002_1_0.jpg",
        "image_test/0003_c002_1_0.jpg",
        "image_test/0003_c003_1_0.jpg",
    ):
        noise(tmp_path / n)
    (tmp_path / "image_query").mkdir()
    copy(tmp_path / "image_test" / "0003_c002_1_0.jpg", tmp_path / "image_query")
    c = check_data(f"VR={tmp_path}")
    assert c.safe and not len(c.faults)


def test_a_set_whose_queries_have_no_match_is_not_safe(market):
    for p in (market / "bounding_box_test").glob("*.jpg"):
        p.rename(
            p.with_name(p.name.replace("_c2", "_c1").replace("_c3", "_c1").replace("_01.jpg", f"_{p.name[6]}.jpg"))
        )
    c = check_data(f"M={market}")
    assert c.stops == ["no positive"] and not c.safe


def test_list_among_the_data_is_an_error(market):
    cut(one(market))
    with pytest.raises(InputError, match="data are never touched"):
        run_check(CheckConfig(f"M={market}", fix=str(market / "query" / "bad.txt")), say=lambda t: None)
    with pytest.raises(InputError, match="one with --fix"):
        run_check(CheckConfig(f"M={market}+M={market}", fix="x"), say=lambda t: None)
    with pytest.raises(InputError, match="has no image_train"):
        run_check(CheckConfig(f"VR={market}"), say=lambda t: None)
    assert not os.path.exists("x")


def test_list_of_another_copy_is_a_warning(market, tmp_path):
    (tmp_path / "bad.txt").write_text("# a comment\nquery/elsewhere.jpg\ttruncated\n")
    with pytest.warns(UserWarning, match="none of the 1 images"):
        get_data(f"M={market}::exclude={tmp_path / 'bad.txt'}")
    with pytest.raises(InputError, match="not a file"):
        get_data(f"M={market}::exclude={tmp_path / 'lost.txt'}")


def test_every_truncated_file_is_found(market):
    p = one(market)
    whole = p.read_bytes()
    for share in (0.1, 0.3, 0.6, 0.9):
        p.write_bytes(whole[: int(share * len(whole))])
        assert check_data(f"M={market}").stops == ["truncated"]


def test_joined_sets_figure_and_text(market, tmp_path):
    said = []
    cut(one(market))
    assert run_check(CheckConfig(f"M={market}+M={market}"), say=said.append) == 1 and len(said) == 2
    c = check_data(f"M={market}", progress=False)
    assert "\n" in describe_check(c) and len(draw_check(c).axes) == 3
    run_check(CheckConfig(f"M={market}", figure=str(tmp_path / "check.png")), say=said.append)
    assert (tmp_path / "check.png").stat().st_size > 5000


@pytest.mark.parametrize("K", [2, 8])
def test_figure_of_a_uniform_set(tmp_path, K):
    "Every identity has two images and nothing is wrong: bars and line are in view, and ticks are whole numbers."
    for p in range(6):
        for c in (1, 2):
            noise(tmp_path / "own" / f"{p}_cam{c}.jpg")
    fig = draw_check(check_data(rf"folder={tmp_path / 'own'}::(?P<pid>\d)_cam(?P<cam>\d)"), K)
    fig.draw_without_rendering()
    _, bx, cx = fig.axes
    assert (
        bx.get_xlim() == (0, K + 1)
        and bx.lines[0].get_xdata()[0] == K - 0.5
        and [b.get_height() for b in bx.patches] == [3]
    )
    assert (
        all(
            float(t).is_integer()
            for a, ts in ((bx, bx.get_xticks()), (bx, bx.get_yticks()), (cx, cx.get_xticks()))
            for t in ts
        )
        and cx.get_xlim()[0] == 0
    )


def test_rendered_sets_are_checked_without_files():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = check_data(synth(n_ids=2))
    assert c.safe and c.counts.loc["train", "ids"] == 2
