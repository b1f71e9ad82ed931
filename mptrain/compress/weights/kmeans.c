/* Weighted 1-D k-means of many groups; see kmeans.py for the algorithm.

   Atoms are the distinct values of a group in ascending order (of a large group the cells of a
   fine histogram). w[a] and m[a] are the weight and the first moment, about the group's mean, of
   all atoms before a: the atoms [i, j) as one cluster cost S - (m[j] - m[i])^2 / (w[j] - w[i]),
   where S does not depend on the clustering. Groups are independent, so results do not depend on
   the number of threads. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SORTED (1 << 17)    /* values of the largest group that is sorted */
#define FINE (1 << 16)      /* cells of the histogram of a larger one, about */
#define COARSE (1 << 16)
#define DIGIT 11            /* bits of a radix pass */
#define REACH 8             /* candidates to either side of a boundary */
#define CANDIDATES (2 * REACH + 1)
#define ROUNDS 40           /* of the local search at full resolution */
#define MAX_K 256

typedef struct {
    int64_t atoms;
    float *x;               /* values of the atoms */
    double *w, *m, mean;
    uint64_t *items, *spare;
    int64_t *offset;
    uint8_t *shift;
    double *cells, *costs;  /* of the coarse search */
    int32_t *edges, *choice;
} Work;

/* Unsigned integers in the order of the floats. */
static uint32_t key_of(float x) {
    x += 0.0f; /* -0 and 0 are one value */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits ^ ((uint32_t)-(int32_t)(bits >> 31) | 0x80000000u);
}

static float value_of(uint32_t key) {
    uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static double cost(double weight, double moment) {
    return weight > 0 ? -(moment * moment) / weight : weight < 0 ? INFINITY : 0.0;
}

/* Added to every weight: values without importance still have a place. */
static double floor_of(const float *weight, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += weight[i];
    return total > 0 ? 1e-9 * total / n : 1.0;
}

static void sort_items(Work *k, int64_t n) {
    static const int passes = (32 + DIGIT - 1) / DIGIT;
    int64_t count[(32 + DIGIT - 1) / DIGIT][1 << DIGIT];
    memset(count, 0, sizeof count);
    for (int64_t i = 0; i < n; ++i)
        for (int p = 0; p < passes; ++p) ++count[p][k->items[i] >> (32 + p * DIGIT) & ((1 << DIGIT) - 1)];
    for (int p = 0; p < passes; ++p) {
        int64_t start = 0;
        for (int d = 0; d < 1 << DIGIT; ++d) {
            int64_t here = count[p][d];
            count[p][d] = start;
            start += here;
        }
        for (int64_t i = 0; i < n; ++i) {
            uint64_t item = k->items[i];
            k->spare[count[p][item >> (32 + p * DIGIT) & ((1 << DIGIT) - 1)]++] = item;
        }
        uint64_t *swap = k->items;
        k->items = k->spare;
        k->spare = swap;
    }
}

static void prefix_sums(Work *k) {
    double weight = 0, moment = 0;
    for (int64_t a = 0; a < k->atoms; ++a) weight += k->w[a], moment += k->m[a];
    k->mean = moment / weight;
    weight = moment = 0;
    for (int64_t a = 0; a < k->atoms; ++a) {
        double here = k->w[a], first = k->m[a] - here * k->mean;
        k->w[a] = weight, k->m[a] = moment;
        weight += here, moment += first;
    }
    k->w[k->atoms] = weight, k->m[k->atoms] = moment;
}

static void atoms_by_sorting(Work *k, const float *x, const float *weight, int64_t n) {
    double floor = weight ? floor_of(weight, n) : 0;
    for (int64_t i = 0; i < n; ++i) {
        float one = weight ? weight[i] : 1.0f;
        uint32_t bits;
        memcpy(&bits, &one, 4);
        k->items[i] = (uint64_t)key_of(x[i]) << 32 | bits;
    }
    sort_items(k, n);
    int64_t a = -1;
    uint32_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t key = (uint32_t)(k->items[i] >> 32), bits = (uint32_t)k->items[i];
        float one;
        memcpy(&one, &bits, 4);
        if (i == 0 || key != last) {
            k->x[++a] = value_of(key);
            k->w[a] = 0;
            last = key;
        }
        k->w[a] += one + floor;
    }
    k->atoms = a + 1;
    for (a = 0; a < k->atoms; ++a) k->m[a] = k->w[a] * k->x[a];
    prefix_sums(k);
}

