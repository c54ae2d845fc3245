/* Attention of a few queries over a long cache, on CPUs with AVX512-BF16, and faster with AMX.

   Every KV head's keys are cut into parts of PART entries, at the same places whatever the length. A
   part's scores, their largest, the weights exp(score - largest) and their sum with the values are
   made while its keys and values are in the nearest cache, so each is read from memory once; no score
   is ever written there. The parts are then merged by their largest score and sum of weights
   (arXiv 2205.14135). Nothing a row computes depends on the rows beside it or on the number of
   threads: a verified row is bit for bit the row of a plain step.

   Rows are the queries of the heads that share a KV head: row j of `rows` is query j % queries, which
   sees the entries up to start + j % queries. */
#include <math.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common_cpu.h"

enum { PART = 256, KEYS = 16, TILE = 12, AT_ONCE = 3, MOST_DIM = 128, MOST_ROWS = 128 };

static inline int smaller(int a, int b) { return a < b ? a : b; }

/* 16 bytes each of keys 0, 4, 8 and 12. From memory, because shuffles are what transposing waits for. */
static inline __m512i four(const bf16 *k, int64_t stride) {
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)k));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(k + 4 * stride)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(k + 8 * stride)), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(k + 12 * stride)), 3);
}

/* KEYS keys become pairs of their numbers: pair p of each, in the keys' order. */
static inline void transpose(const bf16 *k, int64_t stride, int pairs, __m512i *pair) {
    for (int p = 0; p < pairs; p += 4, k += 8) {
        __m512i a = four(k, stride), b = four(k + stride, stride);
        __m512i c = four(k + 2 * stride, stride), d = four(k + 3 * stride, stride);
        __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        pair[p] = _mm512_unpacklo_epi64(ab, cd);
        pair[p + 1] = _mm512_unpackhi_epi64(ab, cd);
        ab = _mm512_unpackhi_epi32(a, b), cd = _mm512_unpackhi_epi32(c, d);
        pair[p + 2] = _mm512_unpacklo_epi64(ab, cd);
        pair[p + 3] = _mm512_unpackhi_epi64(ab, cd);
    }
}

/* KEYS keys, of which `there` are read, as pairs: where they lie if they are packed, else in `room`. */
static inline const __m512i *pairs_of(const bf16 *k, int64_t stride, int there, int packed, int dim,
                                      __m512i *room) {
    bf16 last[KEYS * MOST_DIM];
    if (packed) return (const __m512i *)k;
    if (there < KEYS) {
        memset(last, 0, sizeof last);
        for (int j = 0; j < there; j++) memcpy(last + j * dim, k + j * stride, dim * sizeof(bf16));
        k = last, stride = dim;
    }
    transpose(k, stride, dim / 2, room);
    return room;
}

/* The part that is computed next is fetched meanwhile, a line here and there at an even pace: memory is
   never idle, and never asked for more than it gives. Entries of a head are taken to lie one after the
   other. */
static inline const char *fetch(const char *at, int lines) {
    for (int i = 0; i < lines; i++) _mm_prefetch(at + 64 * i, _MM_HINT_T1);
    return at + 64 * lines;
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

/* Sums of 32 columns: unpacking two rows of values left numbers of 4, 4, ... columns to each of two. */
static inline void unmix(__m512 low, __m512 high, float *out) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(low, second, high));
}

