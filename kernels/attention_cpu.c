/* Attention of a few queries over a long cache, on CPUs with AVX512-BF16.

   Every KV head's keys are cut into parts of PART entries, at the same places whatever the length. A
   part's scores, their largest, the weights exp(score - largest) and their sum with the values are
   made while its keys and values are in the nearest cache, so each is read from memory once; no score
   is ever written there. The parts are then merged by their largest score and sum of weights
   (arXiv 2205.14135). Nothing a row computes depends on the rows beside it or on the number of
   threads: a verified row is bit for bit the row of a plain step.

   Rows are the queries of the heads that share a KV head: row j of `rows` is query j % queries, which
   sees the entries up to start + j % queries. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "power_cpu.h"

enum { PART = 256, KEYS = 16, TILE = 12, MOST_DIM = 128, MOST_ROWS = 128 };

typedef uint16_t bf16;

static inline int smaller(int a, int b) { return a < b ? a : b; }

/* 16 rows of 16 pairs become 16 pairs of 16 rows. */
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* Both products are written for 1 to TILE rows, whose sums stay in registers. */
#define EACH(CASE)                                                                                 \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)                                                \
    CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)

/* Scores of n rows with KEYS keys, whose pairs lie in `k`. */
#define SCORES(n)                                                                                  \
    case n: {                                                                                      \
        __m512 even[n], odd[n];                                                                    \
        for (int r = 0; r < n; r++) even[r] = odd[r] = _mm512_setzero_ps();                        \
        for (int p = 0; p < pairs; p += 2)                                                         \
            for (int r = 0; r < n; r++) {                                                          \
                const int32_t *at = q + r * pairs + p;                                             \
                even[r] = _mm512_dpbf16_ps(even[r], (__m512bh)k[p],                                \
                                           (__m512bh)_mm512_set1_epi32(at[0]));                    \
                odd[r] = _mm512_dpbf16_ps(odd[r], (__m512bh)k[p + 1],                              \
                                          (__m512bh)_mm512_set1_epi32(at[1]));                     \
            }                                                                                      \
        for (int r = 0; r < n; r++)                                                                \
            _mm512_storeu_ps(score + r * PART, _mm512_add_ps(even[r], odd[r]));                    \
        break;                                                                                     \
    }

static inline void scores(int n, int pairs, const __m512i *k, const int32_t *q, float *score) {
    switch (n) { EACH(SCORES) }
}

/* Weighted sums for n rows of 32 columns of `count` values (even; those from `held` on are nought). */
#define VALUES(n)                                                                                  \
    case n: {                                                                                      \
        __m512 low[n], high[n];                                                                    \
        for (int r = 0; r < n; r++) low[r] = high[r] = _mm512_setzero_ps();                        \
        for (int i = 0; i < count; i += 2) {                                                       \
            for (int j = 0; j < lines; j++) _mm_prefetch(next + 64 * j, _MM_HINT_T1);              \
            next += 64 * lines;                                                                    \
            __m512i a = _mm512_loadu_si512(v + i * stride);                                        \
            __m512i b = i + 1 < held ? _mm512_loadu_si512(v + (i + 1) * stride)                    \
                                     : _mm512_setzero_si512();                                     \
            __m512bh l = (__m512bh)_mm512_unpacklo_epi16(a, b);                                    \
            __m512bh h = (__m512bh)_mm512_unpackhi_epi16(a, b);                                    \
            for (int r = 0; r < n; r++) {                                                          \
                int32_t pair;                                                                      \
                memcpy(&pair, weight + r * PART + i, 4);                                           \
                __m512bh w = (__m512bh)_mm512_set1_epi32(pair);                                    \
                low[r] = _mm512_dpbf16_ps(low[r], l, w);                                           \
                high[r] = _mm512_dpbf16_ps(high[r], h, w);                                         \
            }                                                                                      \
        }                                                                                          \
        for (int r = 0; r < n; r++) {                                                              \
            _mm512_storeu_ps(out + r * dim, _mm512_permutex2var_ps(low[r], first, high[r]));       \
            _mm512_storeu_ps(out + r * dim + 16, _mm512_permutex2var_ps(low[r], second, high[r])); \
        }                                                                                          \
        break;                                                                                     \
    }

