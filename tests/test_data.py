"Loaders on small trees, their messages; pixels, batches and augmentation."

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from msinet.data.loaders import PixelCache, PixelStream, PKSampler, load_image, pk_batches, test_loader, train_loader
from msinet.data.augment import augment, normalise, pad_crop, random_boxes, random_erase, random_flip
from msinet.data.check import CheckConfig, run_check
from msinet.config import n_identities
from msinet.data.layouts import join_sets, market1501, msmt17, vehicleid, veri776
from msinet.data.sets import DATASETS, get_data
from msinet.errors import InputError
from msinet.rendering.world import render, synth
from msinet.data.items import Item, ReIDData, data_fingerprint, relabel, summary
from msinet.data.folder import folder

pytestmark = pytest.mark.filterwarnings("ignore:.*as published")  # the copies here are tiny


def draw(root, names, size=(6, 12)):
    for k, name in enumerate(names):
        p = root / name
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (k * 37 % 256, 90, 30)).save(p)


def litter(folder):
    "What real copies carry: all of it must be skipped."
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("._0002_c1s1_000001_01.jpg", "Thumbs.db", "9999_c1s1_000001_01.jpg"):
        (folder / name).touch()
    (folder / "._0003_c1s1_000001_01.jpg").write_bytes(b"\0\5\x16\7")


def who(items):
    return [(i.pid, i.cam) for i in items]


@pytest.fixture
def market(tmp_path):
    root = tmp_path / "data" / "market1501" / "Market-1501-v15.09.15"
    draw(root / "bounding_box_train", ["0002_c1s1_000451_03.jpg", "0007_c2s1_000001_01.jpg", "0002_c6s1_000451_03.jpg"])
    draw(root / "query", ["0003_c1s1_000001_00.jpg"])
    draw(root / "bounding_box_test", ["-1_c1s1_000001_01.jpg", "0000_c2s1_000001_01.jpg", "0003_c4s1_000001_01.jpg"])
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        litter(root / part)
    return root


def test_market_is_read(market):
    d = market1501(market)
    assert who(d.train) == [(2, 1), (2, 6), (7, 2)] and who(d.query) == [(3, 1)]
    assert who(d.gallery) == [(0, 2), (3, 4)], "-1 dropped, 0000 kept"
    assert [i.path for i in d.train] == sorted(i.path for i in d.train) and not d.same_cam_ok and d.name == "M"
    assert market1501(market.parent) == market1501(market.parent.parent) == d


def test_market_copy_from_a_mac(market):
    draw(market.parent / "__MACOSX" / "bounding_box_train", ["0001_c1s1_000001_01.jpg"])
    for part in ("query", "bounding_box_test"):
        litter(market.parent / "__MACOSX" / part)
    assert len(market1501(market.parent).train) == 3


def test_names_that_do_not_fit_are_left_out_with_a_warning(market):
    draw(market / "query", ["holiday.jpg"])
    with pytest.warns(UserWarning, match="1 of 2 names.*holiday.jpg"):
        assert len(market1501(market).query) == 1


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_msmt_is_read(tmp_path, version):
    folders = dict(V1=("train", "test"), V2=("mask_train_v2", "mask_test_v2"))[version]
    root = tmp_path / f"MSMT17_{version}"
    name = lambda p, cam: f"{p:04d}/{p:04d}_000_{cam:02d}_0303morning_0008_0.jpg"
    parts = dict(train=[(1, 15), (0, 1)], val=[(0, 2)], query=[(0, 3)], gallery=[(0, 12), (1, 4)])
    for part, rows in parts.items():
        draw(root / folders[part in ("query", "gallery")], [name(*r) for r in rows])
        (root / f"list_{part}.txt").write_text("".join(f"{name(*r)} {r[0]}\r\n" for r in rows) + "\n")
    d = msmt17(tmp_path)
    assert (
        who(d.train) == [(0, 1), (0, 2), (1, 15)] and who(d.query) == [(0, 3)] and who(d.gallery) == [(0, 12), (1, 4)]
    )
    assert who(msmt17(root, val=False).train) == [(0, 1), (1, 15)]
    (root / folders[0] / name(0, 2)).unlink()
    with pytest.warns(UserWarning, match="1 of 3 images"):
        assert len(msmt17(root).train) == 2
    (root / "list_query.txt").unlink()
    with pytest.raises(InputError, match="has no list_query.txt"):
        msmt17(root)


def test_market_class_folders(tmp_path):
    draw(
        tmp_path / "pytorch",
        [
            "train_all/0002/0002_c1s1_000451_03.jpg",
            "query/0003/0003_c1s1_000001_00.jpg",
            "gallery/-1/-1_c1s1_000001_01.jpg",
            "gallery/0000/0000_c2s1_000001_01.jpg",
        ],
    )
    d = market1501(tmp_path)
    assert (who(d.train), who(d.query), who(d.gallery)) == (
        [(2, 1)],
        [(3, 1)],
        [(0, 2)],
    ) and "class folders" in d.source.layout


def test_msmt_renamed_as_market(tmp_path, market):
    draw(
        tmp_path / "MSMT17",
        [
            "bounding_box_train/0000_c14_0030.jpg",
            "query/0000_c1_0001.jpg",
            "bounding_box_test/0001_000_03_0303noon_0008_0.jpg",
        ],
    )
    d = msmt17(tmp_path / "MSMT17")
    assert (who(d.train), who(d.query), who(d.gallery)) == (
        [(0, 14)],
        [(0, 1)],
        [(1, 3)],
    ) and "train + val" in d.source.layout
    with pytest.raises(InputError, match="has no list_train.txt"):
        msmt17(tmp_path / "MSMT17", val=False)
    with pytest.raises(InputError, match="nor names as MSMT17"):
        msmt17(market)


