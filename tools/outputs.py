"""Are the outputs in the notebooks those of today's code? `make outputs` runs every notebook from top to bottom, says
which cells give
something else, and stores what they give now.

A notebook is run in a kernel of its own, as JupyterLab would run it. Cells with a flag that tests skip (`slow`,
`gpu`, `notest`) are
not run and keep what they have. `python tools/outputs.py --look` only says; names of notebooks limit it to those.
"""

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image
from tidy import ROOT, VIEW

SKIPPED = re.compile(r"^#\|\s*(notest|slow|gpu|eval:\s*false)\b", re.M)
PICTURE = "image/png"
REL, SAME = (
    1e-3,
    5e-4,
)  # numbers may differ by a part in a thousand, images in so many of their pixels, by a quarter of the scale


class Client(NotebookClient):
    "Runs a notebook without the cells that tests skip."

    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type != "code" or SKIPPED.search(cell.source) or "nbdev_export(" in cell.source:
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def fresh(path):
    "The notebook at `path`, run from top to bottom."
    nb = nbformat.read(path, as_version=4)
    Client(nb, timeout=900, kernel_name="python3", resources=dict(metadata=dict(path=str(path.parent)))).execute(
        stderr=subprocess.DEVNULL
    )
    return nb


def said(outputs, kind="text/plain"):
    """The words of a cell's outputs, without addresses in memory and without the words that stand for an image or
    a widget."""
    out = []
    for o in outputs:
        data = o.get("data", {})
        if o["output_type"] == "stream":
            out.append("".join(o["text"]))
        elif PICTURE not in data and VIEW not in data:
            out.append("".join(data.get(kind, data.get("text/plain", ""))))
    return re.sub(r"0x[0-9a-f]+", "0x", "".join(out)).strip()


def images(outputs):
    return [o["data"][PICTURE] for o in outputs if PICTURE in o.get("data", {})]


NUMBER = re.compile(r"[-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")


def same_words(a, b):
    "Whether two texts agree: letter by letter between the numbers, and the numbers within `REL`."
    value = lambda t: float(t.replace(",", "").replace("−", "-"))
    if NUMBER.sub("", a) != NUMBER.sub("", b):
        return False
    return all(
        s == t or abs(value(s) - value(t)) <= REL * max(abs(value(s)), abs(value(t)))
        for s, t in zip(NUMBER.findall(a), NUMBER.findall(b))
    )


def same_picture(a, b):
    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode("".join(x)))).convert("RGB"), float) for x in (a, b))
    return a.shape == b.shape and (np.abs(a - b).max(2) > 64).mean() < SAME


def changed(old, new):
    "What a cell gives now and did not before, in a line; nothing where it is the same."
    for kind in ("text/plain", "text/html"):
        a, b = said(old, kind), said(new, kind)
        if not same_words(a, b):
            return f"says {b[:70]!r} instead of {a[:70]!r}" if kind == "text/plain" else "shows another table"
    a, b = images(old), images(new)
    if len(a) != len(b):
        return f"{len(b)} images instead of {len(a)}"
    return "" if all(map(same_picture, a, b)) else "another image"


def renew(path, look):
    "Run a notebook; lines about what has changed. Stored are the outputs of the cells that give something else."
    nb, lines = json.loads(path.read_text(encoding="utf-8")), []
    try:
        now = json.loads(nbformat.writes(fresh(path)))
    except Exception as e:
        return [f"failed: {str(e).strip().splitlines()[-1][:160]}"]
    for n, (c, d) in enumerate(zip(nb["cells"], now["cells"])):
        if (
            c["cell_type"] == "code"
            and not SKIPPED.search("".join(c["source"]))
            and (t := changed(c["outputs"], d["outputs"]))
        ):
            c["outputs"] = d["outputs"]
            lines.append(f"cell {n}: {t}")
    if lines and not look:
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return lines


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("notebooks", nargs="*", type=Path, help="only these")
    p.add_argument("--look", action="store_true", help="say what has changed, store nothing")
    p.add_argument("--workers", type=int, default=2)
    a = p.parse_args()
    paths = [q.resolve() for q in a.notebooks] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    paths = [q for q in paths if ".ipynb_checkpoints" not in q.parts]
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    n = 0
    with ThreadPoolExecutor(a.workers) as pool:
        for path, lines in zip(paths, pool.map(lambda q: renew(q, a.look), paths)):
            n += bool(lines)
            for line in lines:
                print(f"{path.relative_to(ROOT)}: {line}", flush=True)
    print(f"{len(paths)} notebooks, {n} with other outputs than those that were stored")
    sys.exit(bool(n and a.look))
