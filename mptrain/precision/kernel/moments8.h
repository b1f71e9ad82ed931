// Moments of 8 bits.
#pragma once
#include "rules.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int CODED = 64;  // elements that share an exponent
constexpr int DROPPED1 = 19, DROPPED2 = 18;  // lower bits of an fp32 number that have no code
constexpr int REACH = 7;   // exponents below that of the block that have codes
constexpr int GRADUAL = 16;
constexpr uint32_t SIGN = 0x80000000, BINADE = 1 << 23;
constexpr uint32_t ALONG = 0xc13fa9a9;  // how far the threshold of rounding is from an element to the next

// Two vectors at a time, as 16-bit halves of their 32-bit lanes: codes are decoded and rounded there. `lower` and
// `upper` give the 32-bit lanes of words a (low half) and b (high half) in the order in which every architecture
// unpacks, that is within 128 bits: elements 0 to 3, 8 to 11, ... and 4 to 7, 12 to 15, ...; `evens` and `odds` undo it.
typedef int16_t Words __attribute__((vector_size(4 * W)));

template <size_t from, size_t... I> Pair unpacked(Pair a, Pair b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 8 * 8 + from + I % 8 / 2 + I % 2 * 2 * W)...);
}
Bits lower(Pair a, Pair b) { return (Bits)unpacked<0>(a, b, LANES); }
Bits upper(Pair a, Pair b) { return (Bits)unpacked<4>(a, b, LANES); }

// The even words of each 128 bits, then the odd ones.
template <size_t... I> Pair parted(Bits x, std::index_sequence<I...>) {
  return __builtin_shufflevector((Pair)x, (Pair)x, (I / 8 * 8 + I % 4 * 2 + I % 8 / 4)...);
}
template <size_t from, size_t... I> Pair joined(Pair a, Pair b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 8 * 8 + from + I % 4 + I % 8 / 4 * 2 * W)...);
}
Pair evens(Bits a, Bits b) { return joined<0>(parted(a, LANES), parted(b, LANES), LANES); }
Pair odds(Bits a, Bits b) { return joined<4>(parted(a, LANES), parted(b, LANES), LANES); }

template <size_t from, size_t... I> Vec reordered(Vec a, Vec b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 8 + from + I % 4)...);
}

// Gradients of two vectors, in that order.
template <class G> void gradients(const typename G::Store* p, Vec& a, Vec& b) {
  if constexpr (std::is_same_v<G, F32>) {
    const Vec x = read<Vec>(p), y = read<Vec>(p + W);
    a = reordered<0>(x, y, std::make_index_sequence<W>{});
    b = reordered<4>(x, y, std::make_index_sequence<W>{});
  } else {
    const Pair x = read<Pair>(p);
    a = (Vec)lower(Pair{}, x);
    b = (Vec)upper(Pair{}, x);
  }
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

Words widen(const int8_t* p) { return (Words)_mm512_cvtepi8_epi16(read<__m256i>(p)); }
Pair widen(const uint8_t* p) { return (Pair)_mm512_cvtepu8_epi16(read<__m256i>(p)); }
template <class P> void narrow(void* p, P x) { write(p, _mm512_cvtepi16_epi8((__m512i)x)); }
Pair packed(Bits a, Bits b) { return (Pair)_mm512_packus_epi32((__m512i)a, (__m512i)b); }
Words signed_as(Words x, Vec a, Vec b) {
  const Words minus = (Words)_mm512_packs_epi32((__m512i)a, (__m512i)b) >> 15;
  return (x ^ minus) - minus;
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

Words widen(const int8_t* p) { return (Words)_mm256_cvtepi8_epi16(read<__m128i>(p)); }
Pair widen(const uint8_t* p) { return (Pair)_mm256_cvtepu8_epi16(read<__m128i>(p)); }
void narrow(void* p, Words x) {
  write(p, _mm_packs_epi16(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)));
}
void narrow(void* p, Pair x) {
  write(p, _mm_packus_epi16(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)));
}
Pair packed(Bits a, Bits b) { return (Pair)_mm256_packus_epi32((__m256i)a, (__m256i)b); }
Words signed_as(Words x, Vec a, Vec b) {
  return (Words)_mm256_sign_epi16((__m256i)x, _mm256_packs_epi32((__m256i)a, (__m256i)b));
}

