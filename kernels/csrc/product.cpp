// Products of bfloat16 operands into float32 on a CPU: mmkernels/_gemm.py says what they compute.
//
// Each entry of the result is one sum over k in one order, whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "pick.h"
#include "product_kernels.h"

#ifdef MMKERNELS_X86
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
// oneDNN's kernel of a panel, which is not in torch's stable interface: null in a version without it
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride,
                                  int64_t c_stride, bool add, const c10::BFloat16* a, const c10::BFloat16* b, float* c,
                                  bool is_packed);
__attribute__((weak)) void brgemm_release(bool is_packed);
__attribute__((weak)) bool could_pack(c10::ScalarType dtype);
}  // namespace at::native::cpublas
#endif

namespace mmkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of a task, whose part of a stays in a second-level cache.
constexpr int64_t TASK_ROWS = 384;

Operand operand_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16, name,
                  " must be bfloat16 [rows, k] on the CPU");
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

Operand from(Operand x, int64_t row, int64_t k) {
  x.data += row * x.stride + k * x.step;
  return x;
}

#ifdef MMKERNELS_X86
bool has_amx() {
  using namespace at::native::cpublas;
  // oneDNN asks the system for AMX's registers; whether it has them it says itself
  return has_avx512_bf16() && brgemm && brgemm_release && could_pack && __builtin_cpu_supports("amx-bf16") &&
         could_pack(ScalarType::BFloat16);
}

void multiply_by_amx(const Panel& work) {
  const auto call = [&](float* c, int64_t c_stride, bool add) {
    at::native::cpublas::brgemm(work.rows, PANEL_COLS, 2 * work.pairs, work.a_stride, PANEL_COLS, c_stride, add,
                                reinterpret_cast<const c10::BFloat16*>(work.a),
                                reinterpret_cast<const c10::BFloat16*>(work.b), c, true);
  };
  if (work.cols == PANEL_COLS) return call(work.c, work.c_stride, work.add);
  const std::unique_ptr<float[]> whole(new float[work.rows * PANEL_COLS]);
  call(whole.get(), PANEL_COLS, false);
  for (int64_t i = 0; i < work.rows; ++i)
    for (int64_t j = 0; j < work.cols; ++j) {
      float& c = work.c[i * work.c_stride + j];
      c = work.add ? c + whole[i * PANEL_COLS + j] : whole[i * PANEL_COLS + j];
    }
}

// `a` as rows of pairs: itself, or packed into `packed`.
Operand rows_of(const Operand& a, int64_t rows, int64_t depth, std::unique_ptr<uint32_t[]>& packed) {
  if (a.step == 1 && depth % 2 == 0) return a;
  const int64_t pairs = (depth + 1) / 2, block = 64;
  packed.reset(new uint32_t[rows * pairs]);
  torch::stable::parallel_for(0, (rows + block - 1) / block, std::max<int64_t>(1, GRAIN / (block * pairs)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * block; row < std::min(rows, end * block); row += block)
      products_avx512_bf16.pack_rows(from(a, row, 0), std::min(block, rows - row), depth, packed.get() + row * pairs,
                                     pairs);
  });
  return {reinterpret_cast<const uint16_t*>(packed.get()), 2 * pairs, 1};
}

// One panel of columns against some rows, the whole k.
void multiply_panel(const Operand& a, const Operand& b, float* c, int64_t c_stride, int64_t rows, int64_t cols,
                    int64_t depth, bool add, bool by_amx) {
  alignas(64) uint32_t packed[PANEL_COLS * DEPTH];
  for (int64_t k = 0; k < depth; k += 2 * DEPTH) {
    const int64_t count = std::min(2 * DEPTH, depth - k);
    products_avx512_bf16.pack_cols(from(b, 0, k), cols, count, packed);
    const Panel work = {a.data + k, a.stride, packed, c, c_stride, rows, cols, (count + 1) / 2, add || k > 0};
    by_amx ? multiply_by_amx(work) : products_avx512_bf16.multiply(work);
  }
}
#else
bool has_amx() { return false; }
bool has_avx512_bf16() { return false; }
#endif

// Which ways there are: 1 for AVX-512, 2 for AMX, both added.
int64_t bfloat16_ways() { return has_avx512_bf16() ? (has_amx() ? 3 : 1) : 0; }

void product_bfloat16(const Tensor& x, const Tensor& y, const Tensor& out, bool add, bool by_amx) {
  const Operand x_operand = operand_of(x, "x"), b = operand_of(y, "y");
  const int64_t rows = x.size(0), cols = y.size(0), depth = x.size(1);
  STD_TORCH_CHECK(y.size(1) == depth, "y must be [n, ", depth, "]");
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.size(0) == rows && out.size(1) == cols &&
                      (out.stride(1) == 1 || cols <= 1) && out.scalar_type() == ScalarType::Float,
                  "out must be float32 [", rows, ", ", cols, "] on the CPU with unit column stride");
  STD_TORCH_CHECK(by_amx ? has_amx() : has_avx512_bf16(), "this processor has no such products of bfloat16");
#ifdef MMKERNELS_X86
  float* c = out.mutable_data_ptr<float>();
  const int64_t c_stride = out.stride(0);
  if (!rows || !cols) return;
  if (!depth) {
    if (!add)
      for (int64_t i = 0; i < rows; ++i) std::fill_n(c + i * c_stride, cols, 0.0f);
    return;
  }
  std::unique_ptr<uint32_t[]> packed;
  const Operand a = rows_of(x_operand, rows, depth, packed);
  const int64_t panels = (cols + PANEL_COLS - 1) / PANEL_COLS, blocks = (rows + TASK_ROWS - 1) / TASK_ROWS;
  const int64_t block = ((rows + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / (block * PANEL_COLS * depth));
  torch::stable::parallel_for(0, blocks * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / panels * block, col = task % panels * PANEL_COLS;
      multiply_panel(from(a, row, 0), from(b, col, 0), c + row * c_stride + col, c_stride,
                     std::min(block, rows - row), std::min(PANEL_COLS, cols - col), depth, add, by_amx);
    }
    if (by_amx) at::native::cpublas::brgemm_release(true);
  });
#endif
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def("product_bfloat16(Tensor x, Tensor y, Tensor(a!) out, bool add, bool by_amx) -> ()");
  m.def("bfloat16_ways() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("product_bfloat16", TORCH_BOX(&mmkernels::product_bfloat16)); }

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CompositeExplicitAutograd, m) {
  m.impl("bfloat16_ways", TORCH_BOX(&mmkernels::bfloat16_ways));
}
