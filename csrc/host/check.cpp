#include "host/check.h"

#include <sstream>

#include "host/device.h"

namespace ei {
namespace {

// Addresses from the first to the one after the last element; equal ones without elements.
std::pair<uintptr_t, uintptr_t> memory_of(const Tensor& t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.data);
  if (!t.given || t.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.stride[i];
  return {begin, begin + (last + 1) * dtype_size(t.dtype)};
}

}  // namespace

Checker::One Checker::operator()(const Tensor& t, const char* name) {
  if (!t.given) refuse(op_, name, "be a tensor", "None");
  if (!any_) {
    any_ = true;
    cuda_ = t.cuda;
    device_id_ = t.device_id;
    if (cuda_ && !device::built())
      refuse(op_, name, "be on the CPU (this build has no CUDA kernels)", t.describe());
  } else if (t.cuda != cuda_ || t.device_id != device_id_) {
    refuse(op_, name, "be on the same device as the first tensor", t.describe());
  }
  return One(*this, t, name);
}

void Checker::range(int64_t value, const char* name, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(op_, name, "be in [" + std::to_string(low) + ", " + std::to_string(high) + "]",
           std::to_string(value));
}

Checker::One& Checker::One::dtype(std::initializer_list<DType> allowed) {
  std::string names;
  for (DType d : allowed) {
    if (d == t_.dtype) return *this;
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(d));
  }
  refuse(c_.op_, name_, "be " + names, t_.describe());
}

Checker::One& Checker::One::shape(std::initializer_list<Dim> dims) {
  bool ok = static_cast<size_t>(t_.ndim) == dims.size();
  std::ostringstream want;
  int i = 0;
  for (const Dim& d : dims) {
    int64_t size = d.size;
    bool known = d.letter.empty();
    if (!known) {
      auto found = c_.sizes_.find(d.letter);
      known = found != c_.sizes_.end();
      if (known) size = found->second;
    }
    want << (i ? ", " : "") << d.letter;
    if (known) want << (d.letter.empty() ? "" : "=") << size;
    if (ok && known && t_.shape[i] != size) ok = false;
    ++i;
  }
  if (!ok) refuse(c_.op_, name_, "have shape [" + want.str() + "]", t_.describe());
  i = 0;
  for (const Dim& d : dims) {
    if (!d.letter.empty()) c_.sizes_.emplace(d.letter, t_.shape[i]);
    ++i;
  }
  return *this;
}

Checker::One& Checker::One::rows_dense() {
  const bool ok = t_.ndim == 0 || t_.shape[t_.ndim - 1] <= 1 || t_.stride[t_.ndim - 1] == 1;
  if (!ok)
    refuse(c_.op_, name_, "have a dense last dimension (stride 1)",
           "stride " + std::to_string(t_.stride[t_.ndim - 1]) + " in " + t_.describe());
  if (t_.ndim > 0 && t_.shape[t_.ndim - 1] > INT32_MAX)
    refuse(c_.op_, name_, "have at most 2147483647 columns", t_.describe());
  return *this;
}

Checker::One& Checker::One::contiguous() {
  if (t_.numel() == 0) return *this;
  int64_t dense = 1;
  for (int i = t_.ndim - 1; i >= 0; --i) {
    if (t_.shape[i] > 1 && t_.stride[i] != dense)
      refuse(c_.op_, name_, "be contiguous",
             "stride " + std::to_string(t_.stride[i]) + " in dimension " + std::to_string(i) +
                 " of " + t_.describe());
    dense *= t_.shape[i];
  }
  return *this;
}

Checker::One& Checker::One::apart(
    std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  const auto [begin, end] = memory_of(t_);
  for (const auto& [name, other] : others) {
    const auto [first, last] = memory_of(*other);
    if (first < end && begin < last)
      refuse(c_.op_, name_, std::string("not share memory with ") + name, t_.describe());
  }
  return *this;
}

Checker::One& Checker::One::require(bool ok, const std::string& requirement) {
  if (!ok) refuse(c_.op_, name_, requirement, t_.describe());
  return *this;
}

}  // namespace ei