@pytest.mark.filterwarnings("default:.*as published")
def test_other_counts_are_a_warning(market):
    with pytest.warns(UserWarning, match="train has 3 images instead of 12,936, query has 1 images instead of 3,368"):
        d = market1501(market)
    assert d.source.published["gallery"] == (751, 15913) and d.source.root == str(market) and d == market1501(market)
    (market / "synth.json").write_text("{}")
    assert not market1501(market).source.published, "a rendered set has numbers of its own"


def test_joined_sets_share_no_identity(market, tmp_path):
    draw(
        tmp_path / "VeRi",
        [
            "image_train/0001_c001_00016460_0.jpg",
            "image_train/0003_c020_00016460_0.jpg",
            "image_query/0002_c002_00030600_0.jpg",
            "image_test/0002_c020_00030605_0.jpg",
        ],
    )
    M, VR = market1501(market), veri776(tmp_path / "VeRi")
    d = get_data(f"M={market}+VR={tmp_path / 'VeRi'}")
    assert (
        d == join_sets(M, VR)
        and d.name == "M+VR"
        and (d.query, d.gallery) == (M.query, M.gallery)
        and d.train[:3] == M.train
    )
    assert who(d.train[3:]) == [(9, 8), (11, 27)], "behind Market's largest identity 7 and camera 6"
    three = get_data(f"VR={tmp_path / 'VeRi'}+M={market}+M={market}")
    pids = [
        {i.pid for i in part}
        for part in (three.train[:2], three.train[2:5], three.train[5:], three.query + three.gallery)
    ]
    assert sum(map(len, pids)) == len(set.union(*pids)) == 2 + 2 + 2 + 1
    none = join_sets(ReIDData([Item("a", 3)], [], [], "x", True), ReIDData([Item("b", 0)], [], [], "y", True))
    assert who(none.train) == [(3, None), (4, None)] and none.same_cam_ok


def test_options_after_the_path(tmp_path):
    draw(tmp_path / "VehicleID" / "image", [f"{k:07d}.jpg" for k in range(6)])
    (tmp_path / "VehicleID" / "train_test_split").mkdir()
    for name, rows in (
        ("train_list", [(0, 9), (1, 9)]),
        ("test_list_2400", [(2, 5), (3, 5)]),
        ("test_list_800", [(4, 6), (5, 6)]),
    ):
        (tmp_path / "VehicleID" / "train_test_split" / f"{name}.txt").write_text(
            "".join(f"{k:07d} {p}\n" for k, p in rows)
        )
    assert who(get_data(f"VID={tmp_path}::2400").gallery) == [(5, None)] and who(
        get_data(f"VID={tmp_path}").gallery
    ) == [(6, None)]
    with pytest.raises(InputError, match="expected ::2400 after the path"):
        get_data(f"VID={tmp_path}::big")


def test_veri_is_read(tmp_path):
    draw(tmp_path / "VeRi" / "image_train", ["0001_c001_00016460_0.jpg"])
    draw(tmp_path / "VeRi" / "image_query", ["0002_c002_00030600_0.jpg"])
    draw(tmp_path / "VeRi" / "image_test", ["0002_c002_00030600_0.jpg", "0002_c020_00030605_0.jpg"])
    d = veri776(tmp_path)
    assert (who(d.train), who(d.query), who(d.gallery)) == ([(1, 1)], [(2, 2)], [(2, 2), (2, 20)])


def test_vehicleid_is_read(tmp_path):
    root = tmp_path / "VehicleID_V1.0"
    draw(root / "image", [f"{k:07d}.jpg" for k in range(9)])
    (root / "train_test_split").mkdir()
    (root / "train_test_split" / "train_list.txt").write_text("0000007 90\n0000008 91\n")
    (root / "train_test_split" / "test_list_800.txt").write_text(
        "".join(f"{k:07d} {p}\n" for k, p in enumerate([5, 5, 5, 8, 8, 9, 9]))
    )
    d = vehicleid(root)
    assert Counter(i.pid for i in d.gallery) == {5: 1, 8: 1, 9: 1} and Counter(i.pid for i in d.query) == {
        5: 2,
        8: 1,
        9: 1,
    }
    assert (
        not set(d.query) & set(d.gallery) and d.same_cam_ok and {i.cam for i in d.train + d.query + d.gallery} == {None}
    )
    assert vehicleid(root, 800, seed=0) == d and len({tuple(vehicleid(root, seed=s).gallery) for s in range(30)}) > 6
    with pytest.raises(InputError, match="test_list_1600.txt is not in .*test_list_800.txt"):
        vehicleid(root, 1600)


def test_folder_of_folders(tmp_path):
    draw(tmp_path, [f"{n}/{k}.png" for n in ("ada", "ben", "cleo", "dan") for k in range(3)])
    d = folder(tmp_path)
    assert d.same_cam_ok and {i.cam for i in d.train} == {None}
    assert [len(x) for x in (d.train, d.query, d.gallery)] == [6, 2, 4]
    assert {i.pid for i in d.train} | {i.pid for i in d.query} == {0, 1, 2, 3} and {i.pid for i in d.query} == {
        i.pid for i in d.gallery
    }
    assert folder(tmp_path, seed=0) == d and len({tuple(folder(tmp_path, seed=s).train) for s in range(20)}) > 2
    assert len(folder(tmp_path, train_share=0.75).query) == 1


