// Attention on a CPU: mmkernels/attention/native.py says what it computes.
//
// A task is a block of rows forward and some keys of a key head backward, cut by shapes alone, and partial sums are added in
// order: no bit depends on the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "attention_kernels.h"
#include "pick.h"

namespace mmkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef MMKERNELS_X86
const AttentionKernels& kernels =
    has_avx512_bf16() ? attention_avx512_bf16 : pick(attention_avx512, attention_avx2, attention_baseline);
#else
const AttentionKernels& kernels = attention_baseline;
#endif

// Tasks of a backward, as long as each has so many keys.
constexpr int64_t TASKS = 64, MIN_TASK_KEYS = 256;

struct Aligned {
  explicit Aligned(int64_t bytes) : data(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  char* data;
};

Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Kind::float32;
    case ScalarType::BFloat16: return Kind::bfloat16;
    default: return Kind::float16;
  }
}

// [batch, rows, heads, depth]
struct Rows {
  const char* data;
  int64_t size, batch, row, head;

  Rows(const Tensor& x, const char* name, int64_t batches, int64_t rows, int64_t heads, int64_t depth)
      : data(static_cast<const char*>(x.const_data_ptr())), size(x.element_size()) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(0) == batches && x.size(1) == rows && x.size(2) == heads &&
                        x.size(3) == depth && (x.stride(3) == 1 || depth <= 1 || !x.numel()),
                    name, " must be [", batches, ", ", rows, ", ", heads, ", ", depth, "] on the CPU with unit stride");
    batch = x.stride(0), row = x.stride(1), head = x.stride(2);
  }

  Matrix of(int64_t b, int64_t h) const { return {data + (b * batch + h * head) * size, row}; }
};

// One sample and head of something whose first dimensions may be 1.
template <class T>
struct Shared {
  const T* data = nullptr;
  int64_t strides[4] = {};

  Shared() = default;
  Shared(const std::optional<Tensor>& x, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes,
         size_t may_be_one) {
    if (!x) return;
    STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == dtype && x->dim() == static_cast<int64_t>(sizes.size()), name,
                    " must have ", sizes.size(), " dimensions, on the CPU and of the right dtype");
    for (size_t d = 0; d < sizes.size(); ++d) {
      const int64_t size = x->size(d);
      STD_TORCH_CHECK(size == sizes[d] || (size == 1 && d < may_be_one), name, " must have size ", sizes[d],
                      " in dimension ", d, ", got ", size);
      strides[d] = size == 1 ? 0 : x->stride(d);
    }
    data = static_cast<const T*>(x->const_data_ptr());
  }

  const T* of(int64_t first, int64_t second = 0) const {
    return data ? data + first * strides[0] + second * strides[1] : nullptr;
  }
};

bool is_bool(const std::optional<Tensor>& x) { return x && x->scalar_type() == ScalarType::Bool; }

