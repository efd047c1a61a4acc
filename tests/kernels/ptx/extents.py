"""csrc/ops.h as regions of memory: what of it each operation is given, and what it does with it.

One function an operation, with its arguments in ops.h's order, to the tensors behind them: exactly the elements that
the contract names, so that an access between two rows, or one past the last, is out of bounds; inputs may not be
written; outputs hold nothing before, and all of them must be written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from memory import Region

ITEMSIZES = (4, 2, 2)  # of k2::DType


def _dense(name: str, address: int, sizes: tuple[int, ...], itemsize: int, use: str) -> list[Region]:
    """A contiguous tensor; nothing where the address is null."""
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return [Region(name, address, sizes, tuple(strides), itemsize, use)] if address else []


def _rows(name: str, address: int, rows: int, columns: int, stride: int, itemsize: int, use: str) -> list[Region]:
    return [Region(name, address, (rows, columns), (stride, 1), itemsize, use)] if address else []


def _numbers(address: int, count: int) -> list[int]:
    """A host array of int64; a null one is as many zeros."""
    return list((ctypes.c_int64 * count).from_address(address)) if address and count else [0] * count


def rms_norm_forward(x, residual, gamma, h, y, rstd, rows, hidden, epsilon, zero_centered, dtype, gamma_dtype, _stream):
    size, row = ITEMSIZES[dtype], (rows, hidden)
    return [
        *_dense("x", x, row, size, "in"),
        *_dense("residual", residual, row, size, "in"),
        *_dense("gamma", gamma, (hidden,), ITEMSIZES[gamma_dtype], "in"),
        *_dense("h", h, row, size, "out"),
        *_dense("y", y, row, size, "out"),
        *_dense("rstd", rstd, (rows,), 4, "out"),
    ]


def rms_norm_backward(grad_y, grad_h, x, gamma, rstd, grad_x, grad_gamma, workspace, partial_rows, rows, hidden,
                      zero_centered, dtype, gamma_dtype, _stream):  # fmt: skip
    size, row = ITEMSIZES[dtype], (rows, hidden)
    return [
        *_dense("grad_y", grad_y, row, size, "in"),
        *_dense("grad_h", grad_h, row, size, "in"),
        *_dense("x", x, row, size, "in"),
        *_dense("gamma", gamma, (hidden,), ITEMSIZES[gamma_dtype], "in"),
        *_dense("rstd", rstd, (rows,), 4, "in"),
        *_dense("grad_x", grad_x, row, size, "out"),
        *_dense("grad_gamma", grad_gamma, (hidden,), ITEMSIZES[gamma_dtype], "out"),
        *_dense("workspace", workspace, (partial_rows, hidden), 4, "out"),
    ]


def rotary(q, q_s, q_b, q_n, to_q, to_q_s, to_q_b, to_q_n, k, k_s, k_b, k_n, to_k, to_k_s, to_k_b, to_k_n, cosines,
           sines, positions, table_rows, sequence, batch, q_heads, k_heads, head_dim, rotary_dim, interleaved,
           conjugate, dtype, _stream):  # fmt: skip
    size, table = ITEMSIZES[dtype], (table_rows, rotary_dim // 2)

    def heads(name, address, to, strides, to_strides, count):
        moved = (q, k) != (to_q, to_k)  # in place the other elements are not touched
        sizes = (sequence, batch, count, head_dim if moved else rotary_dim)
        if not address or not count:
            return []
        return [Region(name, address, sizes, (*strides, 1), size, "in"),
                Region(f"to_{name}", to, sizes, (*to_strides, 1), size, "out")]  # fmt: skip

    return [
        *heads("q", q, to_q, (q_s, q_b, q_n), (to_q_s, to_q_b, to_q_n), q_heads),
        *heads("k", k, to_k, (k_s, k_b, k_n), (to_k_s, to_k_b, to_k_n), k_heads),
        *_dense("cosines", cosines, table, 4, "in"),
        *_dense("sines", sines, table, 4, "in"),
        *_dense("positions", positions, (sequence, batch), 4, "in"),
    ]


def swiglu_forward(packed, out, rows, columns, dtype, _stream):
    size = ITEMSIZES[dtype]
    return [
        *_dense("packed", packed, (rows, 2 * columns), size, "in"),
        *_dense("out", out, (rows, columns), size, "out"),
    ]


def swiglu_backward(grad_out, packed, grad_packed, rows, columns, dtype, _stream):
    size = ITEMSIZES[dtype]
    return [
        *_dense("grad_out", grad_out, (rows, columns), size, "in"),
        *_dense("packed", packed, (rows, 2 * columns), size, "in"),
        *_dense("grad_packed", grad_packed, (rows, 2 * columns), size, "out"),
    ]


def cross_entropy_statistics(logits, stride, labels, statistics, planes, rows, columns, vocabulary_start, dtype,
                             _stream):  # fmt: skip
    return [
        *_rows("logits", logits, rows, columns, stride, ITEMSIZES[dtype], "in"),
        *_dense("labels", labels, (rows,), 8, "in"),
        *_dense("statistics", statistics, (planes * rows + 1,) if rows else (0,), 4, "out"),
    ]


def cross_entropy_loss(all_statistics, ranks, planes, labels, loss, lse, rows, vocabulary_size, label_smoothing, z_loss,
                       ignore_index, _stream):  # fmt: skip
    return [
        *_dense("all_statistics", all_statistics, (ranks, planes * rows + 1), 4, "in"),
        *_dense("labels", labels, (rows,), 8, "in"),
        *_dense("loss", loss, (rows,), 4, "out"),
        *_dense("lse", lse, (rows,), 4, "out"),
    ]


def cross_entropy_gradient(logits, stride, labels, lse, grad_loss, grad_loss_stride, gradient, gradient_stride, rows,
                           columns, vocabulary_start, vocabulary_size, label_smoothing, z_loss, ignore_index, dtype,
                           _stream):  # fmt: skip
    size = ITEMSIZES[dtype]
    return [
        *_rows("logits", logits, rows, columns, stride, size, "in"),
        *_dense("labels", labels, (rows,), 8, "in"),
        *_dense("lse", lse, (rows,), 4, "in"),
        *_rows("grad_loss", grad_loss, rows, 1, grad_loss_stride, 4, "in"),
        *_rows("gradient", gradient, rows, columns, gradient_stride, size, "out"),
    ]


def _list(name: str, addresses: int, sizes: list[int], itemsize: int, use: str) -> list[Region]:
    tensors = enumerate(zip(_numbers(addresses, len(sizes)), sizes, strict=True))
    return [region for i, (at, n) in tensors for region in _dense(f"{name}[{i}]", at, (n,), itemsize, use)]


def adamw(parameters, gradients, exp_avg, exp_avg_sq, model_copies, sizes, count, learning_rate, beta1, beta2, epsilon,
          weight_decay, step, gradient_scale, gradient_dtype, model_dtype, _stream):  # fmt: skip
    lengths = _numbers(sizes, count)
    return [
        *_list("parameters", parameters, lengths, 4, "inout"),
        *_list("gradients", gradients, lengths, ITEMSIZES[gradient_dtype], "in"),
        *_list("exp_avg", exp_avg, lengths, 4, "inout"),
        *_list("exp_avg_sq", exp_avg_sq, lengths, 4, "inout"),
        *_list("model_copies", model_copies, lengths, ITEMSIZES[model_dtype], "out"),
        *_dense("gradient_scale", gradient_scale, (1,), 4, "in"),
    ]


def squared_norm(tensors, sizes, count, workspace, result, dtype, _stream):
    lengths = _numbers(sizes, count)
    chunks = sum(-(-length // 8192) for length in lengths)
    return [
        *_list("tensors", tensors, lengths, ITEMSIZES[dtype], "in"),
        *_dense("workspace", workspace, (2 * chunks,), 8, "out"),
        *_dense("result", result, (2,), 8, "out"),
    ]


def scale(tensors, sizes, count, factor, dtype, _stream):
    return [
        *_list("tensors", tensors, _numbers(sizes, count), ITEMSIZES[dtype], "inout"),
        *_dense("factor", factor, (1,), 4, "in"),
    ]


REGIONS: dict[str, Callable[..., list[Region]]] = {
    function.__name__: function
    for function in (rms_norm_forward, rms_norm_backward, rotary, swiglu_forward, swiglu_backward,
                     cross_entropy_statistics, cross_entropy_loss, cross_entropy_gradient, adamw, squared_norm, scale)
}  # fmt: skip
