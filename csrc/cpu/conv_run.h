// Running a planned convolution, with all threads or with one.
#pragma once

#include "cpu/conv_checks.h"
#include "cpu/conv_operands.h"

namespace fusedres::cpu {

// The three channels of a picture are too few for a tap: there all taps of a filter row become one, which reads
// neighbouring pixels as if they were one pixel's channels. That needs a picture whose padded columns are really there.
bool merges_columns(const Conv& conv);

// For `workers` threads. Float64 or float32.
template <typename T>
ConvPlan gather_plan(const ConvSizes& sizes, Gather gather, int64_t workers, Weights weights);

template <typename T>
ConvPlan fprop_plan(const Conv& conv, int64_t workers, Weights weights);

// On all threads, each with a table of its own.
template <typename T>
void run(const ConvPlan& plan, const ConvOperands<T>& operands, std::vector<ConvTable<T>>& tables);

// On the calling thread.
template <typename T>
void run_alone(const ConvPlan& plan, const ConvOperands<T>& operands, ConvTable<T>& table);

}  // namespace fusedres::cpu
