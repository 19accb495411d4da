// ssm_step: the Mamba-2 recurrence (host/ssm.h) for one token of each sequence (T = S).
#pragma once
#include "host/isa.h"
#include "host/ssm.h"

namespace ei {

EI_CPU_KERNEL(ssm_step, SsmArgs)

}  // namespace ei
