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
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>
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

extern "C" {

struct Segment {   // the gradient of one parameter
  const void* grad;
  int64_t offset;  // of the parameter in the flat buffers, in elements
  int64_t numel;
};

struct Buffers {   // flat, one value per element; null where a step has no use for it
  float* master;   // not with split masters
  void* half;      // the weights computed with; null where that is the master itself
  int16_t* low;    // only with split masters
  float* first;    // exp_avg, or the momentum buffer
  float* second;   // exp_avg_sq
};

struct Codes {     // moments of 8 bits
  int8_t* first;
  uint8_t* second;
  uint8_t* first_exponents;  // one value per CODED elements
  uint8_t* second_exponents;
};

}  // extern "C"

namespace {

typedef float Vec __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef int32_t Signed __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));
typedef int16_t Low __attribute__((vector_size(2 * W)));

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

// -- where the weights are: read(i) gives the master, write(i) updates it and the half weight

struct Plain {  // fp32 parameters: the master is the weight
  float* master;
  explicit Plain(const Buffers& b) : master(b.master) {}
  Vec read(int64_t i) const { return ::read<Vec>(master + i); }
  void write(int64_t i, Vec p) const { ::write(master + i, p); }
};

template <class H> struct Mirrored {
  float* master;
  uint16_t* half;
  explicit Mirrored(const Buffers& b) : master(b.master), half(static_cast<uint16_t*>(b.half)) {}
  Vec read(int64_t i) const { return ::read<Vec>(master + i); }
  void write(int64_t i, Vec p) const {
    ::write(master + i, p);
    ::write(half + i, narrow(p, H{}));
  }
};

struct Split {
  uint16_t* high;
  int16_t* low;
  explicit Split(const Buffers& b) : high(static_cast<uint16_t*>(b.half)), low(b.low) {}
  Vec read(int64_t i) const { return join(::read<Half>(high + i), ::read<Low>(low + i)); }
  void write(int64_t i, Vec p) const {
    Half h;
    Low l;
    split(p, h, l);
    ::write(high + i, h);
    ::write(low + i, l);
  }
};

// -- update rules: the new master from the old one and the gradient

struct Adam {
  Vec factor, l2, decay, take1, beta2, take2, step_size, root_bias, eps;
  explicit Adam(const double* k)
      : factor(all(k[0])), l2(all(k[1])), decay(all(k[2])), take1(all(k[3])), beta2(all(k[4])), take2(all(k[5])),
        step_size(all(k[6])), root_bias(all(k[7])), eps(all(k[8])) {}
  Vec step(Vec p, Vec g, float* first, float* second) const {
    g = g * factor + l2 * p;
    Vec m = read<Vec>(first);
    m += take1 * (g - m);
    const Vec v = beta2 * read<Vec>(second) + take2 * (g * g);
    write(first, m);
    write(second, v);
    return decay * p - step_size * (m / (root_bias * root(v) + eps));
  }
  // s: the root of v
  Vec step(Vec p, Vec g, Vec& m, Vec& s) const {
    g = g * factor + l2 * p;
    m += take1 * (g - m);
    s = root(beta2 * (s * s) + take2 * (g * g));
    return decay * p - step_size * (m / (root_bias * s + eps));
  }
};

struct Sgd {
  Vec factor, l2, lr;
  explicit Sgd(const double* k) : factor(all(k[0])), l2(all(k[1])), lr(all(k[2])) {}
  Vec step(Vec p, Vec g, float*, float*) const { return p - lr * (g * factor + l2 * p); }
};

struct Momentum {
  Vec factor, l2, lr, momentum, keep, from_grad, from_buffer;
  explicit Momentum(const double* k)
      : factor(all(k[0])), l2(all(k[1])), lr(all(k[2])), momentum(all(k[3])), keep(all(k[4])), from_grad(all(k[5])),
        from_buffer(all(k[6])) {}
  Vec step(Vec p, Vec g, float* first, float*) const {
    g = g * factor + l2 * p;
    const Vec b = momentum * read<Vec>(first) + keep * g;
    write(first, b);
    return p - lr * (from_grad * g + from_buffer * b);
  }
};

// -- loops

template <class Task> void parallel(int threads, Task task) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; t++) others.emplace_back(task, t);
  task(0);
  for (auto& other : others) other.join();
}

// Calls work(segment, begin, end) for the parts of all segments that thread t of `threads` owns; a part begins at a
// multiple of `whole` elements.
template <int64_t whole = 1, class Work>
void share(const Segment* segments, int64_t count, int t, int threads, Work work) {
  int64_t total = 0;
  for (int64_t s = 0; s < count; s++) total += segments[s].numel;
  const int64_t from = total * t / threads, to = total * (t + 1) / threads;
  int64_t seen = 0;
  for (int64_t s = 0; s < count && seen < to; seen += segments[s++].numel) {
    const auto part = [&](int64_t at) {
      return std::min((std::max<int64_t>(at - seen, 0) + whole - 1) / whole * whole, segments[s].numel);
    };
    const int64_t begin = part(from), end = part(to);
    if (begin < end) work(segments[s], begin, end);
  }
}

