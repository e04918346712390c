// What the ops of csrc/cpu and csrc/cuda ask of tensors and make of them, on LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "activation.h"

// From torch 2.13 on an error carries torch's own words; older headers only name the call that failed.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace sinkattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  auto sizes = x.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

// The data of x, contiguous and of that type; `copies` keeps what had to be copied.
template <typename T>
const T* data_of(const Tensor& x, ScalarType type, std::vector<Tensor>& copies) {
  if (x.scalar_type() == type && x.is_contiguous()) return static_cast<const T*>(x.data_ptr());  // asking is cheaper
  copies.push_back(torch::stable::contiguous(torch::stable::to(x, type)));
  return static_cast<const T*>(copies.back().data_ptr());
}

// Type and index.
inline std::pair<int32_t, int32_t> device_of(const Tensor& x) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  return {type, x.get_device_index()};
}

// An op is given a number, as torch's stable headers keep the memory of every string that an op is given.
inline Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= int64_t(Activation::gelu), "sinkattn: unknown activation ", number);
  return Activation(number);
}

// What new_empty gives, of up to 5 dims, without the dispatcher, which takes longer than all else that an op does before
// its kernel. dtype: as aoti_torch_dtype_float32() and its like say.
inline Tensor empty(const Tensor& x, std::initializer_list<int64_t> shape, int32_t dtype) {
  std::array<int64_t, 5> strides;
  int64_t size = 1;
  for (int dim = int(shape.size()); dim-- > 0; size *= shape.begin()[dim]) strides[dim] = size;
  const auto [device, index] = device_of(x);
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.begin(), strides.data(), dtype,
                                                         device, index, &made));
  return Tensor(made);
}
inline Tensor empty_like(const Tensor& x, std::initializer_list<int64_t> shape) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty(x, shape, dtype);
}

}  // namespace sinkattn
