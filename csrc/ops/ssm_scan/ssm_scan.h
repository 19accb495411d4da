// ssm_scan: the Mamba-2 recurrence (host/ssm.h) over packed sequences of any length.
#pragma once
#include "host/isa.h"
#include "host/ssm.h"

namespace ei {

EI_CPU_KERNEL(ssm_scan, SsmArgs)

}  // namespace ei
