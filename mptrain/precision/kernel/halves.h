// Half weights of all masters.
#pragma once
#include "threads.h"
#include "vectors.h"

namespace {

template <size_t... I> Pair joined(Half a, Half b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, I...);
}

template <size_t... I> Pair odd(Pair a, Pair b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}

Pair narrow(Vec a, Vec b, F16) { return joined(narrow(a, F16{}), narrow(b, F16{}), LANES); }

Pair rounded(Vec x) {  // to bfloat16, in the upper half of each lane
  const Bits u = (Bits)x;
  const Bits nan = (Bits)(x != x);
  return (Pair)(((u + 0x7fff + ((u >> 16) & 1)) & ~nan) | (0x7fc00000 & nan));
}

Pair narrow(Vec a, Vec b, BF16) { return odd(rounded(a), rounded(b), LANES); }

// Half weights of more than this many would push everything else out of the cache: they go to memory directly,
// which saves reading the lines that are overwritten.
constexpr int64_t STREAMED = int64_t{1} << 23;
constexpr int64_t AHEAD = 512;  // elements; the hardware's prefetching does not keep up with a loop this short

void stream(uint16_t* p, Pair x) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x);
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#else
  write(p, x);
#endif
}

// numel: a multiple of 16, as that of all buffers is
template <class H> void narrow_all(const float* master, uint16_t* half, int64_t numel, int threads) {
  const bool streamed = numel >= STREAMED && reinterpret_cast<uintptr_t>(half) % sizeof(Pair) == 0;
  const int64_t pairs = numel / (2 * W);
  parallel(threads, [=](int t) {
    const int64_t to = pairs * (t + 1) / threads * 2 * W;
    for (int64_t i = pairs * t / threads * 2 * W; i < to; i += 2 * W) {
      __builtin_prefetch(master + i + AHEAD);
      __builtin_prefetch(master + i + AHEAD + W);
      const Pair narrowed = narrow(read<Vec>(master + i), read<Vec>(master + i + W), H{});
      if (streamed) stream(half + i, narrowed);
      else write(half + i, narrowed);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
  });
  for (int64_t i = pairs * 2 * W; i < numel; i += W) write(half + i, narrow(read<Vec>(master + i), H{}));
}

}  // namespace
