"""Whatever is in a file, a list, a name or a configuration: it works, or it is an `InputError` of one line. A
thousand cases in one process."""

import io
import json
import pickle
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from msinet.engine.run import check_same, read_run_json
from msinet.weights import from_official, load_weights, save_weights
from msinet.engine.checkpoint import newest, to_bytes, add_checksum, check_checksum, load
from msinet.cli import parse_args
from msinet.errors import InputError
from msinet.core import check_inside
from msinet.data.folder import folder
from msinet.engine.run import read_config, read_run
from msinet.deploy.hub import HubNet, load_hub as load_model
from msinet.data.items import read_list
from msinet.engine.learner import read_log
from msinet.engine.lock import Lock
from msinet.figures.report import section
from msinet.entries import resume
from msinet.config import SearchConfig
from msinet.space import FUSES, derived
from msinet.config import TrainConfig
from msinet.weights import open_net, load_initial_weights
from msinet.necks import FBLNeck, ReIDNet
from msinet.weights import from_osnet

CASES = dict(
    names=120, lists=120, tables=60, genotypes=185, checkpoints=200, released=100, models=100, runs=100, words=15
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda s: st.lists(s) | st.dictionaries(st.text(), s),
    max_leaves=8,
)


def fuzz(n):
    return settings(
        max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def fine(f, *args):
    "The result, or None where an `InputError` of one line was raised. Anything else is a failure."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return f(*args)
        except InputError as e:
            assert str(e).isprintable(), str(e)
            return None


def test_a_thousand():
    assert sum(CASES.values()) == 1000


@fuzz(CASES["names"])
@given(st.text(min_size=1))
def test_names(name):
    "A name in a list never leads out of its folder, and never becomes markup in the page."
    if fine(check_inside, name, "the list") is None and ".." not in name.replace("\\", "/").split("/"):
        import os.path

        assert not os.path.normpath(os.path.join("/data", name)).startswith("/data/../")
    assert "<script" not in section(name + "<script>", name + "<script>")


@fuzz(CASES["lists"])
@given(
    st.lists(st.text() | st.tuples(st.text(), st.integers()).map(lambda t: f"{t[0]} {t[1]}"))
    | st.binary().map(lambda b: [b.decode("latin1")])
)
def test_lists(tmp_path_factory, lines):
    file = tmp_path_factory.getbasetemp() / "list.txt"
    file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    rows = fine(read_list, file)
    assert rows is None or all(isinstance(n, str) and isinstance(p, int) and ".." not in n.split("/") for n, p in rows)


@fuzz(CASES["tables"])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["0/0.png", "1/1.png", "../x.png", "/etc/hosts", ""]) | st.text(), st.text(), st.text()
        ),
        max_size=4,
    ),
    st.sampled_from(["path,pid,cam", "path,pid,split", "pid,path,x", ""]),
)
def test_tables(own, rows, head):
    (own / "table.csv").write_text("\n".join([head, *(",".join(r) for r in rows)]), encoding="utf-8", errors="replace")
    data = fine(folder, own / "table.csv")
    assert data is None or all(str(own) in i.path for i in data.train + data.query + data.gallery)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for pid in range(2):
        (root / str(pid)).mkdir()
        for k in range(2):
            Image.fromarray(np.zeros((8, 4, 3), np.uint8)).save(root / str(pid) / f"{k}.png")
    return root


@fuzz(CASES["genotypes"])
@given(
    st.text()
    | st.text("NEGA", min_size=10, max_size=13)
    | st.integers()
    | st.lists(st.sampled_from("NEGA"), min_size=12, max_size=12)
)
def test_genotypes(word):
    net = fine(derived, word, (4, 16, 16, 16))
    assert net is None or len(word) == 12


@fuzz(CASES["checkpoints"])
@given(
    st.binary(max_size=300) | st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 3)), st.booleans()
)
def test_checkpoints(tmp_path_factory, what, again):
    "Bytes of any kind; a whole file with a byte changed, cut, doubled; pickles: read right, or refused."
    path = tmp_path_factory.getbasetemp() / "any.pt"
    good = to_bytes(dict(a=torch.arange(50.0), epoch=3))
    if isinstance(what, tuple):
        k, x, how = what[0] % len(good), what[1], what[2]
        what = [good[:k] + bytes([x]) + good[k + 1 :], good[:k], good + good[:k], good[k:]][how]
    elif again:
        what = add_checksum(what + b"\0\0") if len(what) > 2 else what
    path.write_bytes(what)
    s = fine(load, path)
    assert not isinstance(s, dict) or torch.equal(s["a"], torch.arange(50.0)) and s["epoch"] == 3
    fine(newest, path), fine(load_weights, path), fine(open_net, path)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("how", ["plain", "torch", "legacy", "nested"])
def test_code_is_not_run(how, tmp_path):
    path, evil = tmp_path / "evil.pth", dict(state_dict={"conv1.weight": Evil()}) if how == "nested" else Evil()
    if how == "plain":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(InputError, match="exec"):
        load(path)
    b = io.BytesIO(path.read_bytes())
    if zipfile.is_zipfile(b) and how == "torch":
        path.write_bytes(add_checksum(path.read_bytes()))  # a right seal makes it no better
        assert check_checksum(path.read_bytes())
        with pytest.raises(InputError, match="exec"):
            load(path)


