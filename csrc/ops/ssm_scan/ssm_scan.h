// ssm_scan: the Mamba-2 recurrence (core/ssm.h) over packed sequences of any length.
#pragma once
#include "../../core/isa.h"
#include "../../core/ssm.h"

namespace ei {

EI_CPU_KERNEL(ssm_scan, SsmArgs)

}  // namespace ei