struct Call {
  int64_t batches, rows, keys, heads, groups, depth;
  Kind kind;
  Rows q, k, v;
  Shared<int32_t> ends[4];
  Shared<bool> seen_keys, seen;
  Shared<float> bias, slopes;
  Drop drop = {};
  float scale;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::vector<Tensor>& ends_,
       const std::optional<Tensor>& keys_, const std::optional<Tensor>& bias_, const std::optional<Tensor>& slopes_,
       const std::optional<Tensor>& seed, double threshold, double keep_scale, double scale_)
      : batches(q_.size(0)), rows(q_.size(1)), keys(k_.size(1)), heads(q_.size(2)),
        groups(std::max<int64_t>(heads / std::max<int64_t>(k_.size(2), 1), 1)), depth(q_.size(3)), kind(kind_of(q_)),
        q(q_, "q", batches, rows, heads, depth), k(k_, "k", batches, keys, heads / groups, depth),
        v(v_, "v", batches, keys, heads / groups, depth),
        seen_keys(keys_, "keys", ScalarType::Bool, {batches, keys}, 1),
        slopes(slopes_, "alibi_slopes", ScalarType::Float, {batches, heads}, 1), scale(static_cast<float>(scale_)) {
    STD_TORCH_CHECK(k_.scalar_type() == q_.scalar_type() && v_.scalar_type() == q_.scalar_type() &&
                        (kind != Kind::float16 || q_.scalar_type() == ScalarType::Half),
                    "q, k and v must be of one dtype, float32, bfloat16 or float16");
    STD_TORCH_CHECK(ends_.size() == 0 || ends_.size() == 2 || ends_.size() == 4, "ends must be none, two or four");
    for (size_t n = 0; n < ends_.size(); ++n) {
      ends[n] = Shared<int32_t>(ends_[n], "ends", ScalarType::Int, {batches, rows}, 1);
      STD_TORCH_CHECK(rows <= 1 || ends_[n].stride(1) == 1, "ends must have unit stride");
    }
    STD_TORCH_CHECK(!keys_ || keys <= 1 || keys_->stride(1) == 1, "keys must have unit stride");
    const std::vector<int64_t> sizes = {batches, heads, rows, keys};
    if (is_bool(bias_))
      seen = Shared<bool>(bias_, "bias", ScalarType::Bool, sizes, 4);
    else
      bias = Shared<float>(bias_, "bias", ScalarType::Float, sizes, 4);
    if (!seed) return;
    STD_TORCH_CHECK(seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    "seed must be int64 [] on the CPU");
    drop = {static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), 0, static_cast<uint32_t>(threshold),
            static_cast<float>(keep_scale)};
  }

  Head head(int64_t b, int64_t h, int64_t first, int64_t count) const {
    Mask mask = {{ends[0].of(b), ends[1].of(b), ends[2].of(b), ends[3].of(b)},
                 seen_keys.of(b),
                 bias.of(b, h),
                 seen.of(b, h),
                 bias.data ? bias.strides[2] : seen.strides[2],
                 bias.data ? bias.strides[3] : seen.strides[3],
                 slopes.data ? slopes.data[b * slopes.strides[0] + h * slopes.strides[1]] : 0.0f,
                 keys - rows};
    Drop of_head = drop;
    of_head.head = static_cast<uint32_t>(b * heads + h);
    return {kind, q.of(b, h), k.of(b, h / groups), v.of(b, h / groups), mask, of_head, first, count, keys, depth, scale};
  }

  int64_t blocks() const { return (rows + kernels.lanes - 1) / kernels.lanes; }
  // what a task has to do at least for a thread to be worth it
  int64_t grain(int64_t work) const { return std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, work * depth)); }
};

float* vector_of(const Tensor& x, const char* name, const Call& call, int64_t* batch, int64_t* head) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.size(0) == call.batches && x.size(1) == call.heads &&
                      x.size(2) == call.rows && (x.stride(2) == 1 || call.rows <= 1) &&
                      x.scalar_type() == ScalarType::Float,
                  name, " must be float32 [", call.batches, ", ", call.heads, ", ", call.rows, "] with unit stride");
  *batch = x.stride(0), *head = x.stride(1);
  return static_cast<float*>(x.mutable_data_ptr());
}

void attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Tensor>& ends,
                   const std::optional<Tensor>& keys, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& slopes, const std::optional<Tensor>& seed, double threshold,
                   double keep_scale, double scale, const Tensor& out, const Tensor& lse) {
  const Call call(q, k, v, ends, keys, bias, slopes, seed, threshold, keep_scale, scale);
  const Rows to(out, "out", call.batches, call.rows, call.heads, call.depth);
  STD_TORCH_CHECK(out.scalar_type() == q.scalar_type(), "out must be of the dtype of q");
  int64_t lse_batch, lse_head;
  float* of_rows = vector_of(lse, "lse", call, &lse_batch, &lse_head);
  const int64_t blocks = call.blocks();
  torch::stable::parallel_for(0, call.batches * call.heads * blocks, call.grain(kernels.lanes * call.keys),
                              [&](int64_t begin, int64_t end) {
    const Aligned scratch(kernels.forward_bytes(call.depth));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / call.heads, h = task / blocks % call.heads;
      const int64_t first = task % blocks * kernels.lanes;
      const Matrix rows = to.of(b, h);
      kernels.forward({call.head(b, h, first, std::min(kernels.lanes, call.rows - first)),
                       {const_cast<void*>(rows.data), rows.stride},
                       of_rows + b * lse_batch + h * lse_head + first},
                      scratch.data);
    }
  });
}

