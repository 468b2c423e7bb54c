// The native ops on lists of tensors: mmkernels/multi_tensor/table.py says what a row holds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

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
// elements, whole, kind, number, first; then the addresses
constexpr int64_t COLUMNS = 5;

void check_scalar(const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.numel() == 1 && x.scalar_type() == dtype, name,
                  " must be one number on the CPU, of the right dtype");
}

// Calls run(row) for each chunk, in parallel: each element is written by one thread.
template <class Run>
void for_chunks(const Tensor& rows, int64_t lists, const Run& run) {
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 2 && rows.size(1) == COLUMNS + lists && rows.is_contiguous() &&
                      rows.scalar_type() == ScalarType::Long,
                  "rows must be a table of ", lists, " lists on the CPU");
  const int64_t* table = rows.const_data_ptr<int64_t>();
  torch::stable::parallel_for(0, rows.size(0), std::max<int64_t>(1, GRAIN / CHUNK), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(table + i * (COLUMNS + lists));
  });
}

template <class T>
T* address(const int64_t* row, int64_t list) {
  return reinterpret_cast<T*>(row[COLUMNS + list]);
}

void ema_update_table(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& seed) {
  check_scalar(weight, ScalarType::Float, "weight");
  if (seed) check_scalar(*seed, ScalarType::Long, "seed");
  const float by = *weight.const_data_ptr<float>();
  const uint64_t key = seed ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0;
  for_chunks(rows, 3, [&](const int64_t* row) {
    kernels.ema({row[0], row[2], address<void>(row, 0), address<const void>(row, 1), address<void>(row, 2), by,
                 seed.has_value(), static_cast<uint32_t>(row[3]), row[4], key});
  });
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  // it writes through the addresses that the rows hold
  m.def("ema_update_table(Tensor rows, Tensor weight, Tensor? seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("ema_update_table", TORCH_BOX(&mmkernels::ema_update_table)); }