SMALL = ReIDNet(derived("G" * 12, (4, 16, 16, 16)), FBLNeck((16, 16, 16), 2))


@fuzz(CASES["released"])
@given(
    JSON
    | st.dictionaries(
        st.sampled_from(
            [
                "conv1.conv.weight",
                "cells.0.conv1a.conv.weight",
                "cells.9.x",
                "fc.weight",
                "module.head.bias",
                "state_dict",
                "conv2.0.conv1.conv.weight",
            ]
        ),
        JSON,
    )
)
def test_released_weights(tmp_path_factory, sd):
    fine(from_official, sd), fine(from_osnet, sd)
    path = tmp_path_factory.getbasetemp() / "released.pth"
    torch.save(sd, path)
    before = {k: v.clone() for k, v in SMALL.state_dict().items()}
    assert fine(load_initial_weights, SMALL, str(path)) is None
    assert all(torch.equal(v, before[k]) for k, v in SMALL.state_dict().items())


@fuzz(CASES["models"])
@given(
    JSON
    | st.fixed_dictionaries(
        dict(
            genotype=st.sampled_from(["G" * 12, "X", 3, None]),
            channels=st.lists(st.integers(-1, 40), max_size=5) | JSON,
            rho=st.integers(-1, 4) | JSON,
        ),
        optional=dict(
            backbone=st.sampled_from(["msinet", "osnet", "no", 3]),
            fuse=st.sampled_from([*FUSES, "x", []]),
            size=st.lists(st.integers(0, 64), max_size=3),
            n_ids=st.integers(-2, 3) | st.text(),
        ),
    )
)
def test_models(tmp_path_factory, about):
    "What a file of weights or a model's folder says about itself may be anything."
    dir = tmp_path_factory.getbasetemp() / "model"
    dir.mkdir(exist_ok=True)
    save_weights(SMALL, dir / "model.safetensors", about)
    (dir / "config.json").write_text(json.dumps(about))
    fine(open_net, dir), fine(load_model, dir)


@fuzz(CASES["runs"])
@given(
    JSON
    | st.fixed_dictionaries(dict(search=JSON))
    | st.fixed_dictionaries(dict(train=st.dictionaries(st.sampled_from(["rho", "lr", "epochs", "data"]), JSON))),
    st.binary(max_size=60),
)
def test_runs(tmp_path_factory, about, junk):
    "A run's folder with any configuration, history and lock."
    dir = tmp_path_factory.getbasetemp() / "run"
    dir.mkdir(exist_ok=True)
    (dir / "config.json").write_text(json.dumps(about))
    (dir / "history.jsonl").write_bytes(b'{"epoch": 1}\n' + junk)
    (dir / ".lock").write_bytes(junk)
    assert {"epoch": 1} in read_log(dir / "history.jsonl") or b"\n" not in b"\n"
    read_run_json(dir, "config"), fine(lambda: Lock(dir).release())
    for kind in (SearchConfig, TrainConfig):
        fine(read_config, dir, kind)
    fine(read_run, dir)
    fine(check_same, dir, "train", dict(rho=3, lr=0.1), dict(data="x"))
    if not isinstance(about, dict) or not (about.get("train") or about.get("search")):
        assert fine(resume, dir) is None


@fuzz(CASES["words"])
@given(
    st.lists(
        st.sampled_from(
            [
                "search",
                "train",
                "demo",
                "data",
                "check",
                "--resume",
                "--out",
                "--preset",
                "smoke",
                "=",
                "--lr",
                "x",
                "-1",
                "--size",
                "8",
            ]
        )
        | st.text(max_size=8),
        max_size=6,
    )
)
def test_words(words):
    "A command line of any words: parsed, refused with a usage line, or an `InputError`."
    import contextlib

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            fine(parse_args, words)
        except SystemExit as e:
            assert e.code in (0, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize(
    "lie",
    [
        dict(channels=[64, 10**6, 10**6, 10**6]),
        dict(rho=10**7),
        dict(n_ids=10**9),
        dict(backbone="vit_b", size=[10**5, 10**5]),
    ],
)
def test_a_file_cannot_ask_for_more_memory_than_it_brings(lie, tmp_path):
    "What a model's folder says about itself is compared with its weights before anything is built."
    import resource

    about = dict(genotype="G" * 12, channels=[4, 16, 16, 16], rho=3, size=[32, 16]) | lie
    save_weights(SMALL, tmp_path / "model.safetensors", about)
    (tmp_path / "config.json").write_text(json.dumps(about))
    start, limits = time.perf_counter(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS,
        (int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**29, limits[1]),
    )
    try:
        for f in (
            (load_model, HubNet.from_pretrained) if "n_ids" in lie else (load_model, HubNet.from_pretrained, open_net)
        ):
            with pytest.raises(InputError, match="differ|too few"):
                f(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.perf_counter() - start < 20
