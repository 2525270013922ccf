"The rendered set: the same on every machine, exact masks, and readable as a published set."

import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msinet.rendering import world as module
from msinet.rendering.persons import ACTORS, Pose
from msinet.data.sets import get_data
from msinet.errors import InputError
from msinet.rendering.tracer import View, cast
from msinet.rendering.scene import KINDS, camera, keyed
from msinet.rendering.world import LEVELS, Dials, Shot, World, identity, is_rendered, lookalikes, mask, parse_path
from msinet.rendering.world import render, camera_and_canvas, take_photo, stage, synth, write_layout
from msinet.rendering.vehicles import BODIES, footprint, mark_apart, marks_of

SMALL = dict(n_ids=4, n_test=3, cams=3, visits=3, height=32)


def crc(a):
    return zlib.crc32(np.ascontiguousarray(a).tobytes())


def small(**kw):
    return synth(**{**SMALL, **kw})


def images(data):
    return data.train + data.query + data.gallery


# ---------------------------------------------------------------- the same on every machine
@pytest.mark.parametrize('kind', KINDS)
def test_order_of_drawing_does_not_matter(kind):
    paths = [i.path for i in images(small(kind=kind))][::3]
    forward = {p: crc(render(p)) for p in paths}
    for cache in (camera_and_canvas, identity):
        cache.cache_clear()
    assert {p: crc(render(p)) for p in reversed(paths)} == forward


@pytest.mark.parametrize('kind', KINDS)
def test_another_process_draws_the_same(kind):
    paths = [i.path for i in images(small(kind=kind))][::9]
    code = (
        'import zlib; from msinet.rendering.world import render; '
        f'print([zlib.crc32(render(p).tobytes()) for p in {paths!r}])'
    )
    out = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONHASHSEED': '7'},
        check=True,
    )
    assert out.stdout.strip() == str([crc(render(p)) for p in paths])


def test_more_people_and_cameras_change_nothing():
    few, more = synth(n_ids=6, cams=5, visits=3), synth(n_ids=9, cams=8, visits=3)
    for name in ('train', 'query', 'gallery'):
        old, new = set(getattr(few, name)), set(getattr(more, name))
        pids = {i.pid for i in old}
        assert pids < {i.pid for i in new}
        assert {i for i in new if i.pid in pids and i.cam <= 5} <= old  # visits only move to cameras that are new
    assert {i for i in synth(n_ids=9, cams=5, visits=3).train if i.pid < 12} == set(few.train)


def test_geometry_is_golden():
    "Masks and label maps do not change; when a change is wanted, raise `DRAWING` and renew these numbers."
    world = World('person', 'B', 3, 64, LEVELS['hard'])
    masks = [
        np.round(255 * stage(Shot(world, s, n, n % 6 + 1, n % 3))[1]).astype(np.uint8)
        for s in ('train', 'test')
        for n in range(1, 9)
    ]
    labels = []
    for n in range(1, 9):
        shapes = ACTORS['person'].shapes(identity(world, 'train', n), Pose(n, 0.4, 0.1, 0.2))
        labels.append(cast(shapes, View((64, 32), n, 0.3, 54, o=(0, 0, 0.5)))[1].astype(np.uint8))
    assert module.DRAWING == 1
    assert (crc(np.stack(masks)), crc(np.stack(labels))) == (2571401367, 2204235751)


def test_geometry_of_vehicles_is_golden():
    world = World('vehicle', 'A', 3, 64, LEVELS['hard'])
    masks = [
        np.round(255 * stage(Shot(world, s, n, n % 6 + 1, n % 3))[1]).astype(np.uint8)
        for s in ('train', 'test')
        for n in range(1, 13)
    ]
    labels = []
    for n in range(1, 13):
        shapes = KINDS['vehicle'].shapes(identity(world, 'train', n), Pose())
        labels.append(cast(shapes, View((64, 64), n, 0.3, 11, o=(0, 0, 0.8)))[1].astype(np.uint8))
    assert (crc(np.stack(masks)), crc(np.stack(labels))) == (619641726, 2303821163)


def test_each_name_has_its_own_random_generator():
    assert keyed('a', 1).random() == keyed('a', 1).random() != keyed('a', 2).random()
    assert repr(camera(0, 'person', 'A', 4)) == repr(camera(0, 'person', 'A', 4)) != repr(camera(1, 'person', 'A', 4))
    world = World('person', 'A', 0, 32, LEVELS['easy'])
    one, other = (take_photo(Shot(replace(world, seed=s), 'train', 1, 1, 0))[0] for s in (0, 1))
    assert not np.array_equal(one, other)


# ---------------------------------------------------------------- the set
def test_a_set_is_a_reid_set():
    data = synth(n_ids=5, n_test=4, cams=6, visits=4, frames=3, test_frames=2)
    assert (len(data.train), len(data.query), len(data.gallery)) == (5 * 4 * 3, 4 * 4, 4 * 4)
    train, test = {i.pid for i in data.train}, {i.pid for i in data.query}
    assert min(train) == 1 and not train & test and test == {i.pid for i in data.gallery}
    assert {i.cam for i in images(data)} <= set(range(1, 7)) and len({i.path for i in images(data)}) == len(
        images(data)
    )
    for i in images(data):
        shot = parse_path(i.path)
        assert is_rendered(i.path) and (shot.number, shot.cam, shot.path) == (i.pid, i.cam, i.path)
    for q in data.query:
        assert any(g.pid == q.pid and g.cam != q.cam for g in data.gallery)