/* Weighted sums for n rows of 32 columns of `count` values (even; those from `held` on are nought). */
#define VALUES(n)                                                                                  \
    case n: {                                                                                      \
        __m512 low[n], high[n];                                                                    \
        for (int r = 0; r < n; r++) low[r] = high[r] = _mm512_setzero_ps();                        \
        for (int i = 0; i < count; i += 2) {                                                       \
            next = fetch(next, 1);                                                                 \
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
        for (int r = 0; r < n; r++) unmix(low[r], high[r], out + r * dim);                         \
        break;                                                                                     \
    }

static inline void values(int n, int count, int held, const bf16 *v, int64_t stride, int dim,
                          const bf16 *weight, float *out, const char *next) {
    switch (n) { EACH(VALUES) }
}

/* exp(score - largest) of 16 scores; `less`: LOG2E times the largest. */
static inline __m512 weight16(const float *score, __m512 less) {
    return power(_mm512_fmsub_ps(_mm512_loadu_ps(score), _mm512_set1_ps(LOG2E), less));
}

/* Weights of AT_ONCE rows, all of whose PART scores count: the sums of one row wait for each other. */
static inline const char *weights(const float *score, bf16 *weight, float *most, float *total,
                                  const char *next) {
    __m512 less[AT_ONCE], sum[AT_ONCE];
    for (int r = 0; r < AT_ONCE; r++) {
        __m512 top = _mm512_loadu_ps(score + r * PART), other = _mm512_loadu_ps(score + r * PART + 16);
        for (int i = 32; i < PART; i += 32) {
            top = _mm512_max_ps(top, _mm512_loadu_ps(score + r * PART + i));
            other = _mm512_max_ps(other, _mm512_loadu_ps(score + r * PART + i + 16));
        }
        most[r] = _mm512_reduce_max_ps(_mm512_max_ps(top, other));
        less[r] = _mm512_set1_ps(most[r] * LOG2E);
        sum[r] = _mm512_setzero_ps();
    }
    for (int i = 0; i < PART; i += 16)
        for (int r = 0; r < AT_ONCE; r++) {
            next = fetch(next, 1);
            __m512 w = weight16(score + r * PART + i, less[r]);
            sum[r] = _mm512_add_ps(sum[r], w);
            narrow16(weight + r * PART + i, w);
        }
    for (int r = 0; r < AT_ONCE; r++) total[r] = _mm512_reduce_add_ps(sum[r]);
    return next;
}

/* As weights(), bit for bit, of one row with `held` scores, of which the first n count. */
static inline void weights_of_some(const float *score, int n, int held, bf16 *weight, float *most,
                                   float *total) {
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        __mmask16 there = (__mmask16)((1u << smaller(n - i, 16)) - 1);
        top = _mm512_mask_max_ps(top, there, top, _mm512_loadu_ps(score + i));
    }
    *most = _mm512_reduce_max_ps(top);
    __m512 less = _mm512_set1_ps(*most * LOG2E);
    for (int i = 0; i < held; i += 16) {
        int left = n - i < 0 ? 0 : smaller(n - i, 16);
        __mmask16 there = (__mmask16)((1u << left) - 1);
        __m512 w = _mm512_maskz_mov_ps(there, weight16(score + i, less));
        sum = _mm512_add_ps(sum, w);
        narrow16(weight + i, w);
    }
    *total = _mm512_reduce_add_ps(sum);
}

/* Weights of all rows of a part, nought from what a row sees on to a multiple of DEEP. Of the `lines` of
   the values next_v those from `next` on are fetched meanwhile, then all again. */
static inline void weights_of_part(const float *score, int rows, int queries, int64_t start, int64_t from,
                                   int held, bf16 *weight, float *most, float *total, const bf16 *next_v,
                                   const char *next, int lines) {
    int r = 0, count = (held + DEEP - 1) / DEEP * DEEP;
    if (from + PART <= start + 1)
        for (; r + AT_ONCE <= rows; r += AT_ONCE) {
            next = weights(score + r * PART, weight + r * PART, most + r, total + r, next);
            if (next >= (const char *)next_v + 64 * lines) next = (const char *)next_v;
        }
    for (; r < rows; r++) {
        int64_t seen = start + r % queries + 1 - from;
        int n = (int)(seen < 0 ? 0 : seen < held ? seen : held);
        weights_of_some(score + r * PART, n, count, weight + r * PART, most + r, total + r);
    }
}

/* ---- With AMX. */

int tiles_used = 0;

