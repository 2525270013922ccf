"""Runs that are killed, interrupted, starved of disk, damaged and doubled: each survives, or stops with one clear
line, and no finished epoch is lost.

Processes are forked from a server that has imported everything, so a fault costs a second. In a process `trap` counts
events (steps,
epochs, measurements, and every fsync, rename and link on the disk) and sends a signal at one of them.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import msinet.engine.loop
import msinet.quickstart
from msinet.engine.checkpoint import checkpoint_paths, load, newest
from msinet.errors import InputError
from msinet.engine.learner import Learner, NotFinite
from msinet.engine.lock import Lock
from msinet.config import SEARCH, TRAIN, UNSUP, PretrainConfig
from msinet.training.search import SearchStep, search
from msinet.training.pretrain import ClassStep, pretrain
from msinet.figures.report import report
from msinet.training.train import TrainStep, train
from msinet.unsup.train import ClusterStep, uda, usl

resource = pytest.importorskip("resource", reason="signals, limits and forks of Unix")
ROOT = Path(__file__).parent.parent
TINY = dict(
    data="synth:n_ids=8,n_test=4,cams=4,visits=2,frames=2",
    size=(32, 16),
    channels=(8, 16, 24, 32),
    batch=4,
    K=2,
    epochs=3,
)
UNNAMED = dict(iters=2, k1=4, k2=2, watch=9, eval_every=1)
CONFIGS = dict(
    search=replace(SEARCH["smoke"], **TINY),
    train=replace(TRAIN["smoke"], **TINY | dict(batch=8), eval_every=1),
    usl=replace(UNSUP["smoke"], **TINY, **UNNAMED, method="hdcrl"),
    uda=replace(UNSUP["smoke"], **TINY, **UNNAMED, method="idm"),
)
GO = dict(search=search, train=train, usl=usl, uda=uda)
NAMED = ("search", "train")  # the regimes that know identities
WITHOUT = ("genotype.json", "metrics.json", "model.safetensors", "pseudo.npy", "watched.npy")
KEPT = dict(
    search=("alphas.npy", "alpha_steps.npy", "genotype.json", "metrics.json", "search.safetensors"),
    train=("genotype.json", "metrics.json", "model.safetensors"),
    usl=WITHOUT,
    uda=WITHOUT,
)


def trap(at=0, sig=signal.SIGKILL, then=None, only=""):
    "Count events; at the `at`-th send a signal to this process, or call `then`."
    n = [0]

    def tick(name):
        if only and name != only:
            return
        n[0] += 1
        if n[0] == at:
            then() if then else os.kill(os.getpid(), sig)

    def watch(where, name, label, half=False):
        old = getattr(where, name)

        def new(*a, **kw):
            if half and n[0] + 1 == at:  # in the middle of writing: half of the bytes are there
                os.ftruncate(a[0], os.fstat(a[0]).st_size // 2) if not stat.S_ISDIR(os.fstat(a[0]).st_mode) else None
            tick(label)
            return old(*a, **kw)

        setattr(where, name, new)

    for step in (SearchStep, TrainStep, ClusterStep, ClassStep):
        watch(step, "__call__", "step")
    watch(Learner, "one_epoch", "epoch")
    watch(msinet.engine.loop, "evaluate_loaders", "evaluate")
    watch(os, "fsync", "fsync", half=not only and sig == signal.SIGKILL and not then)
    watch(os, "replace", "replace")
    watch(os, "link", "link")
    return n


def job(kind, out, answer, change, at, sig, fault, only):
    "In a process of its own: a run, and what became of it in the file `answer`."
    warnings.simplefilter("always")
    said = dict(warned=[])
    warnings.showwarning = lambda m, *_: said["warned"].append(str(m))
    n = trap(at, sig, FAULTS_IN.get(fault) and (lambda: FAULTS_IN[fault](out)), only)
    try:
        GO[kind](replace(CONFIGS[kind], out=out, **change))
        said["end"] = "done"
    except BaseException as e:
        said.update(end=type(e).__name__, text=str(e))
    Path(answer).write_text(json.dumps(dict(said, events=n[0])))


FAULTS_IN = dict(
    small=lambda out: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY)),
    ro=lambda out: subprocess.run(["mount", "-o", "remount,ro", str(Path(out).parent)], check=True),
    full=lambda out: fill(Path(out).parent),
)


def fill(dir):
    "Leave nothing on a disk."
    with open(dir / "filler", "wb", buffering=0) as f:
        try:
            while f.write(b"\0" * 4096):
                pass
        except OSError:
            pass


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["test_faults", "warm"])


def perform(kind, out, at=0, sig=signal.SIGKILL, fault="", only="", **change):
    "Run in another process; what became of it. A killed one has no answer."
    answer = Path(f"{out}.{at}.{change.get('resume', False)}.answer")
    if answer.parent.name == "disk":
        answer = answer.parent.parent / answer.name
    answer.unlink(missing_ok=True)
    p = CONTEXT.Process(target=job, args=(kind, str(out), str(answer), change, at, sig, fault, only))
    p.start()
    p.join(120)
    if p.is_alive():
        p.kill()
        raise AssertionError("a run hung")
    return json.loads(answer.read_text()) if answer.exists() else dict(end="killed", code=p.exitcode, warned=[])


def outcome(kind, run):
    "All that a run gave, without times and without its own name."
    rows = [
        {k: v for k, v in json.loads(t).items() if k != "seconds"}
        for t in (run / "history.jsonl").read_text().splitlines()
    ]
    return dict({n: (run / n).read_bytes() for n in KEPT[kind]}, history=rows)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    "Rendered persons of these tests go to a folder of their own; the server of processes inherits it."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MSINET_CACHE", str(tmp_path_factory.mktemp("cache")))
        m.setenv("OMP_NUM_THREADS", "1")
        m.setenv(
            "PYTHONPATH",
            os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        )
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, worker_id):
    """Each run without any fault: what it gave, and how many events it had. One worker makes them, the others wait
    for it."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "whole"
    try:
        root.mkdir()
    except FileExistsError:
        end = time.time() + 120
        while not (root / "events.json").exists():
            assert time.time() < end, "the runs without a fault failed in the other worker"
            time.sleep(0.2)
    else:
        with ThreadPoolExecutor(2) as pool:
            said = dict(zip(GO, pool.map(lambda kind: perform(kind, root / kind), GO)))
        assert all(s["end"] == "done" for s in said.values()), said
        (root / "events").write_text(json.dumps({kind: s["events"] for kind, s in said.items()}))
        os.replace(root / "events", root / "events.json")
    events = json.loads((root / "events.json").read_text())
    return {kind: dict(events=events[kind], gave=outcome(kind, root / kind), run=root / kind) for kind in GO}


