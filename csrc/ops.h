// Every compiled operation, declared once and given to each of its implementations:
//   k2::cuda::NAME(..., void* stream)      -> int   module k2_megatron._cuda (csrc/*.cu), a cudaError_t, 0 = success
//   k2::cpu::<set>::NAME(..., int threads) -> void  module k2_megatron._cpu (csrc/cpu/*.cpp), compiled once for each
//     instruction set: portable, avx2, avx512; the module binds the best one that the processor has
// The Python names and argument orders are these, in both modules: pointers as integers (0 = null), DType as its
// integer, the last argument the number of OpenMP threads (torch.get_num_threads()) or the raw stream. The GIL is
// released. A CUDA code other than 0 becomes a RuntimeError in the binding. The functions check nothing: the Python
// side does, before it hands over a pointer. They allocate nothing on the device, keep nothing, and run on the current
// device.
//
// Common rules
//   Sizes and strides are counted in elements. Tensors are contiguous unless a stride argument says otherwise; rows may
//   start at any multiple of the element size (K2's vocabulary shard: 4004 columns). Zero rows or tensors are legal.
//   Arithmetic is fp32 (sums named fp64 excepted); each stored value is rounded once, to nearest even; NaN stays NaN
//   and subnormals are kept, but cuda takes an exponential below 2^-126 for zero where tensors are bf16 or fp16.
//   Results do not depend on threads, on the grid, or on alignment of the buffers; but cuda's cross_entropy_statistics
//   adds a row in an order that follows its address modulo 16 (the same buffer, the same bits).
//   T rows (tokens), H hidden, F feed-forward columns (per rank), V vocabulary columns (per rank), S sequence, B batch,
//   N heads, R rotated dimensions (even). "optional" pointers may be null.
#pragma once

#include <cstdint>

namespace k2 {
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };
}

// RMSNorm (Zhang & Sennrich 2019), y = h * rstd * w, rstd = 1 / sqrt(mean(h^2) + epsilon), w = gamma or 1 + gamma.
//   x, residual, h, y, grad_*   [T, H] dtype;  gamma, grad_gamma [H] gamma_dtype, which is dtype or float32
//   rstd [T] fp32, written forward and read backward; 1 <= H <= 65536
// Forward: with residual (then h is given too) h = round(x + residual) is stored and the rounded h is normalised;
//   without residual, h is null and x itself is normalised.
// Backward: x is what was normalised (the stored h where there was a residual):
//   grad_x = rstd * (g - xhat * mean(g * xhat)) + grad_h,  g = grad_y * w,  xhat = x * rstd
//   grad_h [T, H] dtype is optional: the gradient arriving at h itself (the residual branch).
//   grad_x may be grad_y or grad_h.
//   grad_gamma = sum over rows of grad_y * xhat, in two stages: row t goes to one of partial_rows partial sums, a
//   choice that depends on T and partial_rows alone, and the partial sums are added in order. grad_gamma and workspace
//   are null together where gamma needs no gradient.
//   workspace [partial_rows, H] fp32, need not be initialised; partial_rows >= 1, best by rms_norm_partial_rows.
#define K2_RMS_NORM(RESULT, WHERE)                                                                                     \
  RESULT rms_norm_forward(const void* x, const void* residual, const void* gamma, void* h, void* y, float* rstd,       \
                          int64_t rows, int64_t hidden, float epsilon, bool zero_centered, DType dtype,                \
                          DType gamma_dtype, WHERE);                                                                   \
  RESULT rms_norm_backward(const void* grad_y, const void* grad_h, const void* x, const void* gamma,                   \
                           const float* rstd, void* grad_x, void* grad_gamma, float* workspace, int64_t partial_rows,  \
                           int64_t rows, int64_t hidden, bool zero_centered, DType dtype, DType gamma_dtype, WHERE);   \
  int64_t rms_norm_partial_rows(int64_t rows, int64_t hidden);

// Rotary embedding (Su et al. 2021) of q and k, in one call, in place or into other memory.
//   q, to_q [S, B, N, D], k, to_k [S, B, Nk, D] dtype, any strides over s, b and n, last stride 1; k optional (Nk = 0)
//   to_q is q with q's strides (in place), or memory that q and k do not overlap; so is to_k.
//   cosines, sines [table_rows, R/2] fp32 contiguous, R <= D;  positions [S, B] int32 contiguous, optional: without it
//   the table row is s. A position outside [0, table_rows) turns the rotated elements into NaN and reads nothing.
//   Element pair i: (x[i], x[i + R/2]), or (x[2i], x[2i+1]) when interleaved:
//     first' = first * cos_i - second * sin_i,  second' = second * cos_i + first * sin_i
//   conjugate negates the sines: the backward of the rotation. Elements from R on are copied, in place untouched.
#define K2_ROTARY(RESULT, WHERE)                                                                                       \
  RESULT rotary(const void* q, int64_t q_stride_s, int64_t q_stride_b, int64_t q_stride_n, void* to_q,                 \
                int64_t to_q_stride_s, int64_t to_q_stride_b, int64_t to_q_stride_n, const void* k,                    \
                int64_t k_stride_s, int64_t k_stride_b, int64_t k_stride_n, void* to_k, int64_t to_k_stride_s,         \
                int64_t to_k_stride_b, int64_t to_k_stride_n, const float* cosines, const float* sines,                \
                const int32_t* positions, int64_t table_rows, int64_t sequence, int64_t batch, int64_t q_heads,        \
                int64_t k_heads, int64_t head_dim, int64_t rotary_dim, bool interleaved, bool conjugate, DType dtype,  \
                WHERE);

