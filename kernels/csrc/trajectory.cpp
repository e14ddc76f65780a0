// The trajectory head on the CPU: sum |X W' + b - t| over present coordinates, the signs, and gradients from the signs.
//
// Rows are processed in tiles, so predictions exist for one tile only and are still in cache when the distances are
// computed. The GEMMs and the thread pool (at::parallel_for, OpenMP) are PyTorch's: a second OpenMP runtime would
// ignore torch.set_num_threads, and its threads would spin next to those of the first.

#include "common.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

namespace {

using namespace pite;

constexpr int64_t kTile = 1024;  // rows per GEMM: enough to amortise packing the weight

// out = beta * out + mat1 @ mat2
void gemm(Tensor& out, const Tensor& mat1, const Tensor& mat2, double beta) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), mat1.get(), mat2.get(), beta, 1.0));
}

bool consecutive(const int64_t* rows, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (rows[i] != rows[0] + i) return false;
  return true;
}

// The tile's rows of `hidden`: a view where they are consecutive, otherwise a copy in `buffer`.
Tensor gather(Tensor& hidden, const int64_t* rows, int64_t count, Tensor& buffer) {
  if (consecutive(rows, count)) return torch::stable::narrow(hidden, 0, rows[0], count);
  const int64_t depth = hidden.size(1), stride = hidden.stride(0);
  const float* source = static_cast<const float*>(hidden.data_ptr());
  float* target = static_cast<float*>(buffer.data_ptr());
  parallel_rows(count, depth, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(target + i * depth, source + rows[i] * stride, depth * sizeof(float));
  });
  return torch::stable::narrow(buffer, 0, 0, count);
}

struct RowResult {
  float total;
  int32_t count;
  int32_t bad;  // number of non-finite targets and half-absent pairs
};

VECTORIZED RowResult row_distance(const float* prediction, const float* bias, const float* target, int8_t* sign,
                                  int64_t outputs, bool skip_absent) {
  float total = 0;
  int32_t count = 0, bad = 0;
  const float absent = skip_absent ? -1.0f : NAN;
#pragma omp simd reduction(+ : total, count, bad)
  for (int64_t j = 0; j < outputs; ++j) {
    const bool present = !(target[j] == absent);
    const float difference = prediction[j] + bias[j] - target[j];
    const float distance = present ? difference : 0.0f;
    total += std::fabs(distance);
    count += present;
    bad += !(std::fabs(target[j]) <= FLT_MAX);
    sign[j] = static_cast<int8_t>((distance > 0) - (distance < 0));
  }
#pragma omp simd reduction(+ : bad)
  for (int64_t j = 0; j < outputs; j += 2) bad += (target[j] == absent) != (target[j + 1] == absent);
  return {total, count, bad};
}

VECTORIZED void scale_signs(const int8_t* sign, float coefficient, float* out, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] = coefficient * static_cast<float>(sign[j]);
}

VECTORIZED void add_into(float* out, const float* in, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] += in[j];
}

Tensor scalar(const Tensor& like, double value) {
  Tensor out = empty_like(like, {}, ScalarType::Float);
  *static_cast<float*>(out.data_ptr()) = static_cast<float>(value);
  return out;
}

float value(const Tensor& scalar) { return *static_cast<const float*>(scalar.data_ptr()); }

// The signs of the tile times the coefficient, in float32.
Tensor scaled_tile(const Tensor& sign, int64_t first, int64_t count, float coefficient, Tensor& buffer) {
  const int64_t outputs = sign.size(1);
  const int8_t* source = static_cast<const int8_t*>(sign.data_ptr()) + first * outputs;
  float* target = static_cast<float*>(buffer.data_ptr());
  torch::stable::parallel_for(0, count * outputs, kElementsPerThread, [&](int64_t begin, int64_t end) {
    scale_signs(source + begin, coefficient, target + begin, end - begin);
  });
  return torch::stable::narrow(buffer, 0, 0, count);
}

