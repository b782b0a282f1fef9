"""The digits, and what all sources of arrays share."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data.sources.arrays import digits_source
from data.sources.source import FormDefaults


def test_digits_are_1797_images_of_ten_classes() -> None:
    source = digits_source()
    assert len(source.items) == 1797
    assert source.class_names == tuple("0123456789")
    assert {item.label for item in source.items} == set(range(10))
    assert source.description == "digits"
    assert source.defaults == FormDefaults(16, 1, True)
    first = np.asarray(Image.open(io.BytesIO(source.read(source.items[0]))))
    assert first.shape == (8, 8)
    # The first digit's first row is 0 0 5 13 9 1 0 0 of 16.
    assert first[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_digits_travel_to_a_worker_that_has_no_need_of_scikit_learn(tmp_path: Path) -> None:
    source = digits_source()
    wanted = source.read(source.items[5])
    (tmp_path / "pickled").write_bytes(pickle.dumps((source, source.items[5])))
    program = (
        "import pickle, sys; source, item = pickle.load(open(sys.argv[1], 'rb'));"
        "assert 'sklearn' not in sys.modules; assert source.items == ();"
        "sys.stdout.buffer.write(source.read(item))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "pickled"], capture_output=True, check=True)
    assert done.stdout == wanted