/* Cells are ranges of keys. The upper half of a key chooses a coarse cell; one that holds many values is
   split by the next bits, so that a fine cell holds about n / FINE values whatever their distribution. */
static void atoms_by_histogram(Work *k, const float *x, const float *weight, int64_t n) {
    double floor = weight ? floor_of(weight, n) : 0;
    memset(k->offset, 0, COARSE * sizeof *k->offset);
    for (int64_t i = 0; i < n; ++i) ++k->offset[key_of(x[i]) >> 16];
    int64_t cells = 0;
    for (int c = 0; c < COARSE; ++c) {
        int bits = 0;
        while (bits < 16 && (k->offset[c] >> bits) * FINE > n) ++bits;
        k->shift[c] = (uint8_t)(16 - bits);
        int64_t any = k->offset[c];
        k->offset[c] = cells;
        cells += any ? (int64_t)1 << bits : 0;
    }
    memset(k->w, 0, cells * sizeof *k->w);
    memset(k->m, 0, cells * sizeof *k->m);
    for (int64_t i = 0; i < n; ++i) {
        uint32_t key = key_of(x[i]);
        int64_t cell = k->offset[key >> 16] + ((key & 0xFFFF) >> k->shift[key >> 16]);
        double one = weight ? weight[i] + floor : 1.0;
        k->w[cell] += one;
        k->m[cell] += one * x[i];
    }
    int64_t a = 0;
    for (int64_t c = 0; c < cells; ++c)
        if (k->w[c] > 0) {
            k->w[a] = k->w[c], k->m[a] = k->m[c];
            k->x[a] = (float)(k->m[a] / k->w[a]);
            ++a;
        }
    k->atoms = a;
    prefix_sums(k);
}

/* The cube root of a positive number within 4%: a third of the exponent. */
static double about_cube_root(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    bits = bits / 3 + 0x2A9F7893782DA1CEull;
    memcpy(&x, &bits, 8);
    return x;
}

/* What the gap after atom a adds to the cells' measure. */
static double spread(const Work *k, int64_t a) {
    double gap = (double)k->x[a + 1] - k->x[a];
    return about_cube_root((k->w[a + 2] - k->w[a]) * gap * gap);
}

/* Edges of at most `wanted` cells. */
static int coarse_cells(Work *k, int wanted) {
    int32_t *edges = k->edges;
    if (k->atoms <= wanted) {
        for (int32_t a = 0; a <= k->atoms; ++a) edges[a] = a;
        return (int)k->atoms;
    }
    double share = INFINITY, sum = 0, next = 1;
    for (int again = 0; again < 20; ++again) { /* a gap has one edge, however wide it is */
        double total = 0, widest = 0;
        for (int64_t a = 0; a + 1 < k->atoms; ++a) {
            double here = spread(k, a);
            here = here < share ? here : share;
            total += here;
            widest = here > widest ? here : widest;
        }
        share = total / wanted;
        if (widest <= 1.5 * share) break;
    }
    int cells = 0;
    edges[0] = 0;
    for (int64_t a = 0; a + 1 < k->atoms; ++a) {
        double here = spread(k, a) / share;
        sum += here < 1 ? here : 1;
        if (sum >= next && cells + 1 < wanted) {
            edges[++cells] = (int32_t)a + 1;
            next = floor(sum) + 1;
        }
    }
    edges[++cells] = (int32_t)k->atoms;
    return cells;
}

/* after[j] = min over i <= j of before[i] + cost(i, j) for j in [lo, hi]; the best i grows with j. */
static void best_splits(const double *w, const double *m, const double *before, double *after, int32_t *choice,
                        int lo, int hi, int first, int last) {
    while (lo <= hi) {
        int j = (lo + hi) / 2, at = first, end = j < last ? j : last;
        double best = INFINITY;
        for (int i = first; i <= end; ++i) {
            double c = before[i] + cost(w[j] - w[i], m[j] - m[i]);
            if (c < best) best = c, at = i;
        }
        after[j] = best, choice[j] = at;
        best_splits(w, m, before, after, choice, lo, j - 1, first, at);
        lo = j + 1, first = at;
    }
}