def test_images_and_masks_have_the_right_shapes():
    for i in images(small(height=48))[::7]:
        x, m = render(i.path), mask(i)
        assert x.shape == (48, 24, 3) and x.dtype == np.uint8 and x.std() > 5
        assert m.shape == (48, 24) and m.dtype == np.float32 and 0 <= m.min() and m.max() <= 1 and 0.05 < m.mean() < 0.6
        np.testing.assert_array_equal(m, mask(i.path))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('level', LEVELS)
def test_masks_are_exact(level, kind):
    "Without the person or vehicle, what is outside the mask stays as it is, and what is inside changes."
    world = World(kind, 'A', 1, 64, LEVELS[level])
    for n in range(1, 13):
        shot = Shot(world, 'test', n, n % 6 + 1, 0)
        (image, m), (empty, none) = stage(shot), stage(shot, actor=False)
        changed = np.abs(image - empty).max(-1) > 0
        assert not none.any() and not changed[m == 0].any() and changed[m > 0].mean() > 0.98


def test_lookalikes_share_what_is_large():
    data = synth(n_ids=8, level=Dials(group=4, n_fine=2))
    group = lookalikes(data)
    sizes = np.unique(list(group.values()), return_counts=True)[1]
    assert set(group) == {i.pid for i in images(data)} and (sizes == 4).all()
    people = {p: identity(parse_path(data.train[0].path).world, 'train', p) for p in (1, 3, 9)}
    assert people[1] != people[3] and people[1].top.colour == people[3].top.colour
    assert (people[1].top.freq, people[1].build) != (people[9].top.freq, people[9].build)


def test_vehicles_are_square_seen_whole_and_from_where_the_domain_says():
    for d, low, high in (('A', 14, 26), ('B', 20, 36)):
        cams = [camera(0, 'vehicle', d, c) for c in range(8)]
        assert all(low <= np.rad2deg(c.elevation) <= high for c in cams)
        for i in images(small(kind='vehicle', domain=d, height=48))[::5]:
            x, m = render(i.path), mask(i)
            assert x.shape == (48, 48, 3) and m.shape == (48, 48) and m.mean() > 0.08
    for shot in (parse_path(i.path) for i in small(kind='vehicle', domain='B', level=Dials(camera_strength=0.0)).train):
        m = stage(shot)[1]
        assert (m > 0).any(1).sum() < 32 and (m > 0).any(0).sum() <= 32


def test_lookalike_vehicles_share_what_the_factory_made():
    data = synth('vehicle', 'B', n_ids=8, level='hard')
    world, group = parse_path(data.train[0].path).world, lookalikes(data)
    cars = {p: identity(world, 'train', p) for p in sorted({i.pid for i in data.train})}
    for p in cars:
        for q in cars:
            same = (cars[p].body, cars[p].colour, cars[p].tint) == (cars[q].body, cars[q].colour, cars[q].tint)
            assert same == (group[p] == group[q]) and (p == q or cars[p] != cars[q])


def test_marks_suit_the_body_and_shadows_are_ellipses():
    car = KINDS['vehicle'].base(keyed('car'), 'A')
    for body in BODIES:
        v = replace(car, body=body)
        assert len(marks_of(v)[1]) >= KINDS['vehicle'].n_cues
        assert mark_apart(v, keyed(1), 8) != v
        for a in np.linspace(0, 6, 7):  # the sheared ellipse holds the ends of the half axes: x = p·forward, q·left
            across, away, shift = footprint(v, a)
            for half, (x, y) in (
                (0.58 * BODIES[body].long, (np.sin(a), np.cos(a))),
                (0.6 * BODIES[body].wide, (np.cos(a), -np.sin(a))),
            ):
                np.testing.assert_allclose(((half * x - shift * half * y) / across) ** 2 + (half * y / away) ** 2, 1)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(kind='horse'),
        dict(kind='vehicle', level=Dials(n_fine=9)),
        dict(domain='C'),
        dict(level='simple'),
        dict(visits=7),
        dict(visits=1),
        dict(height=33),
        dict(n_ids=0, n_test=0),
        dict(test_frames=1),
        dict(seed=-1),
        dict(level=Dials(n_fine=9)),
        dict(level=Dials(bg_bias=2.0)),
    ],
)
def test_mistakes_are_reported_in_one_line(wrong):
    with pytest.raises(InputError) as e:
        synth(**wrong)
    assert '\n' not in str(e.value) and 'expected' in str(e.value)


def test_names_without_an_image_are_errors(tmp_path):
    for f in (parse_path, render, mask):
        for path in ('synth:person', 'synth:person,A,0:train/1/c1/f0', f'{tmp_path}/none.jpg'):
            with pytest.raises(InputError, match='expected'):
                f(path)


