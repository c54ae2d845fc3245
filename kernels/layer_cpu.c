/* What a decoding step does beside attention, for a few tokens, on CPUs with AVX512-BF16: the two halves
   of a layer around its attention, and products of normed states (a head, a drafter's inputs).

   A decoding step reads every weight once and does little with it, so it takes as long as the weights
   take to arrive, if nothing else is in the way. Here nothing is: one parallel region a half, no
   intermediate result leaves the caches, and weights are read in the order in which they lie.

   Every output of a product is summed over its weights in one order, whatever rows are beside it and
   whoever computes it: a verified row is bit for bit the row of a plain step. Results are rounded to
   bfloat16 where a product in PyTorch would round them; the residual stream is float32.

   A drafter's matrices lie in 8 bits where they were stored so: whole numbers from -127 to 127, which
   bfloat16 holds exactly, and a scale for each output. `scale` NULL stands for weights in bfloat16.

   With AMX, GROUP rows of weights are a left factor as they lie, and inputs are kept in pairs, as right
   factors: sixteen rows of them take about the time of one. Its sums have another order than those of
   AVX512, the same in every call. Matrices in 8 bits are left to AVX512: a drafter computes one row at a
   time. */
#include <math.h>
#include <omp.h>

#include "common_cpu.h"

enum { ROWS = 8, GROUP = 16, AHEAD = 8192, AHEAD_IN = 256 };

static inline __m512 wide16(const bf16 *x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

static inline float rounded(float x) { /* to bfloat16 and back; x is a number */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    memcpy(&x, &bits, 4);
    return x;
}

static inline __m512 rounded16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

/* Sums of a row of weights with n rows of inputs. Memory is kept busy by asking for what lies AHEAD
   bytes further on: with the processor's own guesses alone it delivers half as much. */
#define SUMS(n)                                                                                    \
    case n: {                                                                                      \
        __m512 sum[n];                                                                             \
        for (int r = 0; r < n; r++) sum[r] = _mm512_setzero_ps();                                  \
        for (int64_t i = 0; i < in; i += 32) {                                                     \
            FETCH(w + i);                                                                          \
            __m512bh a = WEIGHTS(w + i);                                                           \
            for (int r = 0; r < n; r++)                                                            \
                sum[r] = _mm512_dpbf16_ps(sum[r], a, (__m512bh)_mm512_loadu_si512(x + r * in + i)); \
        }                                                                                          \
        for (int r = 0; r < n; r++) y[r * GROUP] = rounded(scale * _mm512_reduce_add_ps(sum[r]));  \
        break;                                                                                     \
    }
#define EACH SUMS(1) SUMS(2) SUMS(3) SUMS(4) SUMS(5) SUMS(6) SUMS(7) SUMS(8)

#define FETCH(at) _mm_prefetch((const char *)(at) + AHEAD, _MM_HINT_T1)
#define WEIGHTS(at) (__m512bh)_mm512_loadu_si512(at)
static inline void sums(int n, int64_t in, const bf16 *w, const bf16 *x, float *y) {
    const float scale = 1;
    switch (n) { EACH }
}
#undef FETCH
#undef WEIGHTS

static inline __m512bh of_codes(const int8_t *w) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(w + 16))));
    return _mm512_cvtne2ps_pbh(high, low);
}

#define FETCH(at)                                                                                  \
    if (!(i & 32)) _mm_prefetch((const char *)(at) + AHEAD, _MM_HINT_T1)
#define WEIGHTS(at) of_codes(at)
static inline void sums_of_codes(int n, int64_t in, const int8_t *w, float scale, const bf16 *x,
                                 float *y) {
    switch (n) { EACH }
}

/* How inputs of a product lie: row after row, or, for tiles (`side` rows to each), as right factors: pair
   p of all rows of a tile side by side. */
typedef struct {
    int64_t in;
    int side; /* 0: row after row */
} lay;

static inline lay lay_for(const float *scale, int64_t in, int rows) {
    return (lay){in, tiles_used && !scale ? side_of(rows) : 0};
}