// hidden (T, d), weight (O, d), bias (O,), targets (M, O) float32; rows (M,) int64, in range.
// Returns the sum of distances, the number of coordinates counted, the number of invalid targets (0-dim float32 each),
// and the signs (M, O) int8.
std::tuple<Tensor, Tensor, Tensor, Tensor> trajectory_forward(Tensor hidden, Tensor weight, std::optional<Tensor> bias,
                                                      Tensor targets, Tensor rows, bool skip_absent) {
  const int64_t count = rows.size(0), outputs = weight.size(0), depth = weight.size(1);
  Tensor sign = empty_like(hidden, {count, outputs}, ScalarType::Char);
  const int64_t tile = std::min(kTile, count);
  Tensor gathered = empty_like(hidden, {tile, depth}, ScalarType::Float);
  Tensor predictions = empty_like(hidden, {tile, outputs}, ScalarType::Float);
  Tensor transposed = torch::stable::transpose(weight, 0, 1);
  const std::vector<float> zeros(bias ? 0 : outputs, 0.0f);
  const float* bias_data = bias ? static_cast<const float*>(bias->data_ptr()) : zeros.data();
  const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
  std::vector<RowResult> results(count);
  for (int64_t first = 0; first < count; first += tile) {
    const int64_t size = std::min(tile, count - first);
    Tensor x = gather(hidden, row + first, size, gathered);
    Tensor out = torch::stable::narrow(predictions, 0, 0, size);
    gemm(out, x, transposed, 0.0);
    const float* prediction = static_cast<const float*>(out.data_ptr());
    const float* target = static_cast<const float*>(targets.data_ptr()) + first * outputs;
    int8_t* signs = static_cast<int8_t*>(sign.data_ptr()) + first * outputs;
    parallel_rows(size, outputs, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        results[first + i] = row_distance(prediction + i * outputs, bias_data, target + i * outputs,
                                          signs + i * outputs, outputs, skip_absent);
    });
  }
  // Rows are summed in a fixed order, so the result does not depend on the number of threads.
  double total = 0, present = 0, bad = 0;
  for (const RowResult& result : results) total += result.total, present += result.count, bad += result.bad;
  return {scalar(hidden, total), scalar(hidden, present), scalar(hidden, bad), sign};
}

// grad_hidden[rows] += coefficient * sign @ weight; without `accumulate` grad_hidden is uninitialised memory.
void trajectory_grad_hidden(Tensor grad_hidden, Tensor coefficient, Tensor weight, Tensor sign, Tensor rows,
                            bool accumulate) {
  const int64_t count = rows.size(0), outputs = weight.size(0), depth = weight.size(1);
  const int64_t tile = std::min(kTile, count);
  Tensor signs = empty_like(grad_hidden, {tile, outputs}, ScalarType::Float);
  Tensor products = empty_like(grad_hidden, {tile, depth}, ScalarType::Float);
  const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
  float* target = static_cast<float*>(grad_hidden.data_ptr());
  const bool every_row = count == grad_hidden.size(0) && consecutive(row, count);
  if (!accumulate && !every_row)
    torch::stable::parallel_for(0, grad_hidden.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
      std::memset(target + begin, 0, (end - begin) * sizeof(float));
    });
  const double beta = accumulate || !every_row ? 1.0 : 0.0;
  for (int64_t first = 0; first < count; first += tile) {
    const int64_t size = std::min(tile, count - first);
    Tensor s = scaled_tile(sign, first, size, value(coefficient), signs);
    if (consecutive(row + first, size)) {
      Tensor slice = torch::stable::narrow(grad_hidden, 0, row[first], size);
      gemm(slice, s, weight, beta);
      continue;
    }
    Tensor product = torch::stable::narrow(products, 0, 0, size);
    gemm(product, s, weight, 0.0);
    const float* source = static_cast<const float*>(product.data_ptr());
    // Threads split the columns, not the rows: `rows` may hold the same row twice.
    torch::stable::parallel_for(0, depth, std::max<int64_t>(64, kElementsPerThread / size), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < size; ++i)
        add_into(target + row[first + i] * depth + begin, source + i * depth + begin, end - begin);
    });
  }
}

// coefficient * sign' @ hidden[rows], (O, d)
Tensor trajectory_grad_weight(Tensor coefficient, Tensor hidden, Tensor sign, Tensor rows) {
  const int64_t count = rows.size(0), outputs = sign.size(1), depth = hidden.size(1);
  const int64_t tile = std::min(kTile, count);
  Tensor grad = torch::stable::new_zeros(hidden, std::vector<int64_t>{outputs, depth}, ScalarType::Float);
  Tensor signs = empty_like(hidden, {tile, outputs}, ScalarType::Float);
  Tensor gathered = empty_like(hidden, {tile, depth}, ScalarType::Float);
  const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t first = 0; first < count; first += tile) {
    const int64_t size = std::min(tile, count - first);
    Tensor s = scaled_tile(sign, first, size, value(coefficient), signs);
    Tensor x = gather(hidden, row + first, size, gathered);
    gemm(grad, torch::stable::transpose(s, 0, 1), x, first == 0 ? 0.0 : 1.0);
  }
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY(pite_kernels_cpu, m) {
  m.def(
      "trajectory_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor rows, bool skip_absent) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "trajectory_grad_hidden(Tensor(a!) grad_hidden, Tensor coefficient, Tensor weight, Tensor sign, Tensor rows, "
      "bool accumulate) -> ()");
  m.def("trajectory_grad_weight(Tensor coefficient, Tensor hidden, Tensor sign, Tensor rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pite_kernels_cpu, CPU, m) {
  m.impl("trajectory_forward", TORCH_BOX(&trajectory_forward));
  m.impl("trajectory_grad_hidden", TORCH_BOX(&trajectory_grad_hidden));
  m.impl("trajectory_grad_weight", TORCH_BOX(&trajectory_grad_weight));
}