/* Scores of the rows q with `blocks` blocks of KEYS packed keys, which are right factors as they lie. */
static inline void tile_scores(const bf16 *q, int dim, const bf16 *k, int blocks, float *score,
                               const char *next_k, int k_lines, const char *next_v, int v_lines) {
    for (int d = 0; d < dim; d += 2 * DEEP) { /* two left factors at a time */
        int both = d + DEEP < dim;
        _tile_loadd(4, q + d, dim * 2);
        if (both) _tile_loadd(5, q + d + DEEP, dim * 2);
        for (int b = 0; b < blocks; b++) {
            const bf16 *at = k + b * KEYS * dim + d * KEYS;
            if (!d) {
                next_k = fetch(next_k, k_lines);
                next_v = fetch(next_v, v_lines);
                _tile_zero(0);
            } else
                _tile_loadd(0, score + b * KEYS, PART * 4);
            _tile_loadd(6, at, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (both) {
                _tile_loadd(7, at + KEYS * DEEP, 64);
                _tile_dpbf16ps(0, 5, 7);
            }
            _tile_stored(0, score + b * KEYS, PART * 4);
        }
    }
}

/* Values as right factors: 32 columns of DEEP of them (those from `held` on are nought) to two tiles. Their
   columns are mixed as values() has them. */
static inline void pair_up(const bf16 *v, int64_t stride, int held, __m512i *low, __m512i *high) {
    const __m512i none = _mm512_setzero_si512();
    for (int i = 0; i < DEEP; i += 2) {
        __m512i a = i < held ? _mm512_loadu_si512(v + i * stride) : none;
        __m512i b = i + 1 < held ? _mm512_loadu_si512(v + (i + 1) * stride) : none;
        low[i / 2] = _mm512_unpacklo_epi16(a, b);
        high[i / 2] = _mm512_unpackhi_epi16(a, b);
    }
}

/* Tile `a` and tile `b` of sums, of `height` rows, to 32 columns of out. */
#define UNMIX(a, b, out)                                                                           \
    _tile_stored(a, sum[0], 64);                                                                   \
    _tile_stored(b, sum[1], 64);                                                                   \
    for (int r = 0; r < height; r++) unmix(sum[0][r], sum[1][r], (out) + r * dim);

/* Weighted sums of 64 columns of values, or 32. `pair` has room for their tiles, and has them already
   unless `fresh`; then `lines` of what is next are fetched for every DEEP values. */
static inline void tile_values(int height, int held, const bf16 *v, int64_t stride, int dim,
                               int columns, const bf16 *weight, float *out, __m512i *pair, int fresh,
                               const char *next, int lines) {
    __m512 sum[2][SIDE];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < held; i += DEEP, pair += 4 * SIDE) {
        if (fresh) {
            next = fetch(next, lines);
            pair_up(v + i * stride, stride, held - i, pair, pair + SIDE);
            if (columns > 32)
                pair_up(v + i * stride + 32, stride, held - i, pair + 2 * SIDE, pair + 3 * SIDE);
        }
        _tile_loadd(4, weight + i, PART * 2);
        _tile_loadd(6, pair, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, pair + SIDE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (columns > 32) {
            _tile_loadd(6, pair + 2 * SIDE, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, pair + 3 * SIDE, 64);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    UNMIX(0, 1, out)
    if (columns > 32) {
        UNMIX(2, 3, out + 32)
    }
}

/* As part(), below. Rows are cut into equally high tiles, the last of which may reach back over rows of
   the one before it: those come out twice, alike. */
static void tile_part(const bf16 *q, const bf16 *k, const bf16 *v, int64_t k_stride, int64_t v_stride,
                      int rows, int queries, int dim, int64_t start, int64_t packed, int64_t from,
                      const bf16 *next_k, const bf16 *next_v, float *most, float *total, float *out) {
    int64_t entries = start + queries - from;
    int held = (int)(entries < PART ? entries : PART), pairs = dim / 2;
    int tiles = tiles_of(rows), height = side_of(rows);
    int blocks = (held + KEYS - 1) / KEYS;
    _Alignas(64) float score[MOST_ROWS * PART];
    _Alignas(64) bf16 weight[MOST_ROWS * PART];
    __m512i pair[PART / KEYS * MOST_DIM / 2];

    /* An even pace again: three quarters of the next keys go with the values of this part, the others
       and what of the next values does not go with its weights go with its scores. */
    int lines = PART * dim / 32, groups = (dim + 63) / 64, in_weights = smaller(rows * PART / 16, lines);
    int k_lines = lines * KEYS / PART / 4, v_lines = (lines - in_weights) * KEYS / PART;
    int lines_of_group = (lines - k_lines * PART / KEYS) / groups;
    const char *fetch_k = (const char *)next_k, *fetch_v = (const char *)next_v;
    const bf16 *keys = k;
    int64_t known = packed - from;
    if (known < held) { /* packed, as far as they are not */
        keys = (const bf16 *)pair;
        for (int b = 0; b < blocks; b++) {
            __m512i *to = pair + b * pairs;
            const __m512i *found = pairs_of(k + b * KEYS * k_stride, k_stride, held - b * KEYS,
                                            b * KEYS < known, dim, to);
            if (found != to) memcpy(to, found, KEYS * dim * sizeof(bf16));
        }
    }
    for (int t = 0; t < tiles; t++) {
        int begin = smaller(t * height, rows - height);
        tile_scores(q + begin * dim, dim, keys, blocks, score + begin * PART, fetch_k,
                    t ? 0 : k_lines, fetch_v, t ? 0 : v_lines);
    }
    fetch_k += 64 * k_lines * PART / KEYS, fetch_v += 64 * v_lines * PART / KEYS;
    weights_of_part(score, rows, queries, start, from, held, weight, most, total, next_v, fetch_v, lines);
    for (int d = 0; d < dim; d += 64, fetch_k += 64 * lines_of_group)
        for (int t = 0; t < tiles; t++) {
            int begin = smaller(t * height, rows - height);
            tile_values(height, held, v + d, v_stride, dim, smaller(dim - d, 64),
                        weight + begin * PART, out + begin * dim + d, pair, !t, fetch_k,
                        lines_of_group * DEEP / PART);
        }
}

/* One part: for each row its largest score, its sum of weights and its weighted sum of values. next_k
   and next_v: where the next part lies. */
static void part(const bf16 *q, const bf16 *k, const bf16 *v, int64_t k_stride, int64_t v_stride,
                 int rows, int queries, int dim, int64_t start, int64_t packed, int64_t from,
                 const bf16 *next_k, const bf16 *next_v, float *most, float *total, float *out) {
    int64_t entries = start + queries - from; /* seen by the last query */
    int held = (int)(entries < PART ? entries : PART), pairs = dim / 2, tiles = (rows + TILE - 1) / TILE;
    float score[MOST_ROWS * PART];
    bf16 weight[MOST_ROWS * PART];
    __m512i transposed[MOST_DIM / 2];
    int begin[MOST_ROWS / TILE + 2];
    for (int t = 0; t <= tiles; t++) begin[t] = t * rows / tiles;

    /* A line of keys for each step of values(), one of values for each step of weights(), and what that
       leaves of the part evenly before. Many rows have more steps than there are lines: they begin
       again, at lines that are there already. */
    int lines = PART * dim / 32, in_values = smaller(tiles * (dim / 32) * PART / 2, lines);
    int in_weights = smaller(rows * PART / 16, lines);
    const char *fetch_k = (const char *)next_k, *fetch_v = (const char *)next_v;
    const char *rest_k = fetch_k + 64 * in_values, *rest_v = fetch_v + 64 * in_weights;
    int blocks = PART / KEYS, rest = (lines - in_values + blocks - 1) / blocks;
    int others = (lines - in_weights + blocks - 1) / blocks;

    for (int i = 0; i < held; i += KEYS) {
        const __m512i *pair = pairs_of(k + i * k_stride, k_stride, held - i, from + i < packed, dim,
                                       transposed);
        rest_k = fetch(rest_k, rest);
        rest_v = fetch(rest_v, others);
        for (int t = 0; t < tiles; t++)
            scores(begin[t + 1] - begin[t], pairs, pair, (const int32_t *)q + begin[t] * pairs,
                   score + begin[t] * PART + i);
    }
    weights_of_part(score, rows, queries, start, from, held, weight, most, total, next_v, fetch_v, lines);
    for (int d = 0; d < dim; d += 32)
        for (int t = 0; t < tiles; t++) {
            values(begin[t + 1] - begin[t], held + (held & 1), held, v + d, v_stride, dim,
                   weight + begin[t] * PART, out + begin[t] * dim + d, fetch_k);
            fetch_k += 64 * (PART / 2);
            if (fetch_k >= (const char *)next_k + 64 * lines) fetch_k = (const char *)next_k;
        }
}

/* Whether this CPU has the instructions. */
int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

/* Whether there is AMX to be used from now on: 1 if it is wanted, the CPU has it and Linux lets us. */
int use_tiles(int wanted) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    tiles_used = wanted && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                 !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
    return tiles_used;
}

/* Where a part lies: parts of a head, heads of a batch, in this order. */
static inline const bf16 *place(const bf16 *x, const int64_t *stride, int64_t unit, int64_t parts,
                                int64_t heads) {
    int64_t head = unit / parts;
    return x + head / heads * stride[0] + head % heads * stride[1] + unit % parts * PART * stride[2];
}

/* Floats of `room` that attend() needs. */
int64_t attend_room(int64_t heads, int rows, int dim, int64_t entries) {
    return heads * ((entries + PART - 1) / PART) * rows * (dim + 2);
}

/* q [batch, heads, rows, dim] and out alike, dense; k, v [batch, heads, entries, dim] by strides in
   elements: of a batch, a head, an entry. `start`: entries before the first query. The first `packed` of
   them have keys that went through pack(). */
void attend(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *room, int64_t batch,
            int64_t heads, int rows, int queries, int dim, int64_t start, int64_t packed,
            const int64_t *stride, int threads) {
    int64_t parts = (start + queries + PART - 1) / PART, all = batch * heads;
    float *most = room, *total = most + all * parts * rows, *sums = total + all * parts * rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (tiles_used) shape_tiles(side_of(rows), SIDE);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < all * parts; unit++) {
            int64_t next = unit + 1 < all * parts ? unit + 1 : unit;
            (tiles_used ? tile_part : part)(q + unit / parts * rows * dim, place(k, stride, unit, parts, heads),
                 place(v, stride + 3, unit, parts, heads), stride[2], stride[5], rows, queries, dim,
                 start, packed, unit % parts * PART, place(k, stride, next, parts, heads),
                 place(v, stride + 3, next, parts, heads), most + unit * rows, total + unit * rows,
                 sums + unit * rows * dim);
        }
        if (tiles_used) _tile_release();
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
                narrow16(out + row * dim + d, mean);
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
            int64_t packed, const int64_t *stride, int threads) {
    int64_t group = rows / queries, head = (int64_t)queries * dim;
    const int64_t dense[3] = {heads * group * head, head, dim};
    bf16 *together = (bf16 *)room;
    copy(q, stride + 6, together, dense, batch, heads * group, queries, dim);
    copy(new_k, stride + 9, k + start * stride[2], stride, batch, heads, queries, dim);
    copy(new_v, stride + 12, v + start * stride[5], stride + 3, batch, heads, queries, dim);
    attend(together, k, v, out, room + (batch * heads * rows * dim + 1) / 2, batch, heads, rows,
           queries, dim, start, packed, stride, threads);
}

/* Keys as scores() reads them, where they lie: KEYS of them become one block of pairs. k [heads, ...,
   dim], a head every `stride` numbers, its entries side by side; those from `first` to `last`, multiples
   of KEYS. A cache's old keys are transposed once and not in every step. */
void pack(bf16 *k, int64_t heads, int64_t stride, int64_t first, int64_t last, int dim, int threads) {
    int64_t blocks = (last - first) / KEYS;
#pragma omp parallel for num_threads(threads) if (threads > 1 && heads * blocks > 256)
    for (int64_t i = 0; i < heads * blocks; i++) {
        bf16 *block = k + i / blocks * stride + (first + i % blocks * KEYS) * dim;
        __m512i pair[MOST_DIM / 2];
        transpose(block, dim, dim / 2, pair);
        memcpy(block, pair, KEYS * dim * sizeof(bf16));
    }
}

/* The first `entries` (a multiple of KEYS) of packed keys as they were: out [heads, entries, dim]. */
void unpack(const bf16 *k, bf16 *out, int64_t heads, int64_t stride, int64_t entries, int dim,
            int threads) {
    int64_t blocks = entries / KEYS, pairs = dim / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < heads * blocks; i++) {
        const int32_t *block = (const int32_t *)(k + i / blocks * stride + i % blocks * KEYS * dim);
        int32_t *to = (int32_t *)(out + i * KEYS * dim);
        for (int64_t j = 0; j < KEYS; j++)
            for (int64_t p = 0; p < pairs; p++) to[j * pairs + p] = block[p * KEYS + j];
    }
}