// Whether a row of a block may see any of some keys.
bool may_see(const Head& head, int64_t first, int64_t last) {
  const auto* ends = head.mask.ends;
  if (!ends[0]) return true;
  for (int64_t n = 0; n < 4 && ends[n]; n += 2)
    for (int64_t row = head.first_row; row < head.first_row + head.rows; ++row)
      if (std::max<int64_t>(ends[n][row], first) < std::min<int64_t>(ends[n + 1][row], last)) return true;
  return false;
}

float entry(const char* data, Kind kind, int64_t i) {
  if (kind == Kind::float32) return reinterpret_cast<const float*>(data)[i];
  uint16_t bits = reinterpret_cast<const uint16_t*>(data)[i];
  return kind == Kind::bfloat16 ? std::bit_cast<float>(static_cast<uint32_t>(bits) << 16)
                                : static_cast<float>(std::bit_cast<_Float16>(bits));
}

// dq, dk and dv, of the dtype of q, are written.
void attention_cpu_bwd(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Tensor>& ends,
                   const std::optional<Tensor>& keys, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& slopes, const std::optional<Tensor>& seed, double threshold,
                   double keep_scale, double scale, const Tensor& d_out, const Tensor& lse, const Tensor& delta,
                         const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const Call call(q, k, v, ends, keys, bias, slopes, seed, threshold, keep_scale, scale);
  const int64_t key_heads = call.heads / call.groups, depth = call.depth;
  const Rows upstream(d_out, "d_out", call.batches, call.rows, call.heads, depth);
  const Rows to_q(dq, "dq", call.batches, call.rows, call.heads, depth);
  const Rows to_k(dk, "dk", call.batches, call.keys, key_heads, depth);
  const Rows to_v(dv, "dv", call.batches, call.keys, key_heads, depth);
  STD_TORCH_CHECK(d_out.scalar_type() == q.scalar_type(), "d_out must be of the dtype of q");
  for (const Tensor* dx : {&dq, &dk, &dv})
    STD_TORCH_CHECK(dx->scalar_type() == q.scalar_type(), "dq, dk and dv must be of the dtype of q");
  int64_t lse_batch, lse_head, delta_batch, delta_head;
  const float* of_rows = vector_of(lse, "lse", call, &lse_batch, &lse_head);
  const float* taken = vector_of(delta, "delta", call, &delta_batch, &delta_head);
  const int64_t wanted = TASKS / std::max<int64_t>(1, call.batches * key_heads);
  const int64_t most = std::clamp<int64_t>(call.keys / MIN_TASK_KEYS, 1, std::max<int64_t>(wanted, 1));
  const int64_t chunk = ((call.keys + most - 1) / most + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS;
  const int64_t chunks = std::max<int64_t>(1, (call.keys + chunk - 1) / std::max<int64_t>(chunk, 1));
  const int64_t of_head = call.rows * depth, of_chunk = call.batches * call.heads * of_head;
  // of row blocks that see nothing of a chunk it is never touched, and takes no memory
  std::unique_ptr<float[]> partial(chunks > 1 ? new float[chunks * of_chunk] : nullptr);
  const int64_t blocks = call.blocks();
  std::vector<char> is_there(partial ? chunks * call.batches * call.heads * blocks : 0);
  const int64_t width = (depth + kernels.depth_multiple - 1) / kernels.depth_multiple * kernels.depth_multiple;
  const auto write = [&](const Matrix& to, int64_t first, const float* rows, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      char* at = static_cast<char*>(const_cast<void*>(to.data)) + (first + i) * to.stride * to_q.size;
      kernels.narrow(call.kind, rows + i * stride, depth, at);
    }
  };
  torch::stable::parallel_for(0, call.batches * key_heads * chunks,
                              call.grain(call.rows * call.groups * chunk), [&](int64_t begin, int64_t end) {
    const Aligned scratch(kernels.backward_bytes(depth));
    const Aligned sums((2 * chunk * width + kernels.lanes * depth) * sizeof(float));
    float *k_sums = reinterpret_cast<float*>(sums.data), *v_sums = k_sums + chunk * width;
    float* q_sums = v_sums + chunk * width;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks / key_heads, key_head = task / chunks % key_heads, c = task % chunks;
      const int64_t from = c * chunk, last = std::min(call.keys, from + chunk);
      std::fill_n(k_sums, 2 * chunk * width, 0.0f);
      for (int64_t h = key_head * call.groups; h < (key_head + 1) * call.groups; ++h)
        for (int64_t first = 0; first < call.rows; first += kernels.lanes) {
          const int64_t count = std::min(kernels.lanes, call.rows - first);
          const Head head = call.head(b, h, first, count);
          if (!may_see(head, from, last)) {
            std::fill_n(q_sums, count * depth, 0.0f);
            if (!partial) write(to_q.of(b, h), first, q_sums, depth, count);
            continue;
          }
          if (partial) is_there[((c * call.batches + b) * call.heads + h) * blocks + first / kernels.lanes] = 1;
          float* dq_rows = partial ? partial.get() + c * of_chunk + (b * call.heads + h) * of_head + first * depth : q_sums;
          kernels.backward({head, upstream.of(b, h),
                            of_rows + b * lse_batch + h * lse_head + first,
                            taken + b * delta_batch + h * delta_head + first, from, last, dq_rows, k_sums, v_sums},
                           scratch.data);
          if (!partial) write(to_q.of(b, h), first, q_sums, depth, count);
        }
      write(to_k.of(b, key_head), from, k_sums, width, last - from);
      write(to_v.of(b, key_head), from, v_sums, width, last - from);
    }
  });
  if (!partial) return;
  torch::stable::parallel_for(0, call.batches * call.heads, call.grain(call.rows), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(depth);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t r = 0; r < call.rows; ++r) {
        const float* part = partial.get() + i * of_head + r * depth;
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t c = 0; c < chunks; ++c) {
          if (!is_there[(c * call.batches * call.heads + i) * blocks + r / kernels.lanes]) continue;
          for (int64_t d = 0; d < depth; ++d) sums[d] += part[c * of_chunk + d];
        }
        write(to_q.of(i / call.heads, i % call.heads), r, sums.data(), depth, 1);
      }
  });
}

