// Vectors of the widest registers, and numbers as they are stored.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

namespace {

typedef float Vec __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef int32_t Signed __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));
typedef int16_t Low __attribute__((vector_size(2 * W)));
typedef uint16_t Pair __attribute__((vector_size(4 * W)));
constexpr auto LANES = std::make_index_sequence<2 * W>{};

struct F32 { using Store = float; };
struct F16 { using Store = uint16_t; };
struct BF16 { using Store = uint16_t; };

template <class V> V read(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class V> void write(void* p, V x) { std::memcpy(p, &x, sizeof x); }

Vec all(double x) { return static_cast<float>(x) - Vec{}; }

Vec root(Vec x) {
  for (int j = 0; j < W; j++) x[j] = std::sqrt(x[j]);
  return x;
}

// -- conversions

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

Vec widen(Half x, F16) { return (Vec)_mm512_cvtph_ps((__m256i)x); }
Half narrow(Vec x, F16) { return (Half)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

Vec widen(Half x, F16) { return (Vec)_mm256_cvtph_ps((__m128i)x); }
Half narrow(Vec x, F16) { return (Half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }

#elif defined(__aarch64__)

typedef __fp16 Fp16 __attribute__((vector_size(2 * W)));
Vec widen(Half x, F16) { return __builtin_convertvector((Fp16)x, Vec); }
Half narrow(Vec x, F16) { return (Half)__builtin_convertvector(x, Fp16); }

#else  // in integers: scale by a power of two so that subnormals and overflow need no branch

float from_bits(uint32_t u) { return read<float>(&u); }

Vec widen(Half x, F16) {
  Vec r;
  for (int j = 0; j < W; j++) {
    const uint32_t u = x[j];
    float f = from_bits((u & 0x7fff) << 13) * 0x1p112f;
    if ((u & 0x7c00) == 0x7c00) f = from_bits(0x7f800000 | (u & 0x3ff) << 13);
    r[j] = u & 0x8000 ? -f : f;
  }
  return r;
}

Half narrow(Vec x, F16) {
  Half r;
  for (int j = 0; j < W; j++) {
    const float f = x[j];
    const uint32_t u = read<uint32_t>(&f);
    const uint32_t size = u & 0x7fffffff;
    uint32_t h;
    if (size > 0x7f800000) h = 0x7e00;                  // NaN
    else if (size >= 0x477ff000) h = 0x7c00;            // rounds above 65504
    else if (size < 0x38800000) {                       // below 2^-14 a float addition does the rounding
      const float shifted = from_bits(size) + 0.5f;
      h = read<uint32_t>(&shifted) - 0x3f000000;
    } else h = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    r[j] = static_cast<uint16_t>(h | (u >> 16 & 0x8000));
  }
  return r;
}

#endif

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
// GCC takes five instructions for what is one.
Bits wide(Half x) { return (Bits)_mm256_cvtepu16_epi32((__m128i)x); }
Bits wide(Low x) { return (Bits)_mm256_cvtepi16_epi32((__m128i)x); }
#else
Bits wide(Half x) { return __builtin_convertvector(x, Bits); }
Bits wide(Low x) { return (Bits)__builtin_convertvector(x, Signed); }
#endif

Vec widen(Half x, BF16) { return (Vec)(wide(x) << 16); }

Half narrow(Vec x, BF16) {
  const Bits u = (Bits)x;
  const Bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Bits nan = (Bits)(x != x);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), Half);
}

Vec join(Half high, Low low) {
  return (Vec)((wide(high) << 16) + wide(low));
}

void split(Vec x, Half& high, Low& low) {
  const Bits nan = (Bits)(x != x);
  const Bits u = ((Bits)x & ~nan) | (0x7fc00000 & nan);  // a NaN payload must not carry into the sign
  high = __builtin_convertvector((u + 0x8000) >> 16, Half);
  low = (Low)__builtin_convertvector(u & 0xffff, Half);
}

template <class G> Vec gradient(const typename G::Store* p) {
  if constexpr (std::is_same_v<G, F32>) return read<Vec>(p);
  else return widen(read<Half>(p), G{});
}

}  // namespace
