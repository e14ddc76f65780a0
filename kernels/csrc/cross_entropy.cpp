// Cross-entropy of the vocabulary head on the CPU, between its two GEMMs: computes the losses of a chunk of logits and
// replaces the logits by their gradient p - (1 - eps) [target] - eps / V.
//
// A row of logits stays in the L1 cache through all steps: maximum, exponentials, scaling. PyTorch's operators would
// read and write the whole chunk in memory for each step.

#include "common.h"

#include <torch/csrc/stable/library.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <optional>

namespace {

using namespace pite;

// exp(x) for x <= 0: 2^n times a Taylor polynomial of degree 7, whose error on |r| <= ln 2 / 2 is 5e-9. The compiler
// cannot vectorize libm's exp.
inline float exp_of_negative(float x) {
  x = std::max(x, -87.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 as a sum of two numbers, the first with few bits
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Returns the smoothed loss of one row and replaces its logits by their gradient.
VECTORIZED float softmax_row(float* x, const float* bias, int64_t target, int64_t vocabulary, double smoothing) {
  if (bias)
#pragma omp simd
    for (int64_t j = 0; j < vocabulary; ++j) x[j] += bias[j];
  float highest = -FLT_MAX;
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < vocabulary; ++j) highest = std::max(highest, x[j]);
  const double picked = x[target];
  double mass = 0, total = 0;
  for (int64_t start = 0; start < vocabulary; start += 1024) {  // blocks keep the float32 sums short
    const int64_t stop = std::min(start + 1024, vocabulary);
    float block_mass = 0, block_total = 0;
#pragma omp simd reduction(+ : block_mass, block_total)
    for (int64_t j = start; j < stop; ++j) {
      block_total += x[j] - highest;
      x[j] = exp_of_negative(x[j] - highest);
      block_mass += x[j];
    }
    mass += block_mass;
    total += block_total;
  }
  const float scale = static_cast<float>(1.0 / mass);
  const float uniform = static_cast<float>(smoothing / static_cast<double>(vocabulary));
#pragma omp simd
  for (int64_t j = 0; j < vocabulary; ++j) x[j] = x[j] * scale - uniform;
  x[target] -= static_cast<float>(1.0 - smoothing);
  const double mean = total / static_cast<double>(vocabulary);
  return static_cast<float>(std::log(mass) - (1.0 - smoothing) * (picked - highest) - smoothing * mean);
}

// logits (n, V) float32, contiguous, overwritten; ids (n,) int64 in [0, V); bias (V,). Returns the losses (n,) float32.
Tensor softmax_rows(Tensor logits, std::optional<Tensor> bias, Tensor ids, double smoothing) {
  const int64_t count = logits.size(0), vocabulary = logits.size(1);
  Tensor losses = empty_like(logits, {count}, ScalarType::Float);
  float* x = static_cast<float*>(logits.data_ptr());
  float* loss = static_cast<float*>(losses.data_ptr());
  const float* shift = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  const int64_t* id = static_cast<const int64_t*>(ids.data_ptr());
  parallel_rows(count, vocabulary, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      loss[i] = softmax_row(x + i * vocabulary, shift, id[i], vocabulary, smoothing);
  });
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pite_kernels_cpu, m) {
  m.def("softmax_rows(Tensor(a!) logits, Tensor? bias, Tensor ids, float smoothing) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pite_kernels_cpu, CPU, m) { m.impl("softmax_rows", TORCH_BOX(&softmax_rows)); }