// SwiGLU (Shazeer 2020), out = gate * sigmoid(gate) * up.
//   packed, grad_packed [T, 2F] = [gate | up];  out, grad_out [T, F]; all dtype. grad_packed may be packed itself.
#define K2_SWIGLU(RESULT, WHERE)                                                                                       \
  RESULT swiglu_forward(const void* packed, void* out, int64_t rows, int64_t columns, DType dtype, WHERE);             \
  RESULT swiglu_backward(const void* grad_out, const void* packed, void* grad_packed, int64_t rows, int64_t columns,   \
                         DType dtype, WHERE);

// Vocab-parallel cross-entropy, in three calls round one all-gather.
//   logits [T, V] dtype, row stride given: this rank's columns [vocabulary_start, vocabulary_start + V) of the
//   vocabulary_size columns of all ranks;  labels [T] int64, global ids
// 1. statistics [planes * T + 1] fp32: planes = 3 or 4 of T numbers, of this shard's row: 0 max m, 1 sum of exp(logit -
//    m), 2 the label's logit where this rank owns it, else 0, 3 sum of the logits (needed only for label smoothing); and
//    last V, by which the ranks see that their shards are of one width (exact to 2^24; T > 0). A row of -inf gives m =
//    -inf and sum 0; a NaN or +inf logit gives a NaN sum.
// 2. all_statistics [ranks, planes * T + 1]: the shards' statistics in rank order, merged in that order:
//      lse = log of the sum over all columns of exp(logit)   [T] fp32
//      loss = lse - (1 - e) * target - e * mean(all logits) + z_loss * lse^2   [T] fp32, e = label_smoothing, which
//        counts as 0 with 3 planes
//    label == ignore_index: loss 0. Any other label outside [0, vocabulary_size), or shards of unequal widths: loss NaN.
// 3. gradient [T, V] dtype, row stride given, may be the logits themselves:
//      grad_loss * (softmax * (1 + 2 * z_loss * lse) - e / vocabulary_size - (1 - e) * [column == label])
//    whole in fp32 before rounding. grad_loss fp32, row t at t * grad_loss_stride (0: one value for all). Rows whose
//    label is ignore_index or whose grad_loss is 0 become exact zeros, whatever the logits; a label out of range: NaN.
#define K2_CROSS_ENTROPY(RESULT, WHERE)                                                                                \
  RESULT cross_entropy_statistics(const void* logits, int64_t logits_stride, const int64_t* labels, float* statistics, \
                                  int64_t planes, int64_t rows, int64_t columns, int64_t vocabulary_start,             \
                                  DType dtype, WHERE);                                                                 \
  RESULT cross_entropy_loss(const float* all_statistics, int64_t ranks, int64_t planes, const int64_t* labels,         \
                            float* loss, float* lse, int64_t rows, int64_t vocabulary_size, float label_smoothing,     \
                            float z_loss, int64_t ignore_index, WHERE);                                                \
  RESULT cross_entropy_gradient(const void* logits, int64_t logits_stride, const int64_t* labels, const float* lse,    \
                                const float* grad_loss, int64_t grad_loss_stride, void* gradient,                      \
                                int64_t gradient_stride, int64_t rows, int64_t columns, int64_t vocabulary_start,      \
                                int64_t vocabulary_size, float label_smoothing, float z_loss, int64_t ignore_index,    \
                                DType dtype, WHERE);

