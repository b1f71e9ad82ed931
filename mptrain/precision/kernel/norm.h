// The sum of squares of all gradients.
#pragma once
#include <algorithm>
#include <vector>
#include "threads.h"
#include "vectors.h"

namespace {

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

}  // namespace
