// The native library's implementations. Their schemas are Python's: fusedres/native.py.
#include <torch/csrc/stable/library.h>

#include "cpu/conv.h"
#include "cpu/eval_chain.h"
#include "cpu/ops.h"
#include "cpu/wgrad.h"
#ifdef USE_CUDA
#include "cuda/ops.h"
#endif

STABLE_TORCH_LIBRARY_IMPL(fusedres_cpu, CPU, m) {
  using namespace fusedres::cpu;
  m.impl("channel_stats", TORCH_BOX(&channel_stats));
  m.impl("bn_finalize", TORCH_BOX(&bn_finalize));
  m.impl("scale_shift_add_relu", TORCH_BOX(&scale_shift_add_relu));
  m.impl("drelu_dbn", TORCH_BOX(&drelu_dbn));
  m.impl("drelu_dbn_", TORCH_BOX(&drelu_dbn_inplace));
  m.impl("drelu_dbn_by_output_", TORCH_BOX(&drelu_dbn_by_output_inplace));
  m.impl("dbn", TORCH_BOX(&dbn));
  m.impl("bn_relu_maxpool", TORCH_BOX(&bn_relu_maxpool));
  m.impl("bn_relu_maxpool_backward", TORCH_BOX(&bn_relu_maxpool_backward));
  m.impl("conv_pack", TORCH_BOX(&conv_pack));
  m.impl("conv_fprop", TORCH_BOX(&conv_fprop));
  m.impl("conv_dgrad", TORCH_BOX(&conv_dgrad));
  m.impl("eval_chain", TORCH_BOX(&eval_chain));
  m.impl("eval_program", TORCH_BOX(&eval_program));
  m.impl("eval_network", TORCH_BOX(&eval_network));
  m.impl("head_fprop", TORCH_BOX(&head_fprop));
  m.impl("conv_wgrad", TORCH_BOX(&conv_wgrad));
  m.impl("centered_wgrad", TORCH_BOX(&centered_wgrad));
  m.impl("input_moments", TORCH_BOX(&input_moments));
  m.impl("max_abs", TORCH_BOX(&max_abs));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fusedres_cuda, CUDA, m) {
  using namespace fusedres::cuda;
  m.impl("bottleneck_fprop", TORCH_BOX(&bottleneck_fprop));
  m.impl("basic_block_fprop", TORCH_BOX(&basic_block_fprop));
  m.impl("stem_fprop", TORCH_BOX(&stem_fprop));
  m.impl("head_fprop", TORCH_BOX(&head_fprop));
  m.impl("scale_shift_add_relu", TORCH_BOX(&scale_shift_add_relu));
  m.impl("drelu_dbn", TORCH_BOX(&drelu_dbn));
  m.impl("dbn", TORCH_BOX(&dbn));
  m.impl("channel_stats", TORCH_BOX(&channel_stats));
  m.impl("bn_finalize", TORCH_BOX(&bn_finalize));
}

STABLE_TORCH_LIBRARY_IMPL(fusedres_cuda, CompositeExplicitAutograd, m) {
  using namespace fusedres::cuda;
  m.impl("bottleneck_shared_bytes", TORCH_BOX(&bottleneck_shared_bytes));
  m.impl("basic_block_shared_bytes", TORCH_BOX(&basic_block_shared_bytes));
}
#endif
