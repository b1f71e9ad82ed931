// A step with moments in fp32.
#pragma once
#include "threads.h"
#include "vectors.h"

namespace {

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

}  // namespace
