"""Graphs for plain torch, as files."""

import pytest
import torch

from tests.data.storage.full_disk import small_files
from trainer.export.programs import export_module, save_program


def test_a_graph_that_a_full_disk_does_not_take_is_an_error_and_not_the_end_of_the_process(tmp_path):
    program = export_module(torch.nn.Linear(4, 4), {"x": torch.zeros(2, 4)})
    with small_files(100), pytest.raises(OSError, match="too large"):
        save_program(program, tmp_path / "a.pt2")
    save_program(program, tmp_path / "a.pt2")
    assert torch.export.load(tmp_path / "a.pt2").module()(torch.zeros(3, 4)).shape == (3, 4)