#else

template <class C> Words each(const C* p) {
  Words x;
  for (int j = 0; j < 2 * W; j++) x[j] = p[j];
  return x;
}
Words widen(const int8_t* p) { return each(p); }
Pair widen(const uint8_t* p) { return (Pair)each(p); }
template <class P> void narrow(void* p, P x) {
  for (int j = 0; j < 2 * W; j++) static_cast<uint8_t*>(p)[j] = static_cast<uint8_t>(x[j]);
}
Pair packed(Bits a, Bits b) { return evens(a, b); }  // of numbers below 2^16
Words signed_as(Words x, Vec a, Vec b) {  // with the signs of a and b
  const Words minus = (Words)odds((Bits)a, (Bits)b) >> 15;
  return (x ^ minus) - minus;
}

#endif

Bits same(uint32_t x) { return x - Bits{}; }
Pair words(uint32_t x) { return static_cast<uint16_t>(x) - Pair{}; }

template <class V> V larger(V a, V b) { return a > b ? a : b; }
template <class V> V smaller(V a, V b) { return a < b ? a : b; }

template <int lanes, size_t... I> Bits halves(Bits x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, ((I + lanes / 2) % W)...);
}

template <int lanes = W> uint32_t largest(Bits x) {
  if constexpr (lanes == 1) return x[0];
  else return largest<lanes / 2>(larger(x, halves<lanes>(x, std::make_index_sequence<W>{})));
}

// A block between its step and its rounding.
struct Pending {
  Vec m[CODED / W];
  Bits s[CODED / W], threshold;  // s: its bits and the threshold of its code; threshold: of m
  int8_t* first = nullptr;
  uint8_t* second;
  uint32_t first_exponent, second_exponent;
};

// What a step with codes costs is its instructions: in AVX2 93 for eight parameters, or 4.9 cycles a parameter on a Zen 3
// whose cores are all busy, and one pass over the 14 bytes 1.5. Of the cycles rounding takes 1.1, root and division 0.7,
// the codes of m 0.5, what is largest in a block 0.5 (found by leaving them out).

// The step of one block. threshold: of m for its first elements, those of a first vector of a pair; apart: how much
// larger that of sqrt(v) is.
template <class G>
__attribute__((noinline)) void step_block(const Adam& rule, const typename G::Store* grad, uint16_t* high, int16_t* low,
                                          int8_t* first, uint8_t* second, uint8_t& first_exponent,
                                          uint8_t& second_exponent, Bits threshold, uint32_t apart, Pending& out) {
  const Words base1 = (Words)words((first_exponent - REACH) << 7), lifted1 = base1 + 0x80;
  const Pair base2 = words((second_exponent - REACH) << 7);
  out.threshold = threshold;
  Bits top1 = {}, top2 = {};
  for (int j = 0; j < CODED / W; j += 2) {
    const int i = j * W;
    const Words code1 = widen(first + i), size1 = larger(code1, (Words)-code1), sign = code1 & int16_t(-0x8000);
    const Words gradual = Words{} + GRADUAL > size1;
    const Pair upper1 = (Pair)(((size1 << (DROPPED1 - 16)) + (gradual ? lifted1 : base1)) | sign);
    const Pair normal = (Pair)((gradual & lifted1) | sign);
    const Pair code2 = widen(second + i);
    const Pair upper2 = ((code2 << (DROPPED2 - 16)) + base2) & ~(Pair)(code2 == 0);
    const Words below = read<Words>(low + i);
    const Pair above = read<Pair>(high + i) + (Pair)(below >> 15);
    const auto step = [&](int k, Vec p, Vec g, Vec m, Vec s) {
      const Vec stepped = rule.step(p, g, m, s);
      const Bits at = threshold + k * 4 * ALONG;
      top1 = larger(top1, ((Bits)m & ~SIGN) + (at >> (32 - DROPPED1)));
      const Bits root = (Bits)s + ((at + apart) >> (32 - DROPPED2));  // of 0: below the first code
      top2 = larger(top2, root);
      out.m[j + k] = m;
      out.s[j + k] = root;
      return (Bits)(stepped == stepped ? stepped : (Vec)same(0x7fc00000));  // a NaN payload must not carry into the sign
    };
    Vec g0, g1;
    gradients<G>(grad + i, g0, g1);
    const Bits p0 = step(0, (Vec)lower((Pair)below, above), g0, (Vec)lower(Pair{}, upper1) - (Vec)lower(Pair{}, normal),
                         (Vec)lower(Pair{}, upper2));
    const Bits p1 = step(1, (Vec)upper((Pair)below, above), g1, (Vec)upper(Pair{}, upper1) - (Vec)upper(Pair{}, normal),
                         (Vec)upper(Pair{}, upper2));
    const Pair rest = evens(p0, p1);
    write(high + i, odds(p0, p1) + (rest >> 15));
    write(low + i, rest);
    threshold += 2 * W * ALONG;
  }
  out.first = first, out.second = second;
  out.first_exponent = first_exponent = std::max<uint32_t>(largest(top1) >> 23, REACH + 1);
  out.second_exponent = second_exponent = largest(top2) >> 23;
}