/* Optimal boundaries b[0..clusters] on the edges of cells; steps[c]: the width of the cells beside b[c], in
   candidates of the local search. */
static void coarse_search(Work *k, int clusters, int cells, int64_t *b, int64_t *steps) {
    double *w = k->cells, *m = w + cells + 1, *before = k->costs, *after = before + cells + 1;
    for (int e = 0; e <= cells; ++e) w[e] = k->w[k->edges[e]], m[e] = k->m[k->edges[e]];
    for (int e = 0; e <= cells; ++e) before[e] = cost(w[e] - w[0], m[e] - m[0]);
    for (int c = 1; c < clusters; ++c) {
        best_splits(w, m, before, after, k->choice + (int64_t)c * (cells + 1), 0, cells, 0, cells);
        double *swap = before;
        before = after, after = swap;
    }
    int e = cells;
    b[clusters] = k->atoms;
    for (int c = clusters - 1; c > 0; --c) {
        e = k->choice[(int64_t)c * (cells + 1) + e];
        b[c] = k->edges[e];
        int64_t left = e > 0 ? k->edges[e] - k->edges[e - 1] : 0;
        int64_t right = e < cells ? k->edges[e + 1] - k->edges[e] : 0;
        steps[c] = ((left > right ? left : right) + REACH - 1) / REACH;
        if (steps[c] < 1) steps[c] = 1;
    }
    b[0] = 0;
}

/* The best boundaries among CANDIDATES places around each; whether one moved. */
static int local_search(const Work *k, int clusters, int64_t *b, const int64_t *steps) {
    uint8_t choice[MAX_K][CANDIDATES];
    int64_t place[MAX_K][CANDIDATES];
    double w[2][CANDIDATES], m[2][CANDIDATES], total[2][CANDIDATES];
    for (int c = 1; c < clusters; ++c) {
        double *wj = w[c & 1], *mj = m[c & 1], *now = total[c & 1];
        const double *wi = w[~c & 1], *mi = m[~c & 1], *before = total[~c & 1];
        for (int j = 0; j < CANDIDATES; ++j) {
            int64_t at = b[c] + (j - REACH) * steps[c];
            at = at < 0 ? 0 : at > k->atoms ? k->atoms : at;
            place[c][j] = at, wj[j] = k->w[at], mj[j] = k->m[at];
        }
        for (int j = 0; j < CANDIDATES; ++j) {
            if (c == 1) {
                now[j] = cost(wj[j], mj[j]);
                continue;
            }
            double costs[CANDIDATES], best = INFINITY;
            for (int i = 0; i < CANDIDATES; ++i) {
                double weight = wj[j] - wi[i], moment = mj[j] - mi[i];
                double safe = weight > 0 ? weight : 1.0;
                costs[i] = before[i] + (weight > 0 ? -(moment * moment) / safe : weight < 0 ? INFINITY : 0.0);
            }
            int at = 0;
            for (int i = 0; i < CANDIDATES; ++i)
                if (costs[i] < best) best = costs[i], at = i;
            now[j] = best, choice[c][j] = (uint8_t)at;
        }
    }
    const double *wi = w[(clusters - 1) & 1], *mi = m[(clusters - 1) & 1], *before = total[(clusters - 1) & 1];
    double best = INFINITY;
    int at = 0, moved = 0;
    for (int i = 0; i < CANDIDATES; ++i) {
        double c = before[i] + cost(k->w[k->atoms] - wi[i], k->m[k->atoms] - mi[i]);
        if (c < best) best = c, at = i;
    }
    for (int c = clusters - 1; c > 0; --c) {
        moved |= place[c][at] != b[c];
        b[c] = place[c][at];
        at = choice[c][at];
    }
    return moved;
}

