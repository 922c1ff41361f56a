"""The tensor files of a checkpoint: any range of a piece comes back, whoever held it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.model.checkpoint_files import writing
from megatron_rl.model.checkpoint_shards import Held, ShardReader, file_name, locate, tensor_name, write_tensors

SHAPE = (4, 5)


def held(*ranges: tuple[int, int], key: str = "w", piece: int = 0) -> list[Held]:
    return [Held(key, piece, SHAPE, start, end) for start, end in ranges]


@pytest.fixture
def reader(tmp_path) -> ShardReader:
    """Piece 1 of `w` is 0 .. 19, its elements 0-6, 7-11 and 12-19 with ranks 2, 0 and 1; rank 0 also has piece 0."""
    values, ranges = torch.arange(20.0), {2: (0, 7), 0: (7, 12), 1: (12, 20)}
    for rank, (start, end) in ranges.items():
        tensors = {tensor_name("exp_avg", "w", 1): values[start:end]}
        if rank == 0:
            tensors[tensor_name("exp_avg", "w", 0)] = -values
        with writing(tmp_path / file_name(rank)) as file:
            write_tensors(file, tensors)
    parts = [held(ranges[rank], piece=1) for rank in range(3)]
    parts[0] += held((0, 20))
    return ShardReader(tmp_path, locate(parts))


@pytest.mark.parametrize(("start", "end"), [(0, 20), (0, 7), (6, 8), (3, 19), (7, 12), (11, 12)])
def test_any_range_is_put_together_from_the_files_that_hold_it(reader, start, end):
    assert reader.read("exp_avg", "w", 1, start, end).tolist() == list(range(start, end))


def test_pieces_have_the_shape_in_which_they_were_saved(reader):
    assert reader.num_pieces("w") == 2 and reader.shape("w") == SHAPE
    torch.testing.assert_close(reader.read_piece("exp_avg", "w", 0), -torch.arange(20.0).view(SHAPE), rtol=0, atol=0)


def test_files_are_safetensors(reader, tmp_path):
    tensors = load_file(tmp_path / file_name(0))
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"exp_avg/w/0": 20, "exp_avg/w/1": 5}


def test_elements_that_nobody_holds_are_found_when_saving():
    with pytest.raises(AssertionError, match="w: nobody holds elements 7 to 8"):
        locate([held((0, 7)), held((8, 20))])
    with pytest.raises(AssertionError, match="w: 19 elements of"):
        locate([held((0, 7)), held((7, 19))])


def test_copies_of_a_tied_embedding_may_be_cut_differently():
    assert locate([held((0, 7)), held((7, 20)), held((0, 20))])["w"]["pieces"] == [[[0, 0, 7], [1, 7, 20], [2, 0, 20]]]