/* Numbers i to i + 15 of row r. */
static inline void put16(lay l, bf16 *x, int r, int64_t i, __m256i numbers) {
    if (l.side < 2)
        _mm256_storeu_si256((__m256i *)(x + r * l.in + i), numbers);
    else {
        int32_t *at = (int32_t *)(x + r / l.side * l.side * l.in) + i / 2 * l.side + r % l.side;
        __m256i steps = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                           _mm256_set1_epi32(l.side));
        _mm256_i32scatter_epi32(at, steps, numbers, 4);
    }
}

/* A matrix: its weights and scales, row after row. */
typedef struct {
    const void *w;
    const float *scale;
} matrix;

/* The left factor AHEAD_IN inputs further on, to the nearest cache; from a group's end on that is the
   beginning of the group `next`, which is computed next and has rows of `next_in`. */
static inline void fetch_ahead(const bf16 *w, int64_t in, int64_t i, const bf16 *next, int64_t next_in) {
    i += AHEAD_IN;
    if (i >= in) {
        i -= in;
        if (!next) return;
        w = next, in = next_in;
    }
    for (int r = 0; r < GROUP; r++) _mm_prefetch((const char *)(w + r * in + i), _MM_HINT_T0);
}

/* As product(), below, with weights as left factors as they lie. */
static void tile_product(const bf16 *w, lay l, const bf16 *x, int rows, float *y, const bf16 *next,
                         int64_t next_in) {
    for (int r = 0; r < rows; r += l.side, x += l.side * l.in) {
        _Alignas(64) float sum[2][SIDE * GROUP];
        const int32_t *pairs = (const int32_t *)x;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t i = 0; i < l.in; i += 2 * DEEP) { /* two sums, for they wait for themselves */
            if (!r) fetch_ahead(w, l.in, i, next, next_in);
            _tile_loadd(4, w + i, l.in * 2);
            _tile_loadd(6, pairs + i / 2 * l.side, l.side * 4);
            _tile_dpbf16ps(0, 4, 6);
            if (i + DEEP == l.in) break;
            if (!r) fetch_ahead(w, l.in, i + DEEP, next, next_in);
            _tile_loadd(5, w + i + DEEP, l.in * 2);
            _tile_loadd(7, pairs + (i + DEEP) / 2 * l.side, l.side * 4);
            _tile_dpbf16ps(1, 5, 7);
        }
        _tile_stored(0, sum[0], l.side * 4);
        _tile_stored(1, sum[1], l.side * 4);
        int there = rows - r < l.side ? rows - r : l.side;
        __m512i at = _mm512_mullo_epi32(
            _mm512_set1_epi32(l.side),
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        for (int j = 0; j < there; j++) {
            __m512 both = _mm512_add_ps(_mm512_i32gather_ps(at, sum[0] + j, 4),
                                        _mm512_i32gather_ps(at, sum[1] + j, 4));
            _mm512_storeu_ps(y + (r + j) * GROUP, rounded16(both));
        }
    }
}

/* GROUP outputs of x w^T from the `first` on; y [rows, GROUP], as bfloat16 would hold it. With tiles,
   what is `next` is fetched meanwhile. */
static void product(matrix m, lay l, int64_t first, const bf16 *x, int rows, float *y, const bf16 *next,
                    int64_t next_in) {
    int64_t in = l.in;
    if (l.side) {
        tile_product((const bf16 *)m.w + first * in, l, x, rows, y, next, next_in);
        return;
    }
    for (int o = 0; o < GROUP; o++)
        for (int r = 0; r < rows; r += ROWS) {
            int n = rows - r < ROWS ? rows - r : ROWS;
            int64_t at = (first + o) * in;
            if (m.scale)
                sums_of_codes(n, in, (const int8_t *)m.w + at, m.scale[first + o], x + r * in,
                              y + r * GROUP + o);
            else
                sums(n, in, (const bf16 *)m.w + at, x + r * in, y + r * GROUP + o);
        }
}

/* The groups of outputs that this thread makes: its first, and the one after its last. */
static inline void share(int64_t groups, int64_t *first, int64_t *end) {
    int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    *first = groups * thread / threads, *end = groups * (thread + 1) / threads;
}

static inline const bf16 *group_of(matrix m, int64_t in, int64_t g) {
    return (const bf16 *)m.w + g * GROUP * in;
}

