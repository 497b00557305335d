// bsfa._C: what is not a tensor operator. Importing it also registers the CPU operators (csrc/torch/cpu_ops.cpp).
// The pybind11 that some torch versions bundle refuses this macro; nothing here uses torch.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#include <string>

#include "bsfa/cpu.h"
#include "prepared.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = BSFA_VERSION;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
  info["torch_target"] = BSFA_TORCH_TARGET;
  info["cpu_instruction_set"] = bsfa::cpu::instruction_set();
  return info;
}

// One row per compiled CPU kernel; the CUDA library reports its own (operator bsfa::cuda_kernels).
py::list kernels() {
  py::list rows;
  for (const char* op : {"pool_blocks", "score_blocks", "select_blocks", "probe_attention", "pattern_mask",
                         "token_mask", "attention", "skip_attention", "skip_mask", "block_mass", "tile_max"}) {
    py::dict row;
    row["op"] = op;
    row["device"] = "cpu";
    row["arch"] = bsfa::cpu::instruction_set();
    row["dtypes"] = "float32, bfloat16, float16";
    row["head_dim"] = "1..256";
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of bsfa's compiled library";
  m.def("build_info", &build_info, "Version, compiler, torch ABI target and CPU instruction set in use.");
  m.def("kernels", &kernels, "The compiled CPU kernels: op, device, arch, dtypes, head_dim.");
  if (!bsfa::add_prepared(m.ptr())) throw py::error_already_set();
}
