#include "host/ssm.h"

#include "host/segments.h"
#include "host/widths.h"

namespace ei {

void check_ssm(const char* op, SsmArgs& a, bool has_segments, bool live) {
  Checker check(op);
  check(a.state, "state").dtype({DType::f32, DType::f16}).shape({"slots", "H", "P", "N"});
  check_pool(check, a.state, "state");
  const int64_t H = check["H"], P = check["P"], N = check["N"];
  check.range(P % 16, "P modulo 16", 0, 0);
  check.range(N % 16, "N modulo 16", 0, 0);
  check.range(N, "N", 16, 256);
  check(a.x, "x").dtype({DType::f32, DType::bf16}).shape({"T", H * P}).rows_dense();
  check(a.B, "B").dtype({a.x.dtype}).shape({"T", "G*N"}).rows_dense();
  check(a.C, "C").dtype({a.x.dtype}).shape({"T", "G*N"}).rows_dense();
  const int64_t groups = check["G*N"] / N;
  if (check["G*N"] % N != 0 || groups < 1 || H % groups != 0)
    check.fail("B",
               "have groups * " + std::to_string(N) + " columns, where groups divides " +
                   std::to_string(H) + " heads",
               a.B.describe());
  a.groups = static_cast<int>(groups);
  check(a.dt, "dt").dtype({DType::f32, a.x.dtype}).shape({"T", "H"}).rows_dense();
  check(a.A_log, "A_log").dtype({DType::f32}).shape({"H"}).contiguous();
  check(a.D, "D").dtype({DType::f32}).shape({"H"}).contiguous();
  check(a.dt_bias, "dt_bias").dtype({DType::f32}).shape({"H"}).contiguous();
  check(a.y, "y").dtype({a.x.dtype}).shape({"T", H * P}).rows_dense();
  if (!has_segments) check.bind("S", check["T"]);
  check_slots(check, a.slots, check["slots"], live);
  if (has_segments) check_segments(check, a.cu_seqlens, live);
  if (a.context || a.stochastic()) {
    check(a.context, "context").dtype({DType::i32}).shape({"S"}).contiguous();
    for (int64_t s = 0; live && !a.context.cuda && s < check["S"]; ++s)
      if (a.context.ptr<int32_t>()[s] < 0)
        check.fail(
            "context", "be at least 0",
            std::to_string(a.context.ptr<int32_t>()[s]) + " at sequence " + std::to_string(s));
  }
  check.range(a.seed, "seed", 0, (1ll << 31) - 1);
  WidthCheck widths(check, a.seq_width, live, "seq_width", "S");
  widths.sizes(a.h_sizes, "h_sizes", H, groups);
}

}  // namespace ei
