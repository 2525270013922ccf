"What `nbdev_clean` leaves: a stored page has no kernel, so where a widget left its picture, only the picture is kept."
import json
from pathlib import Path

VIEW = "application/vnd.jupyter.widget-view+json"


def tidy(nb):
    "Drop views of widgets that left a picture. True when something was dropped."
    outs = [o["data"] for c in nb["cells"] for o in c.get("outputs", []) if VIEW in o.get("data", {}) and "image/png" in o["data"]]
    for data in outs:
        del data[VIEW]
    return bool(outs)


if __name__ == "__main__":
    for path in sorted((Path(__file__).parent.parent / "nbs").rglob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        if tidy(nb):
            path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