# ---------------------------------------------------------------- on disk
def loaders():
    from msinet.data import layouts as data

    return dict(M=data.market1501, MS=data.msmt17, VR=data.veri776, VID=data.vehicleid)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_market_layout_comes_back(tmp_path):
    data = small()
    there = write_layout(data, tmp_path, 'M')
    back = loaders()['M'](tmp_path)
    assert there.name == 'Market-1501-v15.09.15' and sorted(p.name for p in tmp_path.iterdir()) == [there.name]
    for name in ('train', 'query', 'gallery'):
        key = lambda i: (i.pid, i.cam)
        assert sorted(map(key, getattr(data, name))) == sorted(key(i) for i in getattr(back, name) if i.pid)
    assert len(list(there.rglob('-1_c*.jpg'))) == 6 and sum(i.pid == 0 for i in back.gallery) == 6
    files = {(i.pid, i.cam, int(Path(i.path).name.split('_')[2])): i for i in images(back)}
    for i in images(data):
        disk = files[i.pid, i.cam, parse_path(i.path).frame]
        assert np.abs(render(disk.path).astype(int) - render(i.path)).mean() < 4
        np.testing.assert_allclose(mask(disk), mask(i), atol=0.51 / 255)
    assert lookalikes(back) == lookalikes(data)


@pytest.mark.parametrize(
    'layout,kind',
    [('MS', 'person'), ('VR', 'person'), ('VID', 'person'), ('MS', 'vehicle'), ('VR', 'vehicle'), ('VID', 'vehicle')],
)
def test_other_layouts_come_back(layout, kind, tmp_path):
    data = small(kind=kind)
    write_layout(data, tmp_path, layout, procs=1)
    back = loaders()[layout](tmp_path)
    count = lambda d, *names: sorted(
        np.unique([i.pid for n in names for i in getattr(d, n)], return_counts=True)[1].tolist()
    )
    groups = lambda d: {lookalikes(d)[i.pid] for i in d.query}
    assert count(back, 'train') == count(data, 'train') and groups(back) == groups(data) == {1, 3}
    assert len({i.pid for i in back.query}) == 3 and {i.pid for i in back.query} == {i.pid for i in back.gallery}
    if layout == 'VR':
        assert count(back, 'gallery') == count(data, 'query', 'gallery')
    if layout == 'VID':
        assert len(back.query) + len(back.gallery) == len(data.query) + len(data.gallery)
    if layout != 'VID':
        assert sorted(i.cam for i in back.query) == sorted(i.cam for i in data.query)
    assert all(mask(i).shape == ((32, 16) if kind == 'person' else (32, 32)) for i in images(back))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_vehicles_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv('MSINET_CACHE', str(tmp_path))
    data = get_data('synth:kind=vehicle,domain=B,n_ids=3,n_test=2,cams=3,visits=2', (32, 32))
    assert len({i.pid for i in data.train}) == 3 and {i.pid for i in data.query} == {2, 4}
    assert render(data.train[0].path).shape == (32, 32, 3) and mask(data.train[0]).max() > 0.9
    assert sum(i.pid == 0 for i in data.gallery) == 6


def test_a_set_is_written_once_and_whole(tmp_path, monkeypatch):
    data = small(n_ids=2, n_test=2)
    there = write_layout(data, tmp_path, procs=1)
    monkeypatch.setattr(module, 'save_shot', lambda job: 1 / 0)
    assert write_layout(data, tmp_path, procs=1) == there  # not drawn again
    with pytest.raises(InputError, match='another set'):
        write_layout(small(n_ids=2, n_test=2, seed=5), tmp_path)
    next(there.rglob('0001*.jpg')).unlink()
    with pytest.raises(InputError, match='lacks 1 images'):
        write_layout(data, tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_layout(data, tmp_path / 'new', procs=1)
    assert not list((tmp_path / 'new').iterdir())


def test_two_processes_may_write_the_same_set(tmp_path, monkeypatch):
    data, draw = small(n_ids=2, n_test=2), module.draw_into

    def slow(*args):
        monkeypatch.setattr(module, 'draw_into', draw)
        write_layout(data, tmp_path, procs=1)  # meanwhile
        draw(*args)

    monkeypatch.setattr(module, 'draw_into', slow)
    monkeypatch.setattr(module.os, 'getpid', iter(range(1, 9)).__next__)
    there = write_layout(data, tmp_path, procs=1)
    assert [p.name for p in tmp_path.iterdir()] == [there.name]


def test_what_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(InputError, match='expected one of M'):
        write_layout(small(), tmp_path, 'X')
    with pytest.raises(InputError, match='at most 6'):
        write_layout(synth(n_ids=6, cams=9), tmp_path)
    real = tmp_path / 'Market-1501-v15.09.15'
    real.mkdir()
    (real / 'keep.txt').write_text('mine')
    with pytest.raises(InputError, match='another set'):
        write_layout(small(), tmp_path)
    assert (real / 'keep.txt').read_text() == 'mine'
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        write_layout(small(), tmp_path / 'file')
