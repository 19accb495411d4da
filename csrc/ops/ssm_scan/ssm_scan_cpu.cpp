// Computes: ssm_scan (ssm_scan.h), with the recurrence itself rather than its chunked form: for the
//   model's sizes it is fewer operations on a CPU, and how a sequence is cut cannot change a bit.
// Layout: state [P][N] per head; rows of it stay in the first-level cache while tokens pass.
// Work split: parts are (sequence, head).
// Order: tokens ascending; y sums lanes over N ascending, then pairwise.
// Limits: P and N are multiples of 16, N at most 256.
// Speed: see the op table in the README (bench/ops.py).
#include "ssm_scan.h"

#include "cpu/ssm_core.h"

namespace ei::EI_ISA {

void ssm_scan(const SsmArgs& a, Pool& pool) { ssm_run("ssm_scan", a, pool); }

}  // namespace ei::EI_ISA