/* The first group of a thread, to be fetched while it still computes something else. */
static inline const bf16 *first_group(matrix m, int64_t in, int64_t outputs) {
    int64_t first, end;
    share(outputs / GROUP, &first, &end);
    return group_of(m, in, first);
}

/* Outputs x w^T of a thread, [rows, GROUP] at a time: y is made anew for each g. What comes after the last
   is `next`, NULL or a group of `next_in` inputs. */
#define EACH_GROUP(m, l, x, outputs, next, next_in, y, ...)                                        \
    {                                                                                              \
        int64_t g, end;                                                                            \
        share((outputs) / GROUP, &g, &end);                                                        \
        for (; g < end; g++) {                                                                     \
            float y[rows * GROUP];                                                                 \
            int last = g + 1 == end;                                                               \
            product(m, l, g * GROUP, x, rows, y, last ? next : group_of(m, (l).in, g + 1),         \
                    last ? next_in : (l).in);                                                      \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    }

/* RMS norm of a row's part of `width` numbers from `at` on. */
static void norm(const float *x, const float *weight, int64_t width, float eps, lay l, bf16 *to, int r,
                 int64_t at) {
    __m512 square = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        square = _mm512_fmadd_ps(v, v, square);
    }
    float mean = _mm512_reduce_add_ps(square) / (float)width;
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        v = _mm512_mul_ps(v, _mm512_loadu_ps(weight + i));
        put16(l, to, r, at + i, (__m256i)_mm512_cvtneps_pbh(v));
    }
}

/* GROUP outputs y of each row added to those from `first` on of a residual stream x [rows, width]. */
static inline void add(const float *y, int rows, const float *x, int64_t width, int64_t first,
                       float *out) {
    for (int r = 0; r < rows; r++) {
        int64_t at = r * width + first;
        __m512 sum = _mm512_add_ps(_mm512_loadu_ps(x + at), _mm512_loadu_ps(y + r * GROUP));
        _mm512_storeu_ps(out + at, sum);
    }
}

/* Rows that inputs have room for: with tiles, equally many in each. */
static inline int64_t padded(int64_t rows) { return tiles_of(rows) * side_of(rows); }

/* Floats of `room` that normed_product() needs for inputs [rows, in], and before() and after() for those
   of a layer. */
int64_t product_room(int rows, int64_t in) { return padded(rows) * in / 2; }

int64_t layer_room(int rows, int64_t width, int64_t attended, int64_t inner) {
    return rows * width + product_room(rows, width + attended + inner);
}

/* Norm of `groups` parts of a row, each for itself, and a product of all of them: x [rows, groups,
   width] with weight [groups, width] and w [outputs, groups width] to out [rows, outputs]. */
void normed_product(const float *x, const float *weight, const void *w, const float *scale,
                    float *out, float *room, int rows, int groups, int64_t width, int64_t outputs,
                    float eps, int threads) {
    bf16 *normed = (bf16 *)room;
    matrix m = {w, scale};
    lay l = lay_for(scale, groups * width, rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (l.side) shape_tiles(SIDE, l.side);
#pragma omp for schedule(static)
        for (int i = 0; i < rows * groups; i++)
            norm(x + i * width, weight + i % groups * width, width, eps, l, normed, i / groups,
                 i % groups * width);
        EACH_GROUP(m, l, normed, outputs, NULL, 0, y, {
            for (int r = 0; r < rows; r++)
                memcpy(out + r * outputs + g * GROUP, y + r * GROUP, GROUP * sizeof(float));
        })
        if (l.side) _tile_release();
    }
}

/* Norm, product and rotation: x [rows, width] to out [rows, heads, dim]. Row r has position
   r % queries; its numbers are multiplied by cosine, those half a head away by sine, both
   [queries, heads, dim]. */
