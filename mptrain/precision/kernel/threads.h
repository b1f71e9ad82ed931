// Work shared by threads.
#pragma once
#include <algorithm>
#include <thread>
#include <vector>
#include "buffers.h"

namespace {

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

}  // namespace
