// Argument checks with one grammar of error:
//   <op>: <argument> must <requirement>, got <what was given>
// Dimension letters are bound at their first tensor and demanded of every later one:
//   Checker check("rms_norm");
//   int64_t R, D;
//   check(x, "x").dtype({DType::f32, DType::bf16}).shape({"R", "D"}).rows_dense();
#pragma once
#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "host/tensor.h"

namespace ei {

[[noreturn]] inline void refuse(const std::string& op, const std::string& argument,
                                const std::string& requirement, const std::string& got) {
  throw std::invalid_argument(op + ": " + argument + " must " + requirement + ", got " + got);
}

// One dimension of an expected shape: a letter, or a fixed size.
struct Dim {
  std::string letter;
  int64_t size = -1;
  Dim(const char* l) : letter(l) {}  // NOLINT: implicit on purpose
  Dim(int64_t s) : size(s) {}        // NOLINT
  Dim(int s) : size(s) {}            // NOLINT
};

class Checker {
 public:
  explicit Checker(std::string op) : op_(std::move(op)) {}

  class One {
   public:
    One(Checker& c, const Tensor& t, const char* name) : c_(c), t_(t), name_(name) {}
    // Data type is one of `allowed`.
    One& dtype(std::initializer_list<DType> allowed);
    // Shape equals `dims`; letters bind or must agree.
    One& shape(std::initializer_list<Dim> dims);
    // Last dimension dense (stride 1) and counted by an int, other strides free.
    One& rows_dense();
    // Dense row-major, or without elements.
    One& contiguous();
    // No byte of it is one of the tensors' (those that are given).
    One& apart(std::initializer_list<std::pair<const char*, const Tensor*>> others);
    One& require(bool ok, const std::string& requirement);

   private:
    Checker& c_;
    const Tensor& t_;
    const char* name_;
  };

  // A required tensor; refuses None and a device other than the first tensor's.
  One operator()(const Tensor& t, const char* name);
  // The size bound to a letter.
  int64_t operator[](const char* letter) const { return sizes_.at(letter); }
  // Gives a letter a size by hand, which must be one.
  void bind(const char* letter, int64_t size) {
    if (size < 0) fail(letter, "be at least 0", std::to_string(size));
    sizes_[letter] = size;
  }
  // A scalar in [low, high].
  void range(int64_t value, const char* name, int64_t low, int64_t high);
  [[noreturn]] void fail(const std::string& argument, const std::string& requirement,
                         const std::string& got) const {
    refuse(op_, argument, requirement, got);
  }
  const std::string& op() const { return op_; }
  bool cuda() const { return cuda_; }

 private:
  friend class One;
  std::string op_;
  std::map<std::string, int64_t> sizes_;
  bool any_ = false, cuda_ = false;
  int device_id_ = 0;
};

}  // namespace ei
