// Where the weights are: read(i) gives the master, write(i) updates it and the half weight.
#pragma once
#include "buffers.h"
#include "vectors.h"

namespace {

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

}  // namespace
