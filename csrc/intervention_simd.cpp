// The intervention program for one instruction set; compiled once for each (CMakeLists.txt sets
// DR_ISA).
#include "intervention_subspace_simd.h"

namespace dreamreader::DR_ISA {

extern const InterventionKernels intervention;
const InterventionKernels intervention = {
    {{run_rows<f16>}, {run_rows<bf16>}, {run_rows<float>}, {run_rows<double>}},
    {{run_columns<f16>}, {run_columns<bf16>}, {run_columns<float>}, {run_columns<double>}},
    {{run_planes<f16>}, {run_planes<bf16>}, {run_planes<float>}, {run_planes<double>}},
    {{run_subspace<f16>}, {run_subspace<bf16>}, {run_subspace<float>}, {run_subspace<double>}},
    {subspace_bytes<float>, subspace_bytes<double>},
    {prepare_subspace<float>, prepare_subspace<double>},
};

}  // namespace dreamreader::DR_ISA