static inline void values(int n, int count, int held, const bf16 *v, int64_t stride, int dim,
                          const bf16 *weight, float *out, const char *next, int lines) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    switch (n) { EACH(VALUES) }
}

/* One part: for each row its largest score, its sum of weights and its weighted sum of values. */
static void part(const bf16 *q, const bf16 *k, const bf16 *v, int64_t k_stride, int64_t v_stride,
                 int rows, int queries, int dim, int64_t start, int64_t from, float *most,
                 float *total, float *out) {
    const float log2e = 1.44269504f;
    int64_t entries = start + queries - from; /* seen by the last query */
    int held = (int)(entries < PART ? entries : PART), pairs = dim / 2, tiles = (rows + TILE - 1) / TILE;
    float score[MOST_ROWS * PART];
    bf16 weight[MOST_ROWS * PART];
    __m512i pair[MOST_DIM / 2];
    for (int i = 0; i < held; i += KEYS) {
        for (int j = 0; j < KEYS; j++)
            for (int d = 0; d < dim; d += 32) {
                _mm_prefetch((const char *)(v + (i + j) * v_stride + d), _MM_HINT_T1);
            }
        for (int d = 0; d < pairs; d += 16) {
            for (int j = 0; j < KEYS; j++)
                pair[d + j] = i + j < held ? _mm512_loadu_si512(k + (i + j) * k_stride + 2 * d)
                                           : _mm512_setzero_si512();
            transpose(pair + d);
        }
        for (int t = 0; t < tiles; t++) {
            int r = t * rows / tiles, n = (t + 1) * rows / tiles - r;
            scores(n, pairs, pair, (const int32_t *)q + r * pairs, score + r * PART + i);
        }
    }
    for (int r = 0; r < rows; r++) {
        int64_t seen = start + r % queries + 1 - from;
        int n = (int)(seen < 0 ? 0 : seen < held ? seen : held);
        float *s = score + r * PART;
        bf16 *w = weight + r * PART;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int i = 0; i < n; i += KEYS) {
            __mmask16 there = (__mmask16)((1u << smaller(n - i, 16)) - 1);
            top = _mm512_mask_max_ps(top, there, top, _mm512_loadu_ps(s + i));
        }
        most[r] = _mm512_reduce_max_ps(top);
        __m512 less = _mm512_set1_ps(most[r] * log2e);
        for (int i = 0; i < held; i += KEYS) {
            int left = n - i < 0 ? 0 : smaller(n - i, 16);
            __mmask16 there = (__mmask16)((1u << left) - 1);
            __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s + i), _mm512_set1_ps(log2e), less);
            __m512 p = _mm512_maskz_mov_ps(there, power(x));
            __m256bh e = _mm512_cvtneps_pbh(p);
            sum = _mm512_add_ps(sum, p);
            _mm256_storeu_si256((__m256i *)(w + i), (__m256i)e);
        }
        total[r] = _mm512_reduce_add_ps(sum);
    }
    /* Meanwhile memory fetches the next part's keys, as it fetched these values during the scores: it
       would have nothing to do otherwise. Keys of a head are taken to lie one after the other. */
    int steps = tiles * (dim / 32) * PART / 2, lines = (PART * dim / 32 + steps - 1) / steps;
    const char *next = (const char *)(k + PART * k_stride);
    for (int d = 0; d < dim; d += 32)
        for (int t = 0; t < tiles; t++) {
            int r = t * rows / tiles, n = (t + 1) * rows / tiles - r;
            values(n, held + (held & 1), held, v + d, v_stride, dim, weight + r * PART,
                   out + r * dim + d, next, lines);
            next += 64 * lines * (PART / 2);
        }
}