// The codes of a block.
__attribute__((noinline)) void round_block(const Pending& block) {
  const Bits normal = same((block.first_exponent - REACH + 1) * BINADE);
  const Words low1 = (Words)words((block.first_exponent - REACH) << (23 - DROPPED1));
  const Words low2 = (Words)words((block.second_exponent - REACH) << (23 - DROPPED2));
  Bits threshold = block.threshold;
  for (int j = 0; j < CODED / W; j += 2) {
    // Of numbers below `normal` half the sum is the larger, of the others not; so that both count from low1.
    const auto rounded = [&](int k) {
      const Bits size = (Bits)block.m[j + k] & ~SIGN, shifted = (Bits)((Vec)size + (Vec)normal) - BINADE;
      return ((Bits)larger((Signed)size, (Signed)shifted) + ((threshold + k * 4 * ALONG) >> (32 - DROPPED1))) >> DROPPED1;
    };
    narrow(block.first + j * W, signed_as((Words)packed(rounded(0), rounded(1)) - low1, block.m[j], block.m[j + 1]));
    const Words root = (Words)packed(block.s[j] >> DROPPED2, block.s[j + 1] >> DROPPED2);
    narrow(block.second + j * W, (Pair)smaller(larger((Words)(root - low2), Words{} + 1), root));  // a root of 0: 0
    threshold += 2 * W * ALONG;
  }
}

// turns: of the thresholds of m and sqrt(v), this step's. Every parameter begins with a block, and blocks are whole in all buffers.
template <class G>
void update_coded(const Segment* segments, int64_t count, const Buffers& b, const Codes& c, const double* k,
                  uint32_t turn1, uint32_t turn2, int threads) {
  parallel(threads, [=](int t) {
    const Adam rule(k);
    Bits lane;
    for (int j = 0; j < W; j++) lane[j] = (j / 4 * 8 + j % 4) * ALONG;
    Pending pending[2];
    int turns = 0;
    share<CODED>(segments, count, t, threads, [&](const Segment& s, int64_t begin, int64_t end) {
      const auto* grad = static_cast<const typename G::Store*>(s.grad) - s.offset;
      const int64_t stop = s.offset + end;
      for (int64_t i = s.offset + begin; i < stop; i += CODED) {
        typename G::Store rest[CODED];
        const auto* g = grad + i;
        if (i + CODED > stop) {  // a gradient ends where its parameter does
          std::memset(rest, 0, sizeof rest);
          std::memcpy(rest, g, (stop - i) * sizeof *g);
          g = rest;
        }
        // Between a block's step and its rounding is the next one's step, so that nothing waits for its largest.
        step_block<G>(rule, g, static_cast<uint16_t*>(b.half) + i, b.low + i, c.first + i, c.second + i,
                      c.first_exponents[i / CODED], c.second_exponents[i / CODED],
                      lane + turn1 + static_cast<uint32_t>(i) * ALONG, turn2 - turn1, pending[turns % 2]);
        if (turns++) round_block(pending[turns % 2]);
      }
    });
    if (turns) round_block(pending[(turns - 1) % 2]);
  });
}

}  // namespace
