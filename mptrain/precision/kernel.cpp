// One-pass optimizer steps over flat buffers, behind a C ABI; loaded with ctypes, no torch headers.
//
//   norm   the sum of squares of all gradients; a NaN or Inf in any of them makes it non-finite
//   adam   g = factor * grad + l2 * p                      (l2 = 0 for AdamW)
//          m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
//          p = decay * p - step_size * m / (root_bias * sqrt(v) + eps)
//   sgd    g = factor * grad + l2 * p;  b = momentum * b + keep * g
//          p -= lr * (from_grad * g + from_buffer * b)     (without momentum: p -= lr * g)
//
//   adam8  adam of split masters with m and sqrt(v) in 8 bits: codes in blocks that share an exponent, read,
//          updated and written a block at a time; what they mean and how they are rounded: moments8.py
//
//   narrow half = p
//
// and the half weight is p rounded to nearest even. With split masters there is no p in memory: its
// bits are those of the bfloat16 weight (rounded half up) plus a signed 16-bit remainder.
//
// A step reads each gradient twice (once for the norm) and every other value once. The result for one
// element depends neither on its neighbours nor on the number of threads: tails run through the same
// vector code, and the norm adds fixed chunks in a fixed order.
//
// Vectors are GCC/Clang vector extensions, so the same code builds for AVX-512, AVX2, NEON and plain
// SSE2; only the conversions of IEEE half and of bytes name instructions.
#include "kernel/weights.h"
#include "kernel/rules.h"
#include "kernel/steps.h"
#include "kernel/moments8.h"
#include "kernel/halves.h"
#include "kernel/norm.h"

namespace {

enum Type { FLOAT = 0, HALF = 1, BFLOAT = 2 };

// The weights' own gradients, or gradients that were accumulated in fp32.
template <class Rule>
void pick(const Segment* s, int64_t n, int grad, const Buffers* b, int weights, const double* k, int threads) {
  if (b->low) (grad == FLOAT ? update<Rule, Split, F32> : update<Rule, Split, BF16>)(s, n, *b, k, threads);
  else if (weights == HALF) (grad == FLOAT ? update<Rule, Mirrored<F16>, F32> : update<Rule, Mirrored<F16>, F16>)(s, n, *b, k, threads);
  else if (weights == BFLOAT) (grad == FLOAT ? update<Rule, Mirrored<BF16>, F32> : update<Rule, Mirrored<BF16>, BF16>)(s, n, *b, k, threads);
  else update<Rule, Plain, F32>(s, n, *b, k, threads);
}

}  // namespace

extern "C" {

// Whether this CPU has the instructions the file was built for.
int mptrain_runs_here() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

double mptrain_norm(const Segment* segments, int64_t count, int grad, int threads) {
  if (grad == HALF) return norm<F16>(segments, count, threads);
  if (grad == BFLOAT) return norm<BF16>(segments, count, threads);
  return norm<F32>(segments, count, threads);
}

// half: fp16 or bf16 by `weights`
void mptrain_narrow(const float* master, uint16_t* half, int64_t numel, int weights, int threads) {
  (weights == HALF ? narrow_all<F16> : narrow_all<BF16>)(master, half, numel, threads);
}

void mptrain_adam(const Segment* s, int64_t n, int grad, const Buffers* b, int weights, const double* k, int threads) {
  pick<Adam>(s, n, grad, b, weights, k, threads);
}

// half: bfloat16, with low
void mptrain_adam8(const Segment* s, int64_t n, int grad, const Buffers* b, const Codes* c, const double* k,
                   uint32_t turn1, uint32_t turn2, int threads) {
  (grad == FLOAT ? update_coded<F32> : update_coded<BF16>)(s, n, *b, *c, k, turn1, turn2, threads);
}

void mptrain_momentum(const Segment* s, int64_t n, int grad, const Buffers* b, int weights, const double* k, int threads) {
  pick<Momentum>(s, n, grad, b, weights, k, threads);
}

void mptrain_sgd(const Segment* s, int64_t n, int grad, const Buffers* b, int weights, const double* k, int threads) {
  pick<Sgd>(s, n, grad, b, weights, k, threads);
}

}  // extern "C"