void before(const float *x, const float *weight, const void *w, const float *scale,
            const float *cosine, const float *sine, bf16 *out, float *room, int rows, int queries,
            int64_t width, int heads, int dim, float eps, int threads) {
    bf16 *normed = (bf16 *)room;
    int64_t outputs = (int64_t)heads * dim;
    matrix m = {w, scale};
    lay l = lay_for(scale, width, rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (l.side) shape_tiles(SIDE, l.side);
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) norm(x + r * width, weight, width, eps, l, normed, r, 0);
        EACH_GROUP(m, l, normed, outputs, NULL, 0, y, {
            for (int r = 0; r < rows; r++)
                narrow16(out + r * outputs + g * GROUP, _mm512_loadu_ps(y + r * GROUP));
        })
        if (l.side) _tile_release();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int i = 0; i < rows * heads; i++) {
            bf16 *head = out + (int64_t)i * dim;
            int64_t at = ((int64_t)(i / heads % queries) * heads + i % heads) * dim;
            float turned[dim];
            for (int d = 0; d < dim; d += 16) {
                __m512 rolled = wide16(head + (d < dim / 2 ? d + dim / 2 : d - dim / 2));
                __m512 y = _mm512_mul_ps(wide16(head + d), _mm512_loadu_ps(cosine + at + d));
                y = _mm512_fmadd_ps(rolled, _mm512_loadu_ps(sine + at + d), y);
                _mm512_storeu_ps(turned + d, y);
            }
            for (int d = 0; d < dim; d += 16) narrow16(head + d, _mm512_loadu_ps(turned + d));
        }
    }
}

/* What attention found, [batch, heads, queries, dim] by strides in elements (of a batch, a head, a
   query), through the output product onto x [rows, width], then the MLP onto that: out [rows, width].
   w_in holds the gate's rows, then the others; s_...: scales. */
void after(const float *x, const bf16 *attended, const int64_t *stride, const void *w_out,
           const float *s_out, const float *weight, const void *w_in, const float *s_in,
           const void *w_down, const float *s_down, float *out, float *room, int rows, int queries,
           int64_t width, int heads, int dim, int64_t inner, float eps, int threads) {
    int64_t found_width = (int64_t)heads * dim;
    float *middle = room;
    bf16 *normed = (bf16 *)(middle + rows * width), *found = normed + padded(rows) * width;
    bf16 *active = found + padded(rows) * found_width;
    matrix m_out = {w_out, s_out}, m_in = {w_in, s_in}, m_down = {w_down, s_down};
    lay l_out = lay_for(s_out, found_width, rows), l_in = lay_for(s_in, width, rows);
    lay l_down = lay_for(s_down, inner, rows);
    int side = l_out.side | l_in.side | l_down.side; /* the same, or none */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (side) shape_tiles(SIDE, side);
#pragma omp for schedule(static)
        for (int i = 0; i < rows * heads; i++) {
            int r = i / heads, h = i % heads;
            const bf16 *head = attended + r / queries * stride[0] + h * stride[1] + r % queries * stride[2];
            for (int d = 0; d < dim; d += 16)
                put16(l_out, found, r, h * dim + d, _mm256_loadu_si256((const __m256i *)(head + d)));
        }
        EACH_GROUP(m_out, l_out, found, width, first_group(m_in, width, inner), width, y,
                   add(y, rows, x, width, g * GROUP, middle);)
#pragma omp barrier
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++)
            norm(middle + r * width, weight, width, eps, l_in, normed, r, 0);
        EACH_GROUP(m_in, l_in, normed, inner, NULL, 0, gate, {
            float up[rows * GROUP];
            const bf16 *next = last ? first_group(m_down, inner, width)
                                    : group_of(m_in, width, inner / GROUP + g + 1);
            product(m_in, l_in, inner + g * GROUP, normed, rows, up, next, last ? inner : width);
            for (int r = 0; r < rows; r++) {
                __m512 a = _mm512_loadu_ps(gate + r * GROUP), one = _mm512_set1_ps(1.0f);
                __m512 e = power(_mm512_mul_ps(a, _mm512_set1_ps(-LOG2E))); /* exp(-a) */
                a = rounded16(_mm512_div_ps(a, _mm512_add_ps(one, e))); /* a / (1 + exp(-a)) */
                a = _mm512_mul_ps(a, _mm512_loadu_ps(up + r * GROUP));
                put16(l_down, active, r, g * GROUP, (__m256i)_mm512_cvtneps_pbh(a));
            }
        })
#pragma omp barrier
        EACH_GROUP(m_down, l_down, active, width, NULL, 0, y, add(y, rows, middle, width, g * GROUP, out);)
        if (side) _tile_release();
    }
}
