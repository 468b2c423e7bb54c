// The native ops on lists of tensors: mmkernels/multi_tensor/table.py says what a row holds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "multi_tensor_kernels.h"
#include "pick.h"

namespace mmkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef MMKERNELS_X86
const MultiTensorKernels& kernels = pick(multi_tensor_avx512, multi_tensor_avx2, multi_tensor_baseline);
#else
const MultiTensorKernels& kernels = multi_tensor_baseline;
#endif

constexpr int64_t CHUNK = 4096;
// of a chunk: number of its tensor, first element, elements
constexpr int64_t CHUNK_COLUMNS = 3;
// of a tensor: kind, 1 where all addresses are aligned; then the addresses
constexpr int64_t TENSOR_COLUMNS = 2;
constexpr int64_t WIDTHS[] = {0, 4, 2, 2, 1};

void check_table(const Tensor& x, int64_t columns, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) == columns && x.is_contiguous() &&
                      x.scalar_type() == ScalarType::Long,
                  name, " must be a table of ", columns, " columns on the CPU");
}

template <class T>
const T* numbers(const Tensor& x, ScalarType dtype, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.numel() == count && x.scalar_type() == dtype && x.is_contiguous(), name,
                  " must be ", count, " numbers on the CPU, of the right dtype");
  return x.const_data_ptr<T>();
}

// Calls run(chunk, its index) for each, in parallel: each element is written by one thread.
template <class Run>
void for_chunks(const Tensor& chunks, const Tensor& tensors, int64_t lists, const Run& run) {
  check_table(chunks, CHUNK_COLUMNS, "chunks");
  check_table(tensors, TENSOR_COLUMNS + lists, "tensors");
  const int64_t* chunk_rows = chunks.const_data_ptr<int64_t>();
  const int64_t* tensor_rows = tensors.const_data_ptr<int64_t>();
  torch::stable::parallel_for(0, chunks.size(0), std::max<int64_t>(1, GRAIN / CHUNK), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t* row = chunk_rows + i * CHUNK_COLUMNS;
      const int64_t* tensor = tensor_rows + row[0] * (TENSOR_COLUMNS + lists);
      Chunk chunk{row[2], tensor[0], row[0], row[1], {}};
      for (int64_t list = 0; list < lists; ++list) {
        const int64_t width = WIDTHS[chunk.kind >> (3 * list) & 7];
        chunk.lists[list] = reinterpret_cast<void*>(tensor[TENSOR_COLUMNS + list] + row[1] * width);
      }
      run(chunk, i);
    }
  });
}

void ema_update_table(const Tensor& chunks, const Tensor& tensors, const Tensor& weight,
                      const std::optional<Tensor>& seed) {
  Ema by{*numbers<float>(weight, ScalarType::Float, 1, "weight"), seed.has_value(), 0};
  if (seed) by.key = static_cast<uint64_t>(*numbers<int64_t>(*seed, ScalarType::Long, 1, "seed"));
  for_chunks(chunks, tensors, 3, [&](const Chunk& chunk, int64_t) { kernels.ema(chunk, by); });
}

void adamw_update_table(const Tensor& chunks, const Tensor& tensors, const Tensor& factors) {
  const double* f = numbers<double>(factors, ScalarType::Double, 10, "factors");
  float by[10];
  std::copy(f, f + 10, by);
  const AdamW step{by[0], by[1], by[2], by[3], by[4], by[5], by[6], by[7], by[8], by[9]};
  for_chunks(chunks, tensors, 7, [&](const Chunk& chunk, int64_t) { kernels.adamw(chunk, step); });
}

// The sum of what run(chunk) gives, in the order of the chunks: the same bits on any number of threads.
template <class Run>
double sum_chunks(const Tensor& chunks, const Tensor& tensors, int64_t lists, const Run& run) {
  std::vector<double> sums(chunks.size(0));
  for_chunks(chunks, tensors, lists, [&](const Chunk& chunk, int64_t i) { sums[i] = run(chunk); });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

double squares_table(const Tensor& chunks, const Tensor& tensors) {
  return sum_chunks(chunks, tensors, 1, kernels.squares);
}

void clip_table(const Tensor& chunks, const Tensor& tensors, const Tensor& norm, double max_norm) {
  const float room = static_cast<float>(max_norm) / (*numbers<float>(norm, ScalarType::Float, 1, "norm") + 1e-6f);
  const float factor = room > 1 ? 1 : room;
  if (factor != 1) for_chunks(chunks, tensors, 1, [&](const Chunk& chunk, int64_t) { kernels.scale(chunk, factor); });
}

void fisher_accumulate_table(const Tensor& chunks, const Tensor& tensors, double weight, double decay) {
  const Fisher by{static_cast<float>(decay), static_cast<float>(weight)};
  for_chunks(chunks, tensors, 2, [&](const Chunk& chunk, int64_t) { kernels.fisher(chunk, by); });
}

double ewc_penalty_fwd_table(const Tensor& chunks, const Tensor& tensors) {
  return sum_chunks(chunks, tensors, 3, kernels.ewc);
}

void ewc_penalty_bwd_table(const Tensor& chunks, const Tensor& tensors, const Tensor& factor) {
  const float by = *numbers<float>(factor, ScalarType::Float, 1, "factor");
  for_chunks(chunks, tensors, 4, [&](const Chunk& chunk, int64_t) { kernels.ewc_grad(chunk, by); });
}

void apply_masks_table(const Tensor& chunks, const Tensor& tensors, int64_t first, int64_t last) {
  const Owners by{static_cast<uint8_t>(first), static_cast<uint8_t>(last)};
  for_chunks(chunks, tensors, 2, [&](const Chunk& chunk, int64_t) { kernels.masks(chunk, by); });
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  // they write through the addresses that the tables hold
  m.def("ema_update_table(Tensor chunks, Tensor tensors, Tensor weight, Tensor? seed) -> ()");
  m.def("adamw_update_table(Tensor chunks, Tensor tensors, Tensor factors) -> ()");
  m.def("squares_table(Tensor chunks, Tensor tensors) -> float");
  m.def("clip_table(Tensor chunks, Tensor tensors, Tensor norm, float max_norm) -> ()");
  m.def("fisher_accumulate_table(Tensor chunks, Tensor tensors, float weight, float decay) -> ()");
  m.def("ewc_penalty_fwd_table(Tensor chunks, Tensor tensors) -> float");
  m.def("ewc_penalty_bwd_table(Tensor chunks, Tensor tensors, Tensor factor) -> ()");
  m.def("apply_masks_table(Tensor chunks, Tensor tensors, int first, int last) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("ema_update_table", TORCH_BOX(&mmkernels::ema_update_table));
  m.impl("adamw_update_table", TORCH_BOX(&mmkernels::adamw_update_table));
  m.impl("squares_table", TORCH_BOX(&mmkernels::squares_table));
  m.impl("clip_table", TORCH_BOX(&mmkernels::clip_table));
  m.impl("fisher_accumulate_table", TORCH_BOX(&mmkernels::fisher_accumulate_table));
  m.impl("ewc_penalty_fwd_table", TORCH_BOX(&mmkernels::ewc_penalty_fwd_table));
  m.impl("ewc_penalty_bwd_table", TORCH_BOX(&mmkernels::ewc_penalty_bwd_table));
  m.impl("apply_masks_table", TORCH_BOX(&mmkernels::apply_masks_table));
}