# --- killed and interrupted ---

KILLS = dict(
    search=12, train=12, usl=6, uda=6
)  # SIGKILL, evenly over all events of a run, the writing of checkpoints among them
STOPS = dict(search=3, train=3, usl=2, uda=2)  # SIGTERM and SIGINT each


def points(n, total):
    return sorted({round(1 + k * (total - 1) / (n - 1)) for k in range(n)})


def killed_and_resumed(kind, run, at, sig, whole):
    first = perform(kind, run, at, sig)
    done = newest_epoch(kind, run)
    again = perform(kind, run, resume=True)
    assert again["end"] == "done", (at, first, again)
    assert outcome(kind, run) == whole["gave"], (kind, at, sig)
    return first, done, at


def newest_epoch(kind, run):
    s = newest(run / f"{kind}.pt") if run.exists() else None
    logged = (run / "history.jsonl").read_text().splitlines() if (run / "history.jsonl").exists() else []
    epoch = s["epoch"] if s else 0
    assert len(logged) - 1 <= epoch <= max(len(logged), epoch) <= 3, "an epoch that was over is lost"
    return epoch


@pytest.mark.parametrize("kind", GO)
def test_killed_at_any_moment(kind, whole, tmp_path):
    "SIGKILL at moments all over a run, half-written checkpoints included: resumed, it gives the same to the last bit."
    with ThreadPoolExecutor(2) as pool:
        at = points(KILLS[kind], whole[kind]["events"])
        said = list(
            pool.map(lambda k: killed_and_resumed(kind, tmp_path / f"k{k}", k, signal.SIGKILL, whole[kind]), at)
        )
    assert len(said) == KILLS[kind] and all(first["end"] == "killed" for first, _, _ in said)
    assert {done for _, done, _ in said} >= ({0, 1, 2} if kind in NAMED else {0, 1})


