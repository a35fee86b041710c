// The intervention program for one instruction set; compiled once for each (CMakeLists.txt sets
// DR_ISA).
#include "intervention_subspace_simd.h"

namespace dreamreader::DR_ISA {

extern const InterventionKernels intervention;
const InterventionKernels intervention = {
    DR_BY_TYPE(run_dense),
    DR_BY_TYPE(run_columns),
    DR_BY_TYPE(run_planes),
    DR_BY_TYPE(run_subspace),
    {subspace_bytes<float>, subspace_bytes<double>},
    {prepare_subspace<float>, prepare_subspace<double>},
};

}  // namespace dreamreader::DR_ISA
