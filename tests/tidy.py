"""What `nbdev_clean` leaves: a stored page has no kernel, so where a widget left its picture, only the picture is kept;
and nbdev takes the whole of a title's cell for front matter, so on the site its other words would be lost: they get a cell of their own."""
import json
import re
import zlib
from pathlib import Path

VIEW = "application/vnd.jupyter.widget-view+json"


def tidy(nb):
    "Drop views of widgets that left a picture. True when something was dropped."
    outs = [o["data"] for c in nb["cells"] for o in c.get("outputs", []) if VIEW in o.get("data", {}) and "image/png" in o["data"]]
    for data in outs:
        del data[VIEW]
    return bool(outs)


def title_alone(nb):
    "Leave the title and the line below it alone in their cell. True when there was more in it."
    i, c = next(((i, c) for i, c in enumerate(nb["cells"]) if c["cell_type"] == "markdown"), (0, None))
    m = re.match(r"(# .+\n+> .+)\n+(?=\S)", "".join(c["source"])) if c else None
    if not m:
        return False
    rest = "".join(c["source"])[m.end():]
    c["source"] = m[1].splitlines(keepends=True)
    nb["cells"].insert(i + 1, dict(cell_type="markdown", id=f"{zlib.crc32(rest.encode()):08x}", metadata={}, source=rest.splitlines(keepends=True)))
    return True


if __name__ == "__main__":
    for path in sorted((Path(__file__).parent.parent / "nbs").rglob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        if tidy(nb) | title_alone(nb):
            path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