@pytest.mark.parametrize("kind", GO)
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(kind, sig, whole, tmp_path):
    """SIGTERM and Ctrl-C: saved where it stands, in the middle of an epoch too, and left with its own exception;
    resumed, the same."""
    with ThreadPoolExecutor(2) as pool:
        at = points(STOPS[kind], whole[kind]["events"])
        said = list(pool.map(lambda k: killed_and_resumed(kind, tmp_path / f"s{k}", k, sig, whole[kind]), at))
    assert len(said) == STOPS[kind]
    for first, _, _ in said:
        assert first["end"] == "Stopped" and "--resume" in first["text"], first
    assert not list(tmp_path.glob("*/.lock"))


INSIDE = ("search", "usl", "uda")


@pytest.mark.parametrize("kind", INSIDE)
def test_stopped_inside_an_epoch_keeps_its_steps(kind, whole, tmp_path):
    "The second epoch's first step is not lost: labels, memories, teacher and bridge go on from there."
    at = {"search": 1}.get(kind, 3)
    first = perform(kind, tmp_path / "run", at, signal.SIGTERM, only="step")
    s = load(tmp_path / "run" / f"{kind}.pt")
    assert first["end"] == "Stopped" and s["epoch"] == (at - 1) // 2 and len(s["outs"]) == 1, first
    assert perform(kind, tmp_path / "run", resume=True)["end"] == "done"
    assert outcome(kind, tmp_path / "run") == whole[kind]["gave"]


def test_released_order_is_resumed_too(tmp_path):
    "α first, and none in an epoch's first step: an epoch that is taken up in its middle has had its first step."
    released = dict(alpha_first=True, leak=True, val_stats=True, centroids=False)
    assert perform("search", tmp_path / "whole", **released)["end"] == "done"
    assert perform("search", tmp_path / "run", 1, signal.SIGTERM, only="step", **released)["end"] == "Stopped"
    assert perform("search", tmp_path / "run", resume=True, **released)["end"] == "done"
    assert outcome("search", tmp_path / "run") == outcome("search", tmp_path / "whole")


def test_two_processes_give_the_same_files(whole, tmp_path):
    "One seed, two processes, two folders: everything but times and the folder's name is equal, checkpoints included."
    for kind in GO:
        assert perform(kind, tmp_path / kind)["end"] == "done"
        a, b = whole[kind]["run"], tmp_path / kind
        assert outcome(kind, a) == outcome(kind, b) and sorted(os.listdir(a)) == sorted(os.listdir(b))
        assert (a / "environment.json").read_bytes() == (b / "environment.json").read_bytes()
        config = [json.loads((r / "config.json").read_text().replace(str(r), "RUN")) for r in (a, b)]
        assert config[0] == config[1]
        states = [load(r / f"{kind}.pt") for r in (a, b)]
        assert same(*[{k: v for k, v in s.items() if k != "history"} for s in states])
    env = json.loads((b / "environment.json").read_text())
    assert (
        env["device"] == "cpu"
        and env["flags"]["dtype"] == "torch.float32"
        and {len(m) for m in env["data"][kind].values()} == {12}
    )


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


HELPERS = """
import multiprocessing
from msinet.engine.lock import Signals
with Signals():
    for _ in range(20):
        with multiprocessing.get_context("fork").Pool(4) as pool:
            pool.map(abs, range(8))
"""