CAM = r"(?P<pid>.+)_cam(?P<cam>\d)"


def test_folder_pattern(tmp_path):
    draw(tmp_path / "pics", [f"{n}_cam{c}.jpg" for n in ("ox", "ape", "yak") for c in (1, 2)])
    (tmp_path / "val.txt").write_text("ape_cam1.jpg\nape_cam2.jpg\n\n")
    for kw in (
        dict(test=tmp_path / "val.txt"),
        dict(test="val.txt"),
        dict(test=["ape_cam1.jpg", "pics/ape_cam2.jpg"]),
        dict(train=[f"{n}_cam{c}.jpg" for n in ("ox", "yak") for c in "12"]),
    ):
        d = folder(tmp_path, CAM, **kw)
        assert who(d.query) == who(d.gallery) == [(0, 1), (0, 2)], "once per camera: query and gallery both"
        assert who(d.train) == [(1, 1), (1, 2), (2, 1), (2, 2)] and not d.same_cam_ok
    draw(tmp_path / "pics", ["ape_cam1_b.jpg"])
    d = folder(tmp_path, CAM, test=["ape_cam1.jpg", "ape_cam1_b.jpg", "ape_cam2.jpg"])
    assert who(d.query) == [(0, 1), (0, 2)] and who(d.gallery) == [(0, 1)]
    assert get_data(f"folder={tmp_path}::{CAM}").train == folder(tmp_path, CAM).train


def test_folder_camera_below(tmp_path):
    draw(tmp_path, [f"{n}/{c}/x{k}.jpg" for n in ("b", "a") for c in ("north", "south") for k in range(2)])
    d = folder(tmp_path, r"^(?P<pid>[^/]+)/(?P<cam>[^/]+)/", train_share=0)
    assert who(d.query) == who(d.gallery) == [(0, 0), (0, 1), (1, 0), (1, 1)] and not d.train


def table(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    return tmp_path / "t.csv"


def test_folder_by_table(tmp_path):
    draw(tmp_path, [f"{k}.jpg" for k in range(8)])
    rows = [
        "0.jpg,ox,north,train",
        "1.jpg,ox,south,train",
        "2.jpg,ape,north,query",
        "3.jpg,ape,south,gallery",
        "4.jpg,yak,north,test",
        "5.jpg,yak,north,test",
        "6.jpg,yak,south,test",
        "7.jpg,eel,north,gallery",
    ]
    f = table(tmp_path, "path, pid, cam, split\n" + "\n".join(rows) + "\n")
    d = folder(f)
    assert (
        who(d.train) == [(2, 0), (2, 1)]
        and who(d.query) == [(0, 0), (3, 0), (3, 1)]
        and who(d.gallery) == [(0, 1), (3, 0), (1, 0)]
    )
    assert get_data(f"folder={f}") == folder(tmp_path, table=f) == d and not d.same_cam_ok
    d = folder(
        table(tmp_path, "path,pid\n" + "".join(f"{k}.jpg,{10 * (k // 2)}\n" for k in range(8))), train_share=0.5, seed=1
    )
    assert (
        d.same_cam_ok
        and {i.pid for i in d.train + d.query} == {0, 10, 20, 30}
        and len(d.train) == 4
        and len(d.query) == len(d.gallery) == 2
    )
    with pytest.warns(UserWarning, match="1 of 3 images listed in the table are missing"):
        folder(table(tmp_path, "path,pid\n0.jpg,1\n1.jpg,1\nlost.jpg,2\n"), train_share=0)


def test_wrong_tables_are_errors(tmp_path):
    draw(tmp_path, ["0.jpg", "1.jpg"])
    for text, said in {
        "file,pid\n0.jpg,1\n": "no column path, only file, pid",
        "path,pid,split\n0.jpg,1,val\n": "the split 'val'",
        "path,pid\n0.jpg,\n": "has no pid in line 2",
        "path,pid\n0.jpg,1\n0.jpg,2\n": "names 0.jpg twice",
        "path,pid\nx.jpg,1\n": "none of the 1 images",
        "": "not a table",
        "path,pid,cam\n0.jpg,1,2\n1.jpg,1,\n": "has no cam in line 3",
    }.items():
        with pytest.raises(InputError, match=said) as e:
            folder(table(tmp_path, text))
        assert "\n" not in str(e.value)


def lines(tmp_path):
    draw(tmp_path / "flat", [f"IMG_{k}.jpg" for k in range(5)])
    draw(tmp_path / "lone", [f"{n}/1.jpg" for n in "abcd"])
    draw(
        tmp_path / "two" / "a", ["query/0001_c1.jpg", "bounding_box_train/0001_c1.jpg", "bounding_box_test/0001_c1.jpg"]
    )
    draw(
        tmp_path / "two" / "b", ["query/0001_c1.jpg", "bounding_box_train/0001_c1.jpg", "bounding_box_test/0001_c1.jpg"]
    )
    (tmp_path / "empty").mkdir()
    t = str(tmp_path)
    return {
        "X=/": "not a data set; expected synth, or one of M, MS, VR, VID, folder",
        "M": "not a data set",
        "M=": "has no path",
        f"M={t}/nowhere": "nowhere is not a folder",
        f"M={t}/empty": "has no bounding_box_train",
        f"MS={t}": "list_train.txt",
        f"VR={t}": "image_train",
        f"VID={t}": "train_test_split",
        f"M={t}/two": "2 folders that look like Market-1501: a, b",
        f"folder={t}/empty": "no images",
        f"folder={t}/nowhere": "not a folder",
        f"folder={t}/flat::{CAM}": "fits none of 5 names, such as IMG_0.jpg, IMG_1.jpg, IMG_2.jpg:",
        f"folder={t}/flat": "fits none of 5 names",
        f"folder={t}/flat::(a": "not a regular expression",
        f"folder={t}/flat::IMG": "no group pid",
        f"folder={t}/flat::(?P<pid>IMG)": "one identity",
        f"folder={t}/lone": "none of the 2 test identities has a match",
        f"M={t}::x": "takes no pattern",
    }


def test_messages_are_one_line_and_say_what_was_expected(tmp_path):
    for spec, said in lines(tmp_path).items():
        with pytest.raises(InputError, match=said) as e:
            get_data(spec)
        assert "\n" not in str(e.value) and isinstance(e.value, ValueError)


def test_wrong_lists_are_errors(tmp_path):
    draw(tmp_path, [f"{n}_cam{c}.jpg" for n in "abc" for c in (1, 2)])
    with pytest.raises(InputError, match="1 of 2 listed images.*z.jpg"):
        folder(tmp_path, CAM, train=["a_cam1.jpg", "z.jpg"])
    with pytest.raises(InputError, match="2 images are both in train and in test"):
        folder(tmp_path, CAM, train=["a_cam1.jpg", "a_cam2.jpg"], test=["a_cam1.jpg", "a_cam2.jpg"])
    with pytest.raises(InputError, match="is not a file"):
        folder(tmp_path, CAM, test="nolist.txt")
    with pytest.raises(InputError, match="train_share is 2"):
        folder(tmp_path, CAM, train_share=2)
    draw(tmp_path, ["d_cam1.jpg"])
    with pytest.warns(UserWarning, match="1 of 4 test identities have no match by another camera"):
        folder(tmp_path, CAM, train_share=0)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
@pytest.mark.parametrize("link", ["file", "folder"])
def test_no_list_leads_out_of_its_folder(tmp_path, link):
    out, own = tmp_path / "elsewhere", tmp_path / "own"
    draw(out, ["0.jpg", "1.jpg"])
    draw(own, ["a.jpg", "b.jpg"])
    if link == "file":
        os.symlink(out / "0.jpg", own / "x.jpg")
    else:
        os.symlink(out, own / "x", target_is_directory=True)
    name = "x.jpg" if link == "file" else "x/0.jpg"
    for row in (name, "../elsewhere/0.jpg", str(out / "0.jpg"), "own/../../elsewhere/0.jpg"):
        with pytest.raises(InputError, match="out of") as e:
            folder(table(own, f"path,pid\na.jpg,1\n{row},2\nb.jpg,1\n"))
        assert "\n" not in str(e.value)
    root = tmp_path / "VehicleID"
    draw(root / "image", ["0000001.jpg"])
    os.symlink(out, root / "image" / "x", target_is_directory=True)
    (root / "train_test_split").mkdir()
    (root / "train_test_split" / "test_list_800.txt").write_text("0000001 5\nx/0 6\n")
    with pytest.raises(InputError, match="out of"):
        vehicleid(root)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_set_may_lie_behind_a_link(tmp_path):
    draw(tmp_path / "disk", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    os.symlink(tmp_path / "disk", tmp_path / "own", target_is_directory=True)
    assert (
        len(folder(table(tmp_path / "own", "path,pid\na.jpg,1\nb.jpg,1\nc.jpg,2\nd.jpg,2\n"), train_share=0.5).train)
        == 2
    )
    os.symlink(tmp_path / "disk" / "a.jpg", tmp_path / "disk" / "e.jpg")  # a link that stays inside
    assert (
        len(folder(table(tmp_path / "disk", "path,pid\na.jpg,1\nb.jpg,1\nc.jpg,2\ne.jpg,2\n"), train_share=0.5).train)
        == 2
    )


ODD = [
    b"<script>alert(1)<.script>",
    b"two\nlines",
    b"car\rriage\ttab",
    b"\x1b[2J",
    b"n" * 200,
    b"\xff\xfe",
    "Zo\u00eb \u4eba".encode(),
    b" # no remark",
    b"(1)",
    b"$x^$",
]


@pytest.fixture
def odd(tmp_path):
    "Names that a file system allows: markup, line breaks, control sequences, very long, bytes without a letter."
    for k, name in enumerate(ODD):
        for c in (1, 2, 3):
            p = os.path.join(os.fsencode(tmp_path), b"$own^$<b>\xff", name + b"_cam%d.jpg" % c)
            os.makedirs(os.path.dirname(p), exist_ok=True)
            with open(p, "wb") as f:
                Image.fromarray(np.random.default_rng(10 * k + c).integers(0, 256, (12, 6, 3), dtype=np.uint8)).save(
                    f, "jpeg"
                )
    return Path(os.path.dirname(os.fsdecode(p)))


plain_names_only = pytest.mark.skipif(
    os.name == "nt" or sys.platform == "darwin", reason="the file system allows no such names"
)


@plain_names_only
def test_odd_names_go_all_the_way(odd, tmp_path):
    d = folder(odd, CAM)
    assert len({i.pid for i in d.train + d.query}) == len(ODD) and len(d.train) == 15
    assert len(data_fingerprint(d)) == 12 and PixelCache(d.train, (12, 6), tmp_path / "cache")[[0, 14]].shape == (
        2,
        12,
        6,
        3,
    )
    for i in d.train[:9]:
        Path(i.path).write_bytes(Path(i.path).read_bytes()[:-100])  # cut off
    said = []
    assert (
        run_check(
            CheckConfig(f"folder={odd}::{CAM}", fix=str(tmp_path / "bad.txt"), figure=str(tmp_path / "check.png")),
            say=said.append,
        )
        == 0
    )
    assert not [c for text in said for c in text.replace("\n", "") if not c.isprintable()] and "\n".join(said).encode()
    assert len((tmp_path / "bad.txt").read_text(encoding="utf-8").splitlines()) == 10 and said[-1].startswith(
        "9 files listed"
    )
    assert folder(odd, CAM).train == d.train and [
        len(get_data(f"folder={odd}::{CAM}::exclude={tmp_path / 'bad.txt'}").train),
        len(d.query),
    ] == [6, 15]
    with pytest.raises(InputError) as e:
        load_image(d.train[0].path)
    assert str(e.value).isprintable() and str(e.value).encode()


@plain_names_only
def test_a_run_on_odd_names(odd, tmp_path, capsys):
    "Training, the run's page, a gallery, the model's card."
    from msinet.cli import main
    from msinet.deploy.hub import to_hub
    from msinet.figures.report import report
    from msinet.config import TRAIN
    from msinet.training.train import train

    run = train(replace(TRAIN["smoke"], data=f"folder={odd}::{CAM}", out=str(tmp_path / "run\n<b>$x^$"), epochs=1)).run
    capsys.readouterr()
    page = report(run).read_text(encoding="utf-8")
    assert "<b>$" not in page and "run\\n&lt;b&gt;$x^$" in page and "&lt;b&gt;\\udcff" in page
    os.symlink(run, tmp_path / "plain")
    main(
        [
            "query",
            "--run",
            str(tmp_path / "plain"),
            "--gallery",
            str(tmp_path / "gallery"),
            "--index",
            str(odd),
            "--image",
            sorted(map(str, odd.iterdir()))[-1],
            "--k",
            "30",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 31 and all(
        line.isprintable() for line in lines
    )  # 29 of 30 images, since the query is not a result, and two files
    assert "folder=…" in (to_hub(run, tmp_path / "hub") / "README.md").read_text(encoding="utf-8")


def test_names_that_are_too_long(tmp_path):
    draw(tmp_path, ["a.jpg", "b.jpg"])
    with pytest.warns(UserWarning, match="1 of 3 images listed in the table are missing"):
        folder(table(tmp_path, f"path,pid\na.jpg,1\nb.jpg,1\n{'x' * 300}.jpg,2\n"), train_share=0)
    for spec in (
        "M={}",
        "MS={}",
        "VR={}",
        "VID={}",
        "folder={}",
        "folder={}.csv",
        f"folder={tmp_path}::(?P<pid>.)::exclude={{}}",
    ):
        with pytest.raises(InputError):
            get_data(spec.format("/" + "x" * 300))
    with pytest.raises(InputError, match="not a file"):
        folder(tmp_path, r"(?P<pid>.)", train="x" * 300)


def test_relabel_and_summary():
    items = [Item("a", 30, 1), Item("b", 4, 2), Item("c", 30, 2), Item("d", 11, None)]
    assert relabel(items) == ([2, 0, 2, 1], [4, 11, 30])
    s = summary(ReIDData(items, items[:1], [], "x"))
    assert s.loc["train"].tolist() == [3, 4, 2] and s.loc["gallery"].tolist() == [0, 0, 0]
    assert list(DATASETS) == ["M", "MS", "VR", "VID", "folder"]


# pixels


@pytest.fixture
def items(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 256, (37 + k, 21, 3), dtype=np.uint8)).save(
            tmp_path / f"{k:02d}.jpg", quality=95
        )
    return [Item(str(tmp_path / f"{k:02d}.jpg"), k // 4, k % 4) for k in range(12)]


def test_cache_is_pillow(items, tmp_path):
    want = np.stack(
        [np.asarray(Image.open(i.path).convert("RGB").resize((16, 32), Image.Resampling.BILINEAR)) for i in items]
    )
    for where in (None, tmp_path / "cache", tmp_path / "cache"):
        cache = PixelCache(items, (32, 16), where)
        assert len(cache) == 12 and cache[[3, 0, 3]].dtype == torch.uint8
        assert np.array_equal(cache[range(12)].numpy(), want)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npy"]


def test_cache_follows_files(items, tmp_path):
    PixelCache(items, (8, 8), tmp_path / "c")
    Image.new("RGB", (9, 9), (7, 7, 7)).save(items[0].path)
    os.utime(items[0].path, (1, 1))
    assert (PixelCache(items, (8, 8), tmp_path / "c")[[0]] == 7).all()
    PixelCache(items, (8, 9), tmp_path / "c")
    PixelCache(items[1:], (8, 8), tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 4


def test_broken_images_are_errors(items, tmp_path):
    whole = open(items[5].path, "rb").read()
    for wrong in (whole[: len(whole) // 2], b"", b"not an image"):
        open(items[5].path, "wb").write(wrong)
        with pytest.raises(InputError, match="05.jpg is not a readable image") as e:
            PixelCache(items, (8, 8), tmp_path / "c")
        assert "\n" not in str(e.value) and not list((tmp_path / "c").iterdir())
    with pytest.raises(InputError, match="nowhere.jpg"):
        load_image("nowhere.jpg")


def many(tmp_path, n=2000):
    "n names of one tiny image."
    Image.new("RGB", (4, 8), (200, 100, 50)).save(tmp_path / "x.png")
    for k in range(n):
        os.link(tmp_path / "x.png", tmp_path / f"{k:05d}.png")
    return [Item(str(tmp_path / f"{k:05d}.png"), k // 4, k % 4) for k in range(n)]


@pytest.mark.parametrize("where", [None, "c"])
def test_a_few_bad_images_are_named_and_left_out(tmp_path, where):
    items = many(tmp_path)
    os.unlink(items[5].path)
    for attempt in range(2):  # built, then opened
        with pytest.warns(UserWarning, match="left out: .*00005.png is not a readable image") as told:
            dl = train_loader(items, (8, 4), P=4, K=4, dir=where and tmp_path / where)
        assert (
            len(told) == 1 and list(dl.pixels.bad) == [5] and (dl.pixels[[5]] == 0).all() and (dl.pixels[[6]] > 0).all()
        )
        assert 5 not in sum(dl.sampler.batches(), []) and dl.n_ids == 500
    with pytest.raises(InputError, match="00005.png"):
        PixelCache(items, (8, 4), where and tmp_path / where)
    with pytest.raises(InputError, match="00005.png"):
        test_loader(items, (8, 4), dir=where and tmp_path / where)
    os.link(tmp_path / "x.png", items[5].path)
    assert not PixelCache(items, (8, 4), where and tmp_path / where).bad, "mended"
    for k in range(3):
        open(items[k].path.replace(".png", ".tmp"), "wb").close()
        os.replace(items[k].path.replace(".png", ".tmp"), items[k].path)
    with pytest.raises(InputError, match="3 unreadable so far, at most 2 of 2000 may be"):
        train_loader(items, (8, 4), P=4, K=4, dir=where and tmp_path / where)


def test_an_image_that_can_be_read_again(tmp_path, monkeypatch):
    items = many(tmp_path, 1000)
    import msinet.data.loaders as b

    real = b.read_image

    def flaky(path):
        if path.endswith("00007.png"):
            raise InputError("00007.png is not a readable image (network)")
        return real(path)

    monkeypatch.setattr(b, "read_image", flaky)
    with pytest.warns(UserWarning, match="00007"):
        PixelCache(items, (8, 4), tmp_path / "c", max_bad=0.001)
    monkeypatch.setattr(b, "read_image", real)
    assert (PixelCache(items, (8, 4), tmp_path / "c")[[7]] > 0).all()


def test_stream_gives_what_the_cache_gives(items, tmp_path):
    cache, stream = PixelCache(items, (16, 8)), PixelStream(items, (16, 8), max_bad=0.2)
    assert_close(stream[[3, 0, 3]], cache[[3, 0, 3]], rtol=0, atol=0)
    a, b = (list(train_loader(items, (16, 8), P=2, K=2, seed=3, pad=2, cached=c)) for c in (True, False))
    for (xa, ya), (xb, yb) in zip(a, b):
        assert_close(xa, xb, rtol=0, atol=0)
        assert_close(ya, yb)
    os.unlink(items[1].path)
    with pytest.warns(UserWarning, match="01.jpg"):
        x = stream[[1, 2, 4, 5]]
    assert_close(x[0], cache[[2]][0]) and list(stream.bad) == [1]
    for k in (4, 8):
        os.unlink(items[k].path)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="2 of 12 may be"):
        stream[[4, 5, 8, 9]]


def test_incomplete_blocks_are_made_again(items, tmp_path):
    PixelCache(items, (8, 8), tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    want = file.read_bytes()
    for wrong in (want[:-100], want[:40], b""):
        file.write_bytes(wrong)
        assert len(PixelCache(items, (8, 8), tmp_path / "c")) == 12 and file.read_bytes() == want
    (old := tmp_path / "c" / "x.1.part").touch()
    os.utime(old, (1, 1))
    (young := tmp_path / "c" / "y.1.part").touch()
    PixelCache(items, (9, 9), tmp_path / "c")
    assert not old.exists() and young.exists(), "files of killed runs are removed after an hour"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot take 0.0 GB"):
        PixelCache(items, (8, 8), tmp_path / "file" / "c")


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs processes that begin as copies of this one"
)


def test_a_full_disk_is_an_error(items, tmp_path, monkeypatch):
    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match="No space left on device.*with room"):
        PixelCache(items, (8, 8), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


def build(paths, dir):
    PixelCache([Item(p, 0) for p in paths], (64, 32), dir)


@needs_fork
def test_two_processes_may_build_one_block(items, tmp_path):
    paths = [i.path for i in items]
    runs = [multiprocessing.get_context("fork").Process(target=build, args=(paths, tmp_path / "c")) for _ in range(2)]
    for r in runs:
        r.start()
    for r in runs:
        r.join(60)
        assert r.exitcode == 0
    assert [p.suffix for p in (tmp_path / "c").iterdir()] == [".npy"]
    assert_close(PixelCache(items, (64, 32), tmp_path / "c")[[0, 5]], PixelCache(items, (64, 32))[[0, 5]])


@needs_fork
def test_a_killed_run_leaves_no_block(tmp_path, monkeypatch):
    import msinet.data.loaders as b

    items, real = many(tmp_path, 1500), b.read_image
    monkeypatch.setattr(b, "read_image", lambda p: (time.sleep(0.02), real(p))[1])
    run = multiprocessing.get_context("fork").Process(target=build, args=([i.path for i in items], tmp_path / "c"))
    run.start()
    end = time.time() + 60
    while not list(tmp_path.glob("c/*.part")) and time.time() < end:
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(run.pid, signal.SIGKILL)
    run.join(10)
    assert not list(tmp_path.glob("c/*.npy")) and list(tmp_path.glob("c/*.part"))
    monkeypatch.setattr(b, "read_image", real)
    assert (PixelCache(items, (64, 32), tmp_path / "c")[[1499]] > 0).all()


def test_rendered_images_need_no_files():
    d = synth(n_ids=1)
    x = PixelCache(d.train[:2], (64, 32))[[0, 1]]
    assert np.array_equal(x[0].numpy(), render(d.train[0].path)) and x.shape == (2, 64, 32, 3)


# batches


def test_batches_have_p_identities_and_k_images():
    rng = np.random.default_rng(0)
    for trial in range(20):
        P, K, n = rng.integers(2, 6), rng.integers(1, 5), rng.integers(8, 14)
        labels = np.concatenate([np.full(rng.integers(1, 12), l) for l in range(n)])
        rng.shuffle(labels)
        size, used = Counter(labels.tolist()), Counter()
        batches = pk_batches(labels, P, K, trial, 0)
        for b in batches:
            assert sorted(Counter(labels[b].tolist()).values()) == [K] * P
            assert all(len(set(labels[b[j : j + K]])) == 1 for j in range(0, P * K, K))
            used.update(b)
        assert all(n == 1 for i, n in used.items() if size[labels[i]] >= K), "repeated although there are enough"
        left = {l: max(s // K, 1) for l, s in size.items()}
        for b in batches:
            for l in set(labels[b].tolist()):
                left[l] -= 1
        assert min(left.values()) >= 0 and sum(v > 0 for v in left.values()) < P, "stopped too early"


def test_sampler_repeats_and_resumes():
    labels = np.repeat(np.arange(9), 7).tolist()
    epochs = lambda s, n: [list(s) for _ in range(n)]
    a, b = PKSampler(labels, 4, 3, seed=1), PKSampler(labels, 4, 3, seed=1)
    first = epochs(a, 3)
    assert first == epochs(b, 3) and first[0] != first[1] and a.epoch == 3
    assert list(PKSampler(labels, 4, 3, seed=2)) != first[0]
    b.set_epoch(1)
    assert len(b) == len(first[1]) and list(b) == first[1]
    for done in range(len(first[1]) + 1):
        c, d = PKSampler(labels, 4, 3, seed=1), PKSampler(labels, 4, 3, seed=1)
        c.set_epoch(1)
        it = iter(c)
        [next(it) for _ in range(done)]
        d.load_state_dict(c.state_dict())
        d.set_epoch(1)
        assert list(d) == first[1][done:] and list(d) == first[2]


def test_too_few_identities_are_an_error():
    with pytest.raises(InputError, match="3 identities, but a batch takes P = 4"):
        PKSampler([0, 1, 2, -1], 4, 2)
    with pytest.raises(InputError, match="batch of 62"):
        n_identities(62, 4)
    assert n_identities(64, 4) == 16
    s = PKSampler([0, 0, -1, -1, 1, 1], 2, 2)
    assert sorted(sum(s, [])) == [0, 1, 4, 5], "negative labels are left out"


def test_train_loader(items):
    make = lambda **kw: train_loader(items, (16, 8), P=2, K=2, seed=3, pad=2, **kw)
    a, b = make(jitter=(0.4, 0.4, 0.3)), make(jitter=(0.4, 0.4, 0.3))
    seen = []
    for (xa, ya), (xb, yb) in zip(a, b):
        assert_close(xa, xb, rtol=0, atol=0)
        assert_close(ya, yb)
        assert xa.shape == (4, 3, 16, 8) and xa.dtype == torch.float32 and xa.is_contiguous()
        assert ya.tolist() == [items[i].pid for i in a.last]
        seen.append(xa)
    assert a.n_ids == 3 and len(seen) == len(make()) and a.labels.tolist() == [i.pid for i in items]
    c = make(jitter=(0.4, 0.4, 0.3))
    it = iter(c)
    next(it)
    d = make(jitter=(0.4, 0.4, 0.3))
    d.load_state_dict(c.state_dict())
    assert_close(torch.stack([x for x, _ in d]), torch.stack(seen[1:]), rtol=0, atol=0)
    plain = make(flip=0, random_erasing=0)
    plain.aug = lambda x, gen: x
    x, _ = next(iter(plain))
    assert_close(x, plain.pixels[plain.last])


def test_test_loader(items):
    want = torch.stack(
        [
            torch.from_numpy(np.asarray(Image.open(i.path).resize((8, 16), Image.Resampling.BILINEAR)).copy())
            for i in items
        ]
    )
    want = (want.permute(0, 3, 1, 2) / 255 - torch.tensor((0.485, 0.456, 0.406))[:, None, None]) / torch.tensor(
        (0.229, 0.224, 0.225)
    )[:, None, None]
    for keep in (2**30, 0):
        dl = test_loader(items, (16, 8), bs=5, keep=keep)
        assert_close(torch.cat(list(dl)), want)
        assert [len(x) for x in dl] == [5, 5, 2] and len(dl) == 3
        assert dl.items == items


# augmentation


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_flip():
    x = torch.randint(256, (64, 3, 5, 4), generator=gen(), dtype=torch.uint8)
    assert_close(random_flip(random_flip(x, gen(), 1.0), gen(), 1.0), x)
    assert_close(random_flip(x, gen(), 0.0), x)
    y = random_flip(x, gen(1), 0.5)
    turned = (y == x.flip(3)).flatten(1).all(1)
    assert ((y == x).flatten(1).all(1) ^ turned).all() and 20 < turned.sum() < 44


def test_pad_crop_is_a_shift():
    x = torch.randint(1, 256, (200, 3, 6, 5), generator=gen(), dtype=torch.uint8)
    y, seen = pad_crop(x, gen(), 2), Counter()
    padded = torch.zeros(200, 3, 10, 9, dtype=torch.uint8)
    padded[:, :, 2:-2, 2:-2] = x
    for i in range(200):
        hits = [(t, l) for t in range(5) for l in range(5) if (padded[i, :, t : t + 6, l : l + 5] == y[i]).all()]
        assert len(hits) == 1
        seen.update(hits)
    assert len(seen) == 25
    assert_close(pad_crop(x, gen(), 0), x)


def test_erase_statistics():
    class Shape:  # boxes need no pixels
        shape, device = (20000, 3, 256, 128), "cpu"

        def __len__(self):
            return 20000

    top, left, h, w = random_boxes(Shape(), gen())
    area = (h * w) / (256 * 128)
    assert abs(area.mean() - 0.202) < 0.004
    assert_close(area.quantile(torch.tensor([0.05, 0.95])), torch.tensor([0.038, 0.377]), atol=0.004, rtol=0)
    assert ((top >= 0) & (left >= 0) & (top + h <= 256) & (left + w <= 128)).all()
    ratio = (h / w)[area > 0.03]
    assert ratio.min() > 0.27 and ratio.max() < 3.7
    middle = Shape()
    middle.shape = (20000, 3, 2000, 2000)
    _, _, h, w = random_boxes(middle, gen())
    assert abs((h / w).mean() - (0.3 + 1 / 0.3) / 2) < 0.08, "aspect is uniform (mean 1.82), not log-uniform (1.26)"


def test_erase_fills():
    x = torch.zeros(50, 3, 32, 16)
    y = random_erase(x, gen(), 1.0, (1.0, 2.0, 3.0))
    for i in range(50):
        box = y[i, 0] == 1
        rows, cols = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        assert box.sum() == len(rows) * len(cols) > 0 and rows[-1] - rows[0] + 1 == len(rows)
        assert (y[i, :, box] == torch.tensor([1.0, 2.0, 3.0])[:, None]).all() and (y[i, :, ~box] == 0).all()
    assert (random_erase(x, gen(), 0.0) == 0).all() and (x == 0).all()


def test_augment():
    x = torch.randint(256, (8, 20, 10, 3), generator=gen(), dtype=torch.uint8)
    before = x.clone()
    assert_close(augment(x, gen(), 0, 0, 0), normalise(x.permute(0, 3, 1, 2)))
    a, b = (augment(x, gen(4), jitter=(0.4, 0.4, 0.3)) for _ in range(2))
    assert_close(a, b, rtol=0, atol=0)
    assert (
        a.shape == (8, 3, 20, 10)
        and a.dtype == torch.float32
        and not a.equal(augment(x, gen(5), jitter=(0.4, 0.4, 0.3)))
    )
    assert_close(x, before)
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
    assert_close(black, -torch.tensor((0.485, 0.456, 0.406)) / torch.tensor((0.229, 0.224, 0.225)))


def test_jitter_range():
    x = torch.full((4000, 4, 2, 3), 100, dtype=torch.uint8)
    y = augment(x, gen(), 0, 0, 0, jitter=(0.4, 0, 0))[:, 0, 0, 0] * 0.229 * 255 + 0.485 * 255
    assert y.min() > 59 and y.max() < 141 and abs(y.mean() - 100) < 2


# the per-image reference


@pytest.fixture
def transforms():
    try:
        from msinet.core import ensure_torchvision

        ensure_torchvision()
        from torchvision import transforms as T
    except (ImportError, RuntimeError) as e:
        pytest.skip(f"torchvision does not import: {e}")
    return T


def reference(T, size, *more):
    return T.Compose(
        [
            T.Resize(size, interpolation=T.InterpolationMode.BILINEAR),
            *more,
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def test_float_path_is_the_reference(items, transforms):
    "Everything that is not random is equal to torchvision on Pillow images, image by image."
    T, size = transforms, (32, 16)
    pics = [Image.open(i.path).convert("RGB") for i in items]
    each = lambda *more: torch.stack([reference(T, size, *more)(p) for p in pics])
    x = PixelCache(items, size)[range(12)]
    assert_close(torch.cat(list(test_loader(items, size, bs=5))), each(), rtol=0, atol=1e-6)
    assert_close(augment(x, gen(), 0, 0, 0), each(), rtol=0, atol=1e-6)
    assert_close(augment(x, gen(), 1, 0, 0), each(T.RandomHorizontalFlip(1.0)), rtol=0, atol=1e-6)
    y = augment(x, gen(3), 0, 2, 0)
    for p, got in zip(pics, y):
        shifts = [
            reference(T, size, T.Pad(2), T.Lambda(lambda im, t=t, l=l: T.functional.crop(im, t, l, *size)))(p)
            for t in range(5)
            for l in range(5)
        ]
        assert min((s - got).abs().max() for s in shifts) < 1e-6, "one of the 25 windows"


def test_colours_follow_the_reference(items, transforms):
    "The three adjustments, factor by factor; torchvision rounds to bytes after each, which allows one level."
    from msinet.data.loaders import PixelCache
    import msinet.data.augment as a

    F = transforms.functional
    x = PixelCache(items, (32, 16))[range(12)].permute(0, 3, 1, 2)
    for f in (0.6, 1.3):
        for base, ref in ((0, F.adjust_brightness), (None, F.adjust_saturation), ("mean", F.adjust_contrast)):
            v = x.float()
            b = 0 if base == 0 else a.luma(v) if base is None else a.luma(v).mean((2, 3), keepdim=True)
            assert (a.blend(v, b, f) - ref(x, f).float()).abs().max() < 1.6
