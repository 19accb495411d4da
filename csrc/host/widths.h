// The width arguments that most ops share: row_width [R] i32 picks, for each row, one of W widths
// (seq_width [S] i32, for each sequence); `sizes` [W] i32 (or [W, S]) tells the active size at
// each.
#pragma once
#include "host/check.h"

namespace ei {

// Checks shapes and dtypes of a width table. Where the values can be read and the call is not being
// recorded (a recorded step's owner validates what it fills in), checks these too: each row_width
// in [0, W), each size in [0, largest] and a multiple of `grain`.
class WidthCheck {
 public:
  // `live`: values are final and may be looked at. `name` and `letter`: what picks widths, per
  // what.
  WidthCheck(Checker& check, const Tensor& row_width, bool live, const char* name = "row_width",
             const char* letter = "R")
      : check_(check), rows_(row_width), live_(live && !row_width.cuda), name_(name) {
    if (row_width) check(row_width, name).dtype({DType::i32}).shape({letter}).contiguous();
  }

  void sizes(const Tensor& table, const char* name, int64_t largest, int64_t grain) {
    begin(table, name);
    if (!rows_) return;
    check_(table, name).dtype({DType::i32}).shape({"W"}).contiguous();
    if (live_) values(table, name, &largest, 1, grain);
  }

  void sizes(const Tensor& table, const char* name, const int64_t* largest, int segments,
             int64_t grain) {
    begin(table, name);
    if (!rows_) return;
    check_(table, name).dtype({DType::i32}).shape({"W", segments}).contiguous();
    if (live_) values(table, name, largest, segments, grain);
  }

 private:
  void begin(const Tensor& table, const char* name) {
    if (table.given != rows_.given)
      check_.fail(name, std::string(rows_ ? "be given with " : "be absent without ") + name_,
                  table.describe());
  }

  void values(const Tensor& table, const char* name, const int64_t* largest, int segments,
              int64_t grain) {
    const auto* v = table.ptr<int32_t>();
    for (int64_t i = 0; i < table.numel(); ++i) {
      const int64_t top = largest[i % segments];
      if (v[i] < 0 || v[i] > top || (v[i] % grain != 0 && v[i] != top))
        check_.fail(name,
                    "hold sizes in [0, " + std::to_string(top) + "] that are multiples of " +
                        std::to_string(grain),
                    std::to_string(v[i]));
    }
    const auto* r = rows_.ptr<int32_t>();
    for (int64_t i = 0; i < rows_.shape[0]; ++i)
      if (r[i] < 0 || r[i] >= table.shape[0])
        check_.fail(name_, "hold indices in [0, " + std::to_string(table.shape[0]) + ")",
                    std::to_string(r[i]) + " at row " + std::to_string(i));
  }

  Checker& check_;
  const Tensor& rows_;
  bool live_;
  const char* name_;
};

}  // namespace ei