// Multi-tensor operations. The lists are HOST arrays of `count` int64: element counts, and addresses of the tensors
// (device addresses for cuda). Tensors are dense, of any size (0 included), aligned to their element.
//
// AdamW (Loshchilov & Hutter 2019), decoupled weight decay, in torch.optim.AdamW's order, at step (1 = first):
//   g = gradient * gradient_scale
//   p = p * (1 - learning_rate * weight_decay);  m = m + (g - m) * (1 - beta1);  v = beta2 * v + (1 - beta2) * g^2
//   p = p - learning_rate / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + epsilon)
//   parameters, exp_avg, exp_avg_sq: fp32; gradients: gradient_dtype; model_copies (optional list, single entries may
//   be 0): round(p) in model_dtype. gradient_scale: address of one fp32 (host for cpu, device for cuda), optional (1).
// squared_norm: result [2] fp64 = the sum of squares of all elements, in fp64 over fixed chunks in order (inf and NaN
//   flow into it), and the number of elements that are not finite. workspace: squared_norm_workspace(...) fp64 values.
// scale: every tensor times *factor, in place (factor fp32: host for cpu, device for cuda); 1 writes nothing.
#define K2_MULTI_TENSOR(RESULT, WHERE)                                                                                 \
  RESULT adamw(const int64_t* parameters, const int64_t* gradients, const int64_t* exp_avg, const int64_t* exp_avg_sq, \
               const int64_t* model_copies, const int64_t* sizes, int64_t count, double learning_rate, double beta1,   \
               double beta2, double epsilon, double weight_decay, int64_t step, const float* gradient_scale,           \
               DType gradient_dtype, DType model_dtype, WHERE);                                                        \
  RESULT squared_norm(const int64_t* tensors, const int64_t* sizes, int64_t count, double* workspace, double* result,  \
                      DType dtype, WHERE);                                                                             \
  int64_t squared_norm_workspace(const int64_t* sizes, int64_t count);                                                 \
  RESULT scale(const int64_t* tensors, const int64_t* sizes, int64_t count, const float* factor, DType dtype, WHERE);

// Of the CPU alone (on a GPU torch takes it): the fingerprint of rows of a tensor, added to *sum modulo 2^64:
//   sum over all elements of mix(mix(index, key) xor bits, 0),  mix(x, key) = splitmix64's output at (x + 1) * g + key
//   values: rows x columns of itemsize 2, 4 or 8 bytes, row_stride elements from row to row; bits are sign-extended.
//   index of element (r, c) = first_index + r * index_stride + c, its linear index in the whole tensor.
//
// Three of preprocessing, single-threaded whatever `threads` says (each of its workers is a process):
// json_texts: from the `size` bytes of JSON lines at block + cursor[0] on, the string under `key` of each, unescaped to
//   UTF-8 at text + offsets[cursor[1]]; per line cursor[1] grows by one, offsets[cursor[1]] is set and cursor[0] moves to
//   the next line. Stops at the first line that it leaves to the caller (cursor[0] < size): blank, bad, without the key,
//   or unusual. `text` has size + 32 bytes.
// narrow_ids: documents of lengths[i] ids end to end, each that is not empty followed by `end` (-1: by nothing), as
//   uint16 (itemsize 2) or int32.
// unpack_block: a part of a block of Snappy (format 0, behind its length) or LZ4 (1) goes on from
//   in + state[0] to out + state[1], until either lacks room or bytes (fewer than 5 may be left of a tag). `out` still
//   holds the last 64 KiB before. state [7]: both positions, what is under way, and 1 where a copy begins before `out`
//   (state[4] is then how far back).
//
// The hash of checkpoint files, aes_lanes (train/checkpoints/aes_lanes.py defines it; csrc/aes_lanes.h makes it an
// object), in two parts, on one thread:
// aes_lanes_absorb: lanes, 32 words of 16 bytes, take `stripes` stripes of 512 bytes: lane = AES round(lane) xor word.
// aes_lanes_digest: 16 bytes of `lanes` and of the number of bytes that were taken.
#define K2_CPU_OPS(RESULT, WHERE)                                                                                      \
  RESULT fingerprint(const void* values, int64_t itemsize, int64_t rows, int64_t columns, int64_t row_stride,          \
                     int64_t first_index, int64_t index_stride, uint64_t key, uint64_t* sum, WHERE);                   \
  RESULT json_texts(const void* block, int64_t size, const void* key, int64_t key_size, void* text, int64_t* offsets,  \
                    int64_t* cursor, WHERE);                                                                           \
  RESULT narrow_ids(const uint32_t* ids, const int64_t* lengths, int64_t documents, int64_t end, void* out,            \
                    int64_t itemsize, WHERE);                                                                          \
  RESULT unpack_block(int64_t format, const void* in, int64_t in_size, void* out, int64_t out_size, int64_t* state,    \
                      WHERE);                                                                                          \
  RESULT aes_lanes_absorb(void* lanes, const void* data, int64_t stripes, WHERE);                                      \
  RESULT aes_lanes_digest(const void* lanes, int64_t bytes, void* digest, WHERE);

#define K2_ALL_OPS(RESULT, WHERE) \
  K2_RMS_NORM(RESULT, WHERE)      \
  K2_ROTARY(RESULT, WHERE)        \
  K2_SWIGLU(RESULT, WHERE)        \
  K2_CROSS_ENTROPY(RESULT, WHERE) \
  K2_MULTI_TENSOR(RESULT, WHERE)

namespace k2::cuda {
K2_ALL_OPS(int, void* stream)
}
namespace k2::cpu::portable {
K2_ALL_OPS(void, int threads)
K2_CPU_OPS(void, int threads)
}
namespace k2::cpu::avx2 {
K2_ALL_OPS(void, int threads)
K2_CPU_OPS(void, int threads)
}
namespace k2::cpu::avx512 {
K2_ALL_OPS(void, int threads)
K2_CPU_OPS(void, int threads)
}
