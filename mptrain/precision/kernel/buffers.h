// What C hands over.
#pragma once
#include <cstdint>

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