def test_helpers_leave_without_a_word():
    """Processes that render are forked while signals are listened to: told to end, they end, and don't take it for
    the user's Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, "-c", HELPERS], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as p:
        try:
            assert p.communicate(timeout=60)[1] == "" and p.returncode == 0
        finally:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)


def test_the_page_of_a_run_that_stopped(whole, tmp_path):
    "Nothing is found yet, and there are numbers to look at."
    shutil.copytree(whole["search"]["run"], tmp_path / "run")
    for name in ("genotype.json", "metrics.json", "search.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert "<h2>Architecture" in report(tmp_path / "run").read_text(encoding="utf-8")


# --- disks ---


@pytest.fixture
def disk(tmp_path):
    "A disk of our own. Needs the right to mount; without it the limits on a file's size are tested alone."
    d = tmp_path / "disk"
    d.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(d)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    yield d
    subprocess.run(["umount", "-l", str(d)], check=True)


DISKS = (
    "full from the start",
    "full after an epoch",
    "read-only from the start",
    "read-only after an epoch",
    "a file's size is limited from the start",
    "a file's size is limited after an epoch",
)


@pytest.mark.parametrize("kind", GO)
def test_a_disk_that_is_full_or_closed_from_the_start(kind, disk):
    fill(disk)
    said = perform(kind, disk / "run")
    assert said["end"] == "InputError" and "make room" in said["text"], said
    assert not (disk / "run").exists()
    (disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = perform(kind, disk / "run")
    assert said["end"] == "InputError" and "Read-only" in said["text"], said


@pytest.mark.parametrize("fault", ["full", "ro"])
@pytest.mark.parametrize("kind", GO)
def test_a_disk_that_fills_up_or_closes_later(kind, fault, disk, whole):
    "The run goes on to its end with warnings; what was saved before stays; with room again it is finished."
    said = perform(kind, disk / "run", 2, fault=fault, only="epoch")
    assert said["end"] == "InputError" and "then --resume" in said["text"], said
    assert any("could not be written" in w for w in said["warned"])
    assert newest(disk / "run" / f"{kind}.pt")["epoch"] >= 1
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "filler").unlink(missing_ok=True)
    assert perform(kind, disk / "run", resume=True)["end"] == "done"
    assert outcome(kind, disk / "run") == whole[kind]["gave"]


@pytest.mark.parametrize("kind", GO)
def test_a_files_size_is_limited(kind, whole, tmp_path):
    said = perform(kind, tmp_path / "a", 1, fault="small", only="evaluate")
    assert said["end"] == "InputError" and "room for" in said["text"] and not (tmp_path / "a").exists(), said
    said = perform(kind, tmp_path / "b", 2, fault="small", only="epoch")
    assert said["end"] == "InputError" and newest(tmp_path / "b" / f"{kind}.pt")["epoch"] == 1, said
    assert perform(kind, tmp_path / "b", resume=True)["end"] == "done"
    assert outcome(kind, tmp_path / "b") == whole[kind]["gave"]


# --- damaged files ---

DAMAGES = {
    "empty": lambda b: b"",
    "half": lambda b: b[: len(b) // 2],
    "a byte short": lambda b: b[:-1],
    "a byte too many": lambda b: b + b"\0",
    "zeros": lambda b: b"\0" * len(b),
    "another file": lambda b: b"not a checkpoint",
}
FLIPS = 24  # one bit, all over the file


@pytest.mark.parametrize("kind", GO)
def test_a_damaged_checkpoint_costs_an_epoch(kind, whole, tmp_path):
    """Whatever happens to the newest file: the one before is taken, and it is said. A flipped bit is never read as
    a weight."""
    shutil.copytree(whole[kind]["run"], tmp_path / "run")
    path = tmp_path / "run" / f"{kind}.pt"
    good, states = path.read_bytes(), (load(path), load(checkpoint_paths(path)[1]))
    assert [s["epoch"] for s in states] == [3, 2]
    rng = np.random.default_rng(0)
    cuts = [f(good) for f in DAMAGES.values()]
    cuts += [
        good[:k] + bytes([good[k] ^ (1 << int(rng.integers(8)))]) + good[k + 1 :]
        for k in rng.integers(0, len(good), FLIPS)
    ]
    cuts += [
        good[:-k] + bytes([good[-k] ^ 1]) + (good[1 - k :] if k > 1 else b"") for k in (1, 65, 72, 73, 74, 90)
    ]  # in the seal itself, too
    for bad in cuts:
        path.write_bytes(bad)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            s = newest(path)
        if s["epoch"] == 2:
            assert "going on from" in str(said[0].message)
        else:
            assert same(s, states[0])  # nothing that matters was hit
    path.unlink()
    assert newest(path)["epoch"] == 2
    path.write_bytes(b"")
    said = perform(kind, tmp_path / "run", resume=True)
    assert said["end"] == "done" and any("going on from" in w for w in said["warned"]), said
    assert outcome(kind, tmp_path / "run") == whole[kind]["gave"]
    for p in checkpoint_paths(path):
        if p.exists():
            p.write_bytes(b"")
    with pytest.raises(InputError, match="are damaged"):
        newest(path)


def test_files_of_before_the_seal_are_opened(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole["search"]["run"], run)
    s = load(checkpoint_paths(run / "search.pt")[1])
    for p in checkpoint_paths(run / "search.pt"):
        p.unlink(missing_ok=True)
    s["parts"].pop("Health")
    torch.save({k: v for k, v in s.items() if k not in ("outs", "best")}, run / "search.pt")
    assert perform("search", run, resume=True)["end"] == "done"
    ours, theirs = outcome("search", run), whole["search"]["gave"]
    assert {k: v for k, v in ours.items() if k != "history"} == {k: v for k, v in theirs.items() if k != "history"}


def test_half_made_folders(whole, tmp_path):
    "Nothing but a half-written description, a half line of history, leftovers of a write: a run starts anew in it."
    for k, (name, text) in enumerate(
        {
            "config.json": '{"search": {"ep',
            "environment.json": "",
            "history.jsonl": '{"epoch": 1, "phase": "sea',
            ".search.pt.123": "half",
        }.items()
    ):
        run = tmp_path / str(k)
        run.mkdir()
        (run / name).write_text(text)
        assert perform("search", run, resume=True)["end"] == "done"
        assert outcome("search", run) == whole["search"]["gave"] and not (run / ".search.pt.123").exists()
    (tmp_path / "empty").mkdir()
    assert perform("search", tmp_path / "empty", resume=True)["end"] == "done"


def test_another_run_is_not_mixed_in(whole, tmp_path):
    shutil.copytree(whole["search"]["run"], tmp_path / "run")
    for change in (
        dict(seed=1),
        dict(rho=2),
        dict(channels=(8, 16, 24, 40)),
        dict(data="synth:n_ids=8,n_test=4,cams=4,visits=2,frames=3"),
    ):
        said = perform("search", tmp_path / "run", resume=True, **change)
        assert said["end"] == "InputError" and "began with" in said["text"], said
    said = perform("search", tmp_path / "run", resume=True, lr=1e-3, epochs=4)
    assert said["end"] == "done" and any("lr 0.001 instead of" in w for w in said["warned"]), said


# --- two at once ---


def test_two_runs_on_one_folder(whole, tmp_path):
    "The second one is refused and harms nothing."
    run = tmp_path / "run"
    run.mkdir()
    lock = Lock(run)
    said = perform("search", run, resume=True)
    assert said["end"] == "InputError" and "is in use by process" in said["text"] and os.listdir(run) == [".lock"], said
    lock.release()
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda k: perform("search", tmp_path / "race", at=1000 + k), range(2)))
    assert sorted(e["end"] for e in ends) == ["InputError", "done"], ends
    assert outcome("search", tmp_path / "race") == whole["search"]["gave"]


LOCKS = {
    "of a killed process": (dict(pid=2**22 + 1, born="5", host=socket.gethostname()), 0, True),
    "of a process whose number was given out again": (
        dict(pid=os.getpid(), born="5", host=socket.gethostname()),
        0,
        True,
    ),
    "of another machine, silent": (dict(pid=1, born="5", host="elsewhere"), 600, True),
    "of another machine, alive": (dict(pid=1, born="5", host="elsewhere"), 10, False),
    "garbage": ("not json", 0, True),
    "empty": ("", 0, True),
}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_that_is_there(name, tmp_path):
    who, age, free = LOCKS[name]
    (tmp_path / ".lock").write_text(who if isinstance(who, str) else json.dumps(who))
    t = (tmp_path / ".lock").stat().st_mtime - age
    os.utime(tmp_path / ".lock", (t, t))
    if free:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            Lock(tmp_path).release()
        assert bool(said) == isinstance(who, dict) and not (tmp_path / ".lock").exists()
    else:
        with pytest.raises(InputError, match="in use by process 1 on elsewhere"):
            Lock(tmp_path)


# --- images and numbers ---


@pytest.fixture
def images(make_identities, tmp_path):
    return make_identities(tmp_path / "own")


@pytest.mark.parametrize("cached", [True, False])
def test_a_picture_goes_away_in_an_epoch(cached, images, tmp_path, monkeypatch):
    """Decoded before, it isn't missed. Decoded when drawn, the run stops and names it; with the image back it goes
    on to the same end."""
    cfg = replace(CONFIGS["train"], data=f"folder={images}", batch=4, cache=cached, epochs=2, eval_every=0)
    want = train(replace(cfg, out=str(tmp_path / "whole")))
    keep = tmp_path / "kept"
    plain, seen = TrainStep.__call__, [0]

    def step(self, batch):
        seen[0] += 1
        if seen[0] == 2:
            shutil.move(images, keep)
        return plain(self, batch)

    with monkeypatch.context() as m:
        m.setattr(TrainStep, "__call__", step)
        if cached:
            train(replace(cfg, out=str(tmp_path / "run")))
        else:
            with pytest.raises(InputError, match=r"own/\d/\d.png"):
                train(replace(cfg, out=str(tmp_path / "run")))
    shutil.move(keep, images)
    got = train(replace(cfg, out=str(tmp_path / "run"), resume=True))
    assert got.metrics == want.metrics and all(
        torch.equal(a, b) for a, b in zip(want.net.state_dict().values(), got.net.state_dict().values())
    )


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", NAMED)
def test_no_number_any_more(kind, where, whole, images, tmp_path, monkeypatch):
    """Stopped at that step, with the batch's file names; the last good state is kept, and the run goes on from it
    to the same end."""
    cfg = (
        replace(CONFIGS[kind], data=f"folder={images}", batch=4, overlap=1.0)
        if kind == "search"
        else replace(CONFIGS[kind], data=f"folder={images}", batch=4)
    )
    want = GO[kind](replace(cfg, out=str(tmp_path / "whole")))
    step = SearchStep if kind == "search" else TrainStep
    plain, seen = step.__call__, [0]

    def broken(self, batch):
        out = plain(self, batch)
        seen[0] += 1
        if seen[0] == at:
            if where == "loss":
                return {k: v * float("nan") for k, v in out.items()}
            next(p for p in self.net.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return out

    at = 0
    with monkeypatch.context() as m:
        m.setattr(step, "__call__", broken)
        GO[kind](replace(cfg, out=str(tmp_path / "count")))
        per, seen[0] = seen[0] // 3, 0
        at = per + 1  # the first step of the second epoch
        with pytest.raises(NotFinite, match=r"own/\d/\d.png") as e:
            GO[kind](replace(cfg, out=str(tmp_path / "run")))
    said = str(e.value)
    assert (
        "\n" not in said
        and "epoch 2, step 1" in said
        and "lower the learning rate" in said
        and ("gradient" in said) == (where == "gradient")
    )
    assert newest(tmp_path / "run" / f"{kind}.pt")["epoch"] == 1 and seen[0] == at
    got = GO[kind](replace(cfg, out=str(tmp_path / "run"), resume=True))
    assert got.metrics == want.metrics and all(
        torch.equal(a, b) for a, b in zip(want.net.state_dict().values(), got.net.state_dict().values())
    )


# --- weights to start from ---

PRETRAINED = (("step", 2), ("replace", 4), ("epoch", 3))  # moments of a pre-training


def pretrain_job(out, data, answer, only, at, sig, resume):
    "A pre-training in a process of its own."
    warnings.simplefilter("ignore")
    trap(at, sig, only=only)
    said = "done"
    try:
        pretrain(
            PretrainConfig(
                data=data,
                out=out,
                resume=resume,
                channels=(8, 16, 24, 32),
                size=(32, 32),
                epochs=3,
                batch=4,
                workers=0,
                lr=0.01,
            )
        )
    except BaseException as e:
        said = type(e).__name__
    Path(answer).write_text(json.dumps(said))


def test_a_pretraining_is_broken_off(images, tmp_path):
    "Killed, or told to stop: it goes on from the last epoch that was over, to the same weights."
    for part in ("train", "val"):
        shutil.copytree(images, tmp_path / "classes" / part)

    def go(name, only="", at=0, sig=signal.SIGKILL, resume=False):
        answer = tmp_path / f"{name}.answer"
        answer.unlink(missing_ok=True)
        p = CONTEXT.Process(
            target=pretrain_job,
            args=(str(tmp_path / name), str(tmp_path / "classes"), str(answer), only, at, sig, resume),
        )
        p.start()
        p.join(120)
        return json.loads(answer.read_text()) if answer.exists() else "killed"

    def gave(name):
        return [(tmp_path / name / n).read_bytes() for n in ("metrics.json", "backbone.safetensors")]

    def fault(case):
        k, (only, at) = case
        sig = (signal.SIGTERM, signal.SIGKILL)[k % 2]
        assert go(f"run{k}", only, at, sig) == ("Stopped", "killed")[k % 2], (only, at)
        assert go(f"run{k}", resume=True) == "done" and gave(f"run{k}") == gave("whole"), (only, at)
        return 1

    assert go("whole") == "done"
    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(fault, enumerate(PRETRAINED))) == len(PRETRAINED)


# --- the whole job ---

PHASES = {
    "search": ("step", 2),
    "derive": ("found_line", 1),
    "train": ("step", 7),
    "evaluate": ("evaluate", 5),
    "report": ("report", 1),
}


def demo_job(out, answer, only, at, sig, resume):
    "The whole job in a process of its own, from the shell's words."
    from msinet.cli import main

    warnings.simplefilter("ignore")
    trap(at, sig, only=only)
    if only in ("report", "found_line"):
        old = getattr(msinet.quickstart, only)
        setattr(msinet.quickstart, only, lambda *a: (os.kill(os.getpid(), sig), old(*a))[1])
    code = 0
    try:
        main(
            f"demo --preset smoke --data {TINY['data']} --size 32 16 --epochs-search 2 --epochs-train 2 "
            f"--out {out}".split()
            + ["--resume"] * resume
        )
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        code = repr(e)
    Path(answer).write_text(json.dumps(code))


def test_the_main_job_is_interrupted_in_every_phase(tmp_path):
    """Search, derive, train, evaluate, report; told to stop and killed: the exit code says which, and --resume
    ends where it would have ended."""

    def go(name, only="", at=0, sig=signal.SIGKILL, resume=False):
        answer = tmp_path / f"{name}.answer"
        answer.unlink(missing_ok=True)
        p = CONTEXT.Process(target=demo_job, args=(str(tmp_path / name), str(answer), only, at, sig, resume))
        p.start()
        p.join(150)
        assert p.exitcode is not None
        return json.loads(answer.read_text()) if answer.exists() else "killed"

    def gave(name):
        run = tmp_path / name
        return [(run / n).read_bytes() for n in ("alphas.npy", "genotype.json", "metrics.json", "model.safetensors")]

    def fault(case):
        (phase, (only, at)), sig = case
        name = f"{phase}{int(sig)}"
        code = go(name, only, at, sig)
        assert code == {signal.SIGKILL: "killed", signal.SIGTERM: 143, signal.SIGINT: 130}[sig], (phase, sig, code)
        assert go(name, resume=True) == 0
        assert gave(name) == gave("whole"), (phase, sig)
        assert (tmp_path / name / "report.html").exists()
        return 1

    with ThreadPoolExecutor(2) as pool:
        assert go("whole") == 0
        sigs = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        cases = [(p, sigs[k % 3]) for k, p in enumerate(PHASES.items())]
        assert sum(pool.map(fault, cases)) == len(PHASES)


# --- what the page of results says ---


def test_the_page_of_results_counts_what_is_tried():
    "The reliability table's numbers are those of the lists above."
    kinds = len(GO)
    tried = {
        "killed": sum(KILLS.values()) + 1,
        "told to stop": 2 * sum(STOPS.values()) + len(INSIDE) + 1 + 2,
        "every phase": len(PHASES),
        "disk": kinds * len(DISKS),
        "damaged": kinds * (len(DAMAGES) + FLIPS + 6 + 2) + 1,
        "half-made": 5,
        "two runs": 2 + len(LOCKS),
        "images and numbers": 2 + 2 * len(NAMED),
    }
    cells = json.loads((ROOT / "nbs/guide/results.ipynb").read_text(encoding="utf-8"))["cells"]
    table = next(t for t in ("".join(c["source"]) for c in cells) if t.startswith("## Reliability"))
    rows = {
        m[1].strip(): (int(m[2]), int(m[3])) for m in re.finditer(r"^\| (.+?) \|.*\| (\d+) \| (\d+) \|$", table, re.M)
    }
    assert {k: v[0] for k, v in rows.items() if k != "all"} == tried
    assert rows["all"] == (sum(tried.values()),) * 2 and all(a == b for a, b in rows.values())
    n = sum(tried.values())
    assert f"[{n} of {n} faults](nbs/guide/results.ipynb#reliability)" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )
