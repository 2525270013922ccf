"""Slides of the class, from its notebooks as they are. `make slides` writes them into _slides/.

Three rules, and nothing to set by hand. A heading of level 1 or 2 begins a slide to the right, one of level 3 (an
exercise) a slide below;
all else stays on the slide where it comes. Imports, hidden cells and checks are skipped, and solutions are the
speaker's notes.
Code of more than four lines shows only what it gives, unless it is there to be answered.
"""

import re
from html import escape
from pathlib import Path

from docs_check import NO_WORDS
from tidy import is_check

CLASS = Path(__file__).parent.parent / "nbs" / "class"


def source(cell):
    return "".join(cell["source"])


def only_imports(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return all(re.match(r"(import|from) |#", line) for line in lines)


def kind(cell):
    "What a cell is in the slides: slide, subslide, - (goes on), notes or skip."
    text = source(cell)
    if cell["cell_type"] == "markdown":
        return (
            "notes"
            if text.startswith("<details>")
            else "slide"
            if re.match(r"##? ", text)
            else "subslide"
            if text.startswith("### ")
            else "-"
        )
    return "skip" if text.startswith("#| hide") or is_check(cell) or only_imports(text) else "-"


def long(cell):
    "Whether a cell's code is left out."
    text = source(cell)
    return cell["cell_type"] == "code" and text.count("\n") > 3 and "answer" not in text and bool(cell["outputs"])


def slides(path):
    "One notebook as a page of reveal.js, which comes from the network when the page is opened."
    import nbformat
    from nbconvert import SlidesExporter
    from traitlets.config import Config

    nb, alts = nbformat.read(path, 4), []
    for cell in nb.cells:
        if cell.cell_type == "code" and (alt := re.search(r"^#\| *fig-alt: *(.+)\n", cell.source, re.M)):
            cell.source = cell.source.replace(alt[0], "")
            alts += [alt[1]] * sum("image/png" in o.get("data", {}) for o in cell.outputs)
        cell.metadata["slideshow"], cell.metadata["tags"] = {"slide_type": kind(cell)}, ["long"] * long(cell)
        if cell.cell_type == "markdown":  # links between notebooks are links between slides
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.slides.html)", cell.source)
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={"long"}))
    exporter = SlidesExporter(
        config=config,
        reveal_scroll=True,
        reveal_theme="simple",
        reveal_transition="none",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    page = exporter.from_notebook_node(nb)[0]
    for words in alts:
        page = page.replace(NO_WORDS, escape(words), 1)
    return page


if __name__ == "__main__":
    out = Path("_slides")
    out.mkdir(exist_ok=True)
    for path in sorted(CLASS.glob("0*.ipynb")):
        (out / f"{path.stem}.slides.html").write_text(slides(path), encoding="utf-8")
