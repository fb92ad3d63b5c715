// The per-channel formulas every kernel applies to what it loads. Included by a kernels header, per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// scale*x + shift. Forward and backward call this one function, so that a recomputed ReLU mask is the stored one.
template <typename V>
FUSEDRES_INLINE V bn_apply(V scale, V x, V shift) {
  return scale * x + shift;
}

// max(value, 0) that keeps NaN and -0, as torch.relu does.
template <typename V>
FUSEDRES_INLINE V relu(V value) {
  return value < V{} ? V{} : value;
}

// The gradient through a ReLU whose output (or input) is `activated`; NaN lets it pass, as in eager.
template <typename V>
FUSEDRES_INLINE V drelu(V gradient, V activated) {
  return activated <= V{} ? V{} : gradient;
}

// BN backward dz = a*g + b*(z - mean) + c for the channels at c; factors (4, channels): a, b, c, mean (factors.h).
// Where b is 0 the statistics are constants, and a NaN in z must not reach dz.
template <typename Lanes, typename Acc, typename V>
FUSEDRES_INLINE V dbn_apply(Lanes lanes, const Acc* factors, int64_t channels, int64_t c, V g, V z) {
  const V centred = z - lanes.load(factors + 3 * channels + c), b = lanes.load(factors + channels + c);
  const V along_z = b == V{} ? V{} : b * centred;
  return lanes.load(factors + c) * g + (along_z + lanes.load(factors + 2 * channels + c));
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
