// Update rules: the new master from the old one and the gradient.
#pragma once
#include "vectors.h"

namespace {

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

}  // namespace
