"""The name table: every row of every tensor exactly once, and QKV as megatron-core groups it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from k2_megatron.convert.names import TABLE, Shape, places, segments

K2 = Shape(80, 8192, 22016, 64, 64, 32032, 32032)


@some.composite
def shapes(draw) -> Shape:
    kv_heads, repeat, head_dim = draw(some.integers(1, 6)), draw(some.integers(1, 4)), 2 * draw(some.integers(1, 4))
    heads = kv_heads * repeat
    used = draw(some.integers(1, 50))
    return Shape(
        2, heads * head_dim, draw(some.integers(1, 40)), heads, kv_heads, used + draw(some.integers(0, 9)), used
    )


def test_k2_has_its_published_number_of_parameters_and_tensors() -> None:
    assert K2.parameters == 65_286_184_960
    assert sum(len(place.hugging_face) for place in places(K2)) == 723


@settings(deadline=None)
@given(shapes())
def test_segments_use_every_row_of_both_sides_once(shape: Shape) -> None:
    for entry in TABLE:
        ours: list[int] = []
        theirs: dict[int, list[int]] = {index: [] for index in range(len(entry.hugging_face))}
        for segment in segments(entry, shape):
            ours.extend(range(segment.our_row, segment.our_row + segment.rows))
            theirs[segment.tensor].extend(range(segment.row, segment.row + segment.rows))
        rows = shape.used_vocabulary if entry.rows == "vocabulary" else entry.size(shape)[0]
        assert ours == list(range(rows))
        for index, found in theirs.items():
            assert sorted(found) == list(range(entry.hugging_face_size(index, shape)[0]))


@settings(deadline=None)
@given(shapes())
def test_query_key_value_rows_are_grouped_as_megatron_core_splits_them(shape: Shape) -> None:
    """megatron-core views the projection's output as [groups, (heads a group + 2) * D] and splits the second axis."""
    entry = next(entry for entry in TABLE if entry.rows == "query_key_value")
    fused = torch.arange(entry.size(shape)[0]).view(shape.kv_heads, -1)
    sizes = [shape.heads // shape.kv_heads * shape.head_dim, shape.head_dim, shape.head_dim]
    wanted = [part.flatten().tolist() for part in fused.split(sizes, dim=1)]
    for index in range(3):
        mine = sorted((segment for segment in segments(entry, shape) if segment.tensor == index), key=lambda s: s.row)
        assert [row for segment in mine for row in range(segment.our_row, segment.our_row + segment.rows)] == wanted[
            index
        ]
