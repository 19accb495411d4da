// ssm_step: the Mamba-2 recurrence (core/ssm.h) for one token of each sequence (T = S).
#pragma once
#include "../../core/isa.h"
#include "../../core/ssm.h"

namespace ei {

EI_CPU_KERNEL(ssm_step, SsmArgs)

}  // namespace ei