// sum(out * d_out) of each row, float32 [batch, heads, rows].
void attention_delta(const Tensor& out, const Tensor& d_out, const Tensor& delta) {
  const int64_t batches = out.size(0), rows = out.size(1), heads = out.size(2), depth = out.size(3);
  const Rows x(out, "out", batches, rows, heads, depth), y(d_out, "d_out", batches, rows, heads, depth);
  STD_TORCH_CHECK(delta.is_contiguous() && delta.scalar_type() == ScalarType::Float && delta.numel() == batches * heads * rows,
                  "delta must be contiguous float32 [", batches, ", ", heads, ", ", rows, "]");
  STD_TORCH_CHECK(out.scalar_type() == d_out.scalar_type(), "out and d_out must be of one dtype");
  const Kind kind = kind_of(out);
  float* to = delta.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, rows * depth));
  torch::stable::parallel_for(0, batches * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Matrix a = x.of(i / heads, i % heads), b = y.of(i / heads, i % heads);
      for (int64_t r = 0; r < rows; ++r) {
        const char* one = static_cast<const char*>(a.data) + r * a.stride * x.size;
        const char* other = static_cast<const char*>(b.data) + r * b.stride * y.size;
        float sums[16] = {};
        for (int64_t d = 0; d < depth; ++d) sums[d % 16] += entry(one, kind, d) * entry(other, kind, d);
        float total = 0;
        for (float sum : sums) total += sum;
        to[i * rows + r] = total;
      }
    }
  });
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "attention_cpu(Tensor q, Tensor k, Tensor v, Tensor[] ends, Tensor? keys, Tensor? bias, Tensor? slopes, Tensor? seed, "
      "float threshold, float keep_scale, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_cpu_bwd(Tensor q, Tensor k, Tensor v, Tensor[] ends, Tensor? keys, Tensor? bias, Tensor? slopes, Tensor? seed, "
      "float threshold, float keep_scale, float scale, Tensor d_out, Tensor lse, Tensor delta, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def("attention_delta(Tensor out, Tensor d_out, Tensor(a!) delta) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("attention_cpu", TORCH_BOX(&mmkernels::attention_cpu));
  m.impl("attention_cpu_bwd", TORCH_BOX(&mmkernels::attention_cpu_bwd));
  m.impl("attention_delta", TORCH_BOX(&mmkernels::attention_delta));
}
