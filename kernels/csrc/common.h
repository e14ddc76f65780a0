// Shared by both heads: one binary for all x86-64 machines, and loops over rows on PyTorch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// Compiles a function for several vector widths; the widest one that the machine supports is chosen when it is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORIZED
#endif

namespace pite {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 1 << 14;

inline Tensor empty_like(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class F>
void parallel_rows(int64_t count, int64_t width, const F& body) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kElementsPerThread / width), body);
}

}  // namespace pite