/* Whether this CPU has the instructions. */
int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

/* Floats of `room` that attend() needs. */
int64_t attend_room(int64_t heads, int rows, int dim, int64_t entries) {
    return heads * ((entries + PART - 1) / PART) * rows * (dim + 2);
}

/* q [batch, heads, rows, dim] and out alike, dense; k, v [batch, heads, entries, dim] by strides in
   elements: of a batch, a head, an entry. `start`: entries before the first query. */
void attend(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *room, int64_t batch,
            int64_t heads, int rows, int queries, int dim, int64_t start, const int64_t *stride,
            int threads) {
    int64_t parts = (start + queries + PART - 1) / PART, all = batch * heads;
    float *most = room, *total = most + all * parts * rows, *sums = total + all * parts * rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < all * parts; unit++) {
            int64_t head = unit / parts, from = unit % parts * PART;
            int64_t b = head / heads, h = head % heads;
            const bf16 *ks = k + b * stride[0] + h * stride[1] + from * stride[2];
            const bf16 *vs = v + b * stride[3] + h * stride[4] + from * stride[5];
            part(q + head * rows * dim, ks, vs, stride[2], stride[5], rows, queries, dim, start, from,
                 most + unit * rows, total + unit * rows, sums + unit * rows * dim);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < all * rows; row++) {
            int64_t head = row / rows, r = row % rows, at = head * parts * rows + r;
            float top = most[at], weight = 0, sum[MOST_DIM] = {0};
            for (int64_t p = 1; p < parts; p++) top = fmaxf(top, most[at + p * rows]);
            for (int64_t p = 0; p < parts; p++) {
                float share = expf(most[at + p * rows] - top), *s = sums + (at + p * rows) * dim;
                weight += share * total[at + p * rows];
                for (int d = 0; d < dim; d++) sum[d] += share * s[d];
            }
            for (int d = 0; d < dim; d += 16) {
                __m512 mean = _mm512_div_ps(_mm512_loadu_ps(sum + d), _mm512_set1_ps(weight));
                _mm256_storeu_si256((__m256i *)(out + row * dim + d), (__m256i)_mm512_cvtneps_pbh(mean));
            }
        }
    }
}

/* n entries of each head, by strides of a batch, a head and an entry, to where they are kept. */
static void copy(const bf16 *x, const int64_t *stride, bf16 *to, const int64_t *to_stride,
                 int64_t batch, int64_t heads, int n, int dim) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < n; i++)
                memcpy(to + b * to_stride[0] + h * to_stride[1] + i * to_stride[2],
                       x + b * stride[0] + h * stride[1] + i * stride[2], dim * sizeof(bf16));
}

/* As attend(), for a cache k, v that new_k, new_v [batch, heads, queries, dim] belong to from `start` on:
   they are written there first. q is not dense; `stride`: of k, v, q, new_k, new_v, three each. `room`
   has place for q in front. */
void extend(const bf16 *q, const bf16 *new_k, const bf16 *new_v, bf16 *k, bf16 *v, bf16 *out,
            float *room, int64_t batch, int64_t heads, int rows, int queries, int dim, int64_t start,
            const int64_t *stride, int threads) {
    int64_t group = rows / queries, head = (int64_t)queries * dim;
    const int64_t dense[3] = {heads * group * head, head, dim};
    bf16 *together = (bf16 *)room;
    copy(q, stride + 6, together, dense, batch, heads * group, queries, dim);
    copy(new_k, stride + 9, k + start * stride[2], stride, batch, heads, queries, dim);
    copy(new_v, stride + 12, v + start * stride[5], stride + 3, batch, heads, queries, dim);
    attend(together, k, v, out, room + (batch * heads * rows * dim + 1) / 2, batch, heads, rows,
           queries, dim, start, stride, threads);
}
