"Shared by the tests: small images of made-up identities, and what a mistake on the command line must look like."

import numpy as np
import pytest
from PIL import Image

from msinet.cli import main
from msinet.data.items import Item


@pytest.fixture
def items(tmp_path):
    "Twelve tiny images: three identities, four cameras each."
    rng = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    return [Item(str(tmp_path / f"{k}.png"), k // 4, k % 4) for k in range(12)]


@pytest.fixture(scope="session")
def make_identities():
    "Called with a folder that is not there yet: fills it with six identities, a folder of four images each."

    def make(root):
        rng = np.random.default_rng(0)
        for pid in range(6):
            (root / f"{pid}").mkdir(parents=True)
            for k in range(4):
                image = rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / f"{pid}" / f"{k}.png")
        return root

    return make


@pytest.fixture
def one_line_mistake(tmp_path, capsys):
    "Called with a command: it ends with 2, one line names what was found and expected, and nothing is left."

    def check(words, found, expected):
        with pytest.raises(SystemExit) as e:
            main([*words.split(), "--out", str(tmp_path / "run")])
        line = capsys.readouterr().err.strip()
        assert e.value.code == 2 and "\n" not in line and line.startswith("msinet: ")
        assert found in line and expected in line and list(tmp_path.iterdir()) == []

    return check