template <class Rule, class Weights, class G>
void update(const Segment* segments, int64_t count, const Buffers& b, const double* k, int threads) {
  parallel(threads, [=](int t) {
    const Rule rule(k);
    const Weights weights(b);
    share(segments, count, t, threads, [&](const Segment& s, int64_t begin, int64_t end) {
      const auto* grad = static_cast<const typename G::Store*>(s.grad) - s.offset;
      int64_t i = s.offset + begin;
      const int64_t stop = s.offset + end;
      for (; i + W <= stop; i += W)
        weights.write(i, rule.step(weights.read(i), gradient<G>(grad + i), b.first + i, b.second + i));
      if (i == stop) return;
      // the tail, through copies one vector wide
      const size_t rest = stop - i;
      typename G::Store g[W] = {};
      float master[W] = {}, first[W] = {}, second[W] = {};
      uint16_t half[W] = {};
      int16_t low[W] = {};
      std::memcpy(g, grad + i, rest * sizeof *g);
      if (b.master) std::memcpy(master, b.master + i, 4 * rest);
      if (b.low) std::memcpy(half, static_cast<uint16_t*>(b.half) + i, 2 * rest), std::memcpy(low, b.low + i, 2 * rest);
      if (b.first) std::memcpy(first, b.first + i, 4 * rest);
      if (b.second) std::memcpy(second, b.second + i, 4 * rest);
      const Weights local({master, half, low, nullptr, nullptr});
      local.write(0, rule.step(local.read(0), gradient<G>(g), first, second));
      if (b.master) std::memcpy(b.master + i, master, 4 * rest);
      if (b.half) std::memcpy(static_cast<uint16_t*>(b.half) + i, half, 2 * rest);
      if (b.low) std::memcpy(b.low + i, low, 2 * rest);
      if (b.first) std::memcpy(b.first + i, first, 4 * rest);
      if (b.second) std::memcpy(b.second + i, second, 4 * rest);
    });
  });
}

// -- moments of 8 bits

constexpr int CODED = 64;  // elements that share an exponent
constexpr int DROPPED1 = 19, DROPPED2 = 18;  // lower bits of an fp32 number that have no code
constexpr int REACH = 7;   // exponents below that of the block that have codes
constexpr int GRADUAL = 16;
constexpr uint32_t SIGN = 0x80000000, BINADE = 1 << 23;
constexpr uint32_t ALONG = 0xc13fa9a9;  // how far the threshold of rounding is from an element to the next

// Two vectors at a time, as 16-bit halves of their 32-bit lanes: codes are decoded and rounded there. `lower` and
// `upper` give the 32-bit lanes of words a (low half) and b (high half) in the order in which every architecture
// unpacks, that is within 128 bits: elements 0 to 3, 8 to 11, ... and 4 to 7, 12 to 15, ...; `evens` and `odds` undo it.
typedef uint16_t Pair __attribute__((vector_size(4 * W)));
typedef int16_t Words __attribute__((vector_size(4 * W)));
constexpr auto LANES = std::make_index_sequence<2 * W>{};

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

// -- half weights of all masters

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

constexpr int64_t CHUNK = 1 << 12;

template <class G> double sum_of_squares(const typename G::Store* g, int64_t n) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; j++) {
      const Vec x = gradient<G>(g + i + j * W);
      sums[j] += x * x;
    }
  for (; i < n; i += W) {
    typename G::Store rest[W] = {};
    std::memcpy(rest, g + i, std::min<int64_t>(W, n - i) * sizeof *rest);
    const Vec x = gradient<G>(rest);
    sums[0] += x * x;
  }
  const Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int j = 0; j < W; j++) total += sum[j];
  return total;
}

template <class G> double norm(const Segment* segments, int64_t count, int threads) {
  std::vector<int64_t> first(count + 1);  // chunk of each segment's start
  for (int64_t s = 0; s < count; s++) first[s + 1] = first[s] + (segments[s].numel + CHUNK - 1) / CHUNK;
  std::vector<double> sums(first[count]);
  parallel(threads, [&](int t) {
    const int64_t from = first[count] * t / threads, to = first[count] * (t + 1) / threads;
    int64_t s = std::upper_bound(first.begin(), first.end(), from) - first.begin() - 1;
    for (int64_t c = from; c < to; c++) {
      while (c >= first[s + 1]) s++;
      const int64_t begin = (c - first[s]) * CHUNK;
      const auto* grad = static_cast<const typename G::Store*>(segments[s].grad) + begin;
      sums[c] = sum_of_squares<G>(grad, std::min(CHUNK, segments[s].numel - begin));
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

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
