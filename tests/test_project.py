"What holds for the project as a whole: notebooks and library agree, floors hold, notebooks are fit to be read."

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CELLS = {p: json.loads(p.read_text(encoding="utf-8"))["cells"] for p in NBS}


def source(cell):
    return "".join(cell["source"])


def exports():
    "Module name -> floor (the number of its notebook)."
    out = {}
    for p in NBS:
        for c in CELLS[p]:
            m = re.match(r"#\|\s*default_exp\s+([\w.]+)", source(c))
            if m:
                out[m[1]] = p.stem.split("_")[0]
    return out


def test_export_and_clean_leave_no_difference(tmp_path):
    for name in ("nbs", "msinet", "settings.ini", "pyproject.toml", "setup.py"):
        src = ROOT / name
        (shutil.copytree if src.is_dir() else shutil.copy)(src, tmp_path / name)
    for p in (tmp_path / "msinet").rglob("*.py"):
        if p.name != "__init__.py":
            p.unlink()
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, check=True, capture_output=True)
    for kind, suffix in (("msinet", ".py"), ("nbs", ".ipynb")):
        ours = {
            p.relative_to(ROOT): p.read_text(encoding="utf-8")
            for p in sorted((ROOT / kind).rglob(f"*{suffix}"))
            if ".ipynb_checkpoints" not in p.parts
        }
        again = {
            p.relative_to(tmp_path): p.read_text(encoding="utf-8")
            for p in sorted((tmp_path / kind).rglob(f"*{suffix}"))
            if ".ipynb_checkpoints" not in p.parts
        }
        assert ours.keys() == again.keys()
        differ = [str(k) for k in ours if ours[k] != again[k]]
        assert not differ, f"run nbdev_export and nbdev_clean: {differ}"


def imported(name):
    "The modules of msinet that a module imports, at its top or inside a function."
    tree = ast.parse((ROOT / "msinet" / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    package = name.split(".")[:-1]
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.level:
            base = package[: len(package) - n.level + 1]
            yield ".".join(base + (n.module.split(".") if n.module else []))


def test_floors():
    "A module never imports one whose notebook has a higher number."
    floors = exports()
    for name, floor in floors.items():
        up = {u: floors[u] for u in imported(name) if floors[u] > floor or u == name}
        assert not up, f"{name} (floor {floor}) imports {up}"


@pytest.mark.parametrize("path", NBS, ids=lambda p: str(p.relative_to(ROOT)))
def test_notebook_is_fit_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    nb = json.loads(text)
    assert "widgets" not in nb["metadata"]
    first = next(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")
    assert re.match(r"# .+\n\n> .+", first), "opens with a title and a line that says what it is for"
    for c in nb["cells"]:
        outs = c.get("outputs", [])
        assert not any(o["output_type"] == "error" for o in outs)
        assert not any("widget-view" in kind for o in outs for kind in o.get("data", {})), (
            "a stored page has no kernel: run make export"
        )
        plain = json.dumps([o.get("text", o.get("data", {}).get("text/plain", "")) for o in outs])
        assert not re.search(r"/(home|tmp|root|Users)/|[A-Z]:\\\\Users", plain), plain[:200]
        assert "#| export" not in source(c) or c["cell_type"] == "code"


@pytest.mark.parametrize("path", NBS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_picture_has_words_for_those_who_cannot_see_it(path):
    """Each cell with a stored image says in one line what is to be seen; YAML reads the line, so it has no colon
    or quotes."""
    for n, c in enumerate(CELLS[path]):
        shown = any(kind.startswith("image/") for o in c.get("outputs", []) for kind in o.get("data", {}))
        said = re.findall(r"^#\| *fig-alt: *(.*)$", source(c), re.M) if c["cell_type"] == "code" else []
        assert shown <= len(said) <= 1, f"cell {n}: one line #| fig-alt: … is expected on top"
        assert all(
            15 <= len(s) <= 140
            and not set(s) & set(":\"")
            and re.match(r"(#\|.*\n)*", source(c))[0].count("fig-alt") == 1
            for s in said
        ), f"cell {n}: {said}"