static void cluster(Work *k, int clusters, int wanted, float *table) {
    int64_t b[MAX_K + 1], steps[MAX_K];
    int used = k->atoms < clusters ? (int)k->atoms : clusters;
    if (used < clusters) {
        for (int c = 0; c <= used; ++c) b[c] = c;
    } else {
        int cells = coarse_cells(k, wanted);
        coarse_search(k, clusters, cells, b, steps);
        for (int rounds = cells < k->atoms && clusters > 1 ? ROUNDS : 0; rounds > 0; --rounds) {
            int moved = local_search(k, clusters, b, steps), coarse = 0;
            for (int c = 1; c < clusters; ++c) {
                coarse |= steps[c] > 1;
                steps[c] = (steps[c] + 3) / 4;
            }
            if (!moved && !coarse) break;
        }
    }
    for (int c = 0; c < clusters; ++c) {
        double weight = c < used ? k->w[b[c + 1]] - k->w[b[c]] : 0;
        if (weight > 0)
            table[c] = (float)(k->mean + (k->m[b[c + 1]] - k->m[b[c]]) / weight);
        else
            table[c] = c ? table[c - 1] : k->x[0];
    }
}

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

static int open_work(Work *k, int64_t n, int clusters, int wanted) {
    int sorted = n <= SORTED;
    int64_t atoms = sorted ? n : 3 * FINE + 2 * COARSE; /* at most 2 n / (n / FINE) and one to a coarse cell */
    memset(k, 0, sizeof *k);
    k->x = malloc(atoms * sizeof *k->x);
    k->w = malloc((atoms + 1) * sizeof *k->w);
    k->m = malloc((atoms + 1) * sizeof *k->m);
    k->items = malloc(largest(1, sorted ? n : 0) * sizeof *k->items);
    k->spare = malloc(largest(1, sorted ? n : 0) * sizeof *k->spare);
    k->offset = malloc(largest(1, sorted ? 0 : COARSE) * sizeof *k->offset);
    k->shift = malloc(largest(1, sorted ? 0 : COARSE) * sizeof *k->shift);
    k->cells = malloc(2 * (wanted + 1) * sizeof *k->cells);
    k->costs = malloc(2 * (wanted + 1) * sizeof *k->costs);
    k->edges = malloc((wanted + 1) * sizeof *k->edges);
    k->choice = malloc((int64_t)clusters * (wanted + 1) * sizeof *k->choice);
    return k->x && k->w && k->m && k->items && k->spare && k->offset && k->shift && k->cells && k->costs &&
           k->edges && k->choice;
}

static void close_work(Work *k) {
    void *all[] = {k->x, k->w, k->m, k->items, k->spare, k->offset, k->shift, k->cells, k->costs, k->edges, k->choice};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) free(all[i]);
}

/* The number of the nearest entry of an ascending table of 2^bits: how many midpoints lie below the value. */
static void assign(const float *x, int64_t n, const float *table, int clusters, uint8_t *indices) {
    float middle[MAX_K];
    for (int c = 0; c + 1 < clusters; ++c) middle[c] = (float)(0.5 * ((double)table[c] + table[c + 1]));
    for (int64_t i = 0; i < n; ++i) {
        uint32_t at = 0;
        for (uint32_t half = (uint32_t)clusters / 2; half; half /= 2) at += x[i] > middle[at + half - 1] ? half : 0;
        indices[i] = (uint8_t)at;
    }
}

/* x, weight: [groups, n]; table: [groups, 1 << bits]; indices: [groups, n]. weight may be NULL. cells: of the
   coarse search. Returns 0, or 1 when there is no memory. */
int kmeans(const float *x, const float *weight, int64_t groups, int64_t n, int bits, int cells, float *table,
           uint8_t *indices) {
    int failed = 0, clusters = 1 << bits;
#pragma omp parallel reduction(| : failed)
    {
        Work work;
        if (!open_work(&work, n, clusters, cells)) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t g = 0; g < groups; ++g) {
            if (failed) continue;
            const float *here = x + g * n, *heavy = weight ? weight + g * n : 0;
            if (n <= SORTED)
                atoms_by_sorting(&work, here, heavy, n);
            else
                atoms_by_histogram(&work, here, heavy, n);
            cluster(&work, clusters, cells, table + g * clusters);
            assign(here, n, table + g * clusters, clusters, indices + g * n);
        }
        close_work(&work);
    }
    return failed;
}
