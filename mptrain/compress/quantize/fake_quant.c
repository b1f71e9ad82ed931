/* Fake quantization in one pass over memory; see fake_quant.py for the equations.

   A tensor is [rows, inner]; row r has the step and zero point of channel r % channels.
   Work is cut into blocks of fixed size, so sums do not depend on the number of threads. */
#include <math.h>
#include <stdint.h>

#define BLOCK 16384

typedef struct {
    int64_t offset, length;
    float step, zero, inverse;
} Block;

static Block block_at(int64_t t, int64_t blocks, int64_t inner, int64_t channels, const float *step,
                      const float *zero) {
    int64_t row = t / blocks, start = (t % blocks) * BLOCK;
    Block b = {row * inner + start, inner - start < BLOCK ? inner - start : BLOCK, step[row % channels],
               zero[row % channels], 1.0f / step[row % channels]};
    return b;
}

void fake_quant_forward(const float *restrict x, float *restrict y, int64_t rows, int64_t inner, int64_t channels,
                        const float *step, const float *zero, float qmin, float qmax) {
    int64_t blocks = (inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows * blocks; ++t) {
        Block b = block_at(t, blocks, inner, channels, step, zero);
        const float *restrict in = x + b.offset;
        float *restrict out = y + b.offset;
        for (int64_t i = 0; i < b.length; ++i) {
            float q = nearbyintf(in[i] * b.inverse) + b.zero;
            q = q < qmin ? qmin : q;
            q = q > qmax ? qmax : q;
            out[i] = (q - b.zero) * b.step;
        }
    }
}

/* sums[3 t]: of dy * (q - x / step) over the elements of block t inside the range;
   sums[3 t + 1], sums[3 t + 2]: of dy below and above the range. */
void fake_quant_backward(const float *restrict dy, const float *restrict x, float *restrict dx, int64_t rows,
                         int64_t inner, int64_t channels, const float *step, const float *zero, float qmin,
                         float qmax, double *restrict sums) {
    int64_t blocks = (inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows * blocks; ++t) {
        Block b = block_at(t, blocks, inner, channels, step, zero);
        const float *restrict in = x + b.offset, *restrict grad = dy + b.offset;
        float *restrict out = dx + b.offset;
        float inside = 0, below = 0, above = 0;
#pragma omp simd reduction(+ : inside, below, above)
        for (int64_t i = 0; i < b.length; ++i) {
            float u = in[i] * b.inverse, k = nearbyintf(u), q = k + b.zero;
            float low = q < qmin ? grad[i] : 0.0f, high = q > qmax ? grad[i] : 0.0f;
            float kept = grad[i] - low - high;
            out[i] = kept;
            inside += kept * (k - u);
            below += low;
            above += high;
        }
        sums[3 * t] = inside;
        sums[3 * t + 1] = below;
        sums[3 * t + 2] = above;
    }
}
