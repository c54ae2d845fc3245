/* What a decoding step does beside attention, for a few tokens, on CPUs with AVX512-BF16: the two halves
   of a layer around its attention, and products of normed states (a head, a drafter's inputs).

   A decoding step reads every weight once and does little with it, so it takes as long as the weights
   take to arrive, if nothing else is in the way. Here nothing is: one parallel region a half, no
   intermediate result leaves the caches, and weights are read in the order in which they lie.

   Every output of a product is one sum over its weights in one order, whatever rows are beside it and
   whoever computes it: a verified row is bit for bit the row of a plain step. Results are rounded to
   bfloat16 where a product in PyTorch would round them; the residual stream is float32.

   A drafter's matrices lie in 8 bits where they were stored so: whole numbers from -127 to 127, which
   bfloat16 holds exactly, and a scale for each output. `scale` NULL stands for weights in bfloat16. */
#include <math.h>
#include <string.h>

#include "common_cpu.h"

enum { ROWS = 8, GROUP = 16, AHEAD = 8192 };

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

/* GROUP outputs of x w^T from the `first` on; y [rows, GROUP], as bfloat16 would hold it. */
static void product(const void *w, const float *scale, int64_t in, int64_t first, const bf16 *x,
                    int rows, float *y) {
    for (int o = 0; o < GROUP; o++)
        for (int r = 0; r < rows; r += ROWS) {
            int n = rows - r < ROWS ? rows - r : ROWS;
            int64_t at = (first + o) * in;
            if (scale)
                sums_of_codes(n, in, (const int8_t *)w + at, scale[first + o], x + r * in,
                              y + r * GROUP + o);
            else
                sums(n, in, (const bf16 *)w + at, x + r * in, y + r * GROUP + o);
        }
}

/* The same outputs added to a residual stream: x [rows, width] to out. */
static void added(const void *w, const float *scale, int64_t in, int64_t first, const bf16 *inputs,
                  int rows, const float *x, int64_t width, float *out) {
    float y[rows * GROUP];
    product(w, scale, in, first, inputs, rows, y);
    for (int r = 0; r < rows; r++) {
        int64_t at = r * width + first;
        __m512 sum = _mm512_add_ps(_mm512_loadu_ps(x + at), _mm512_loadu_ps(y + r * GROUP));
        _mm512_storeu_ps(out + at, sum);
    }
}

/* RMS norm of a row, as bfloat16. */
static void norm(const float *x, const float *weight, int64_t width, float eps, bf16 *to) {
    __m512 square = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        square = _mm512_fmadd_ps(v, v, square);
    }
    float mean = _mm512_reduce_add_ps(square) / (float)width;
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        narrow16(to + i, _mm512_mul_ps(v, _mm512_loadu_ps(weight + i)));
    }
}

/* Norm of `groups` parts of a row, each for itself, and a product of all of them: x [rows, groups,
   width] with weight [groups, width] and w [outputs, groups width] to out [rows, outputs]. `room`:
   rows groups width / 2 floats. */
void normed_product(const float *x, const float *weight, const void *w, const float *scale,
                    float *out, float *room, int rows, int groups, int64_t width, int64_t outputs,
                    float eps, int threads) {
    bf16 *normed = (bf16 *)room;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int i = 0; i < rows * groups; i++)
            norm(x + i * width, weight + i % groups * width, width, eps, normed + i * width);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < outputs / GROUP; g++) {
            float y[rows * GROUP];
            product(w, scale, groups * width, g * GROUP, normed, rows, y);
            for (int r = 0; r < rows; r++)
                memcpy(out + r * outputs + g * GROUP, y + r * GROUP, GROUP * sizeof(float));
        }
    }
}

/* Floats of `room` that before() and after() need. */
int64_t layer_room(int rows, int64_t width, int64_t attended, int64_t inner) {
    return rows * (width + width / 2 + attended / 2 + inner / 2);
}

/* Norm, product and rotation: x [rows, width] to out [rows, heads, dim]. Row r has position
   r % queries; its numbers are multiplied by cosine, those half a head away by sine, both
   [queries, heads, dim]. */
void before(const float *x, const float *weight, const void *w, const float *scale,
            const float *cosine, const float *sine, bf16 *out, float *room, int rows, int queries,
            int64_t width, int heads, int dim, float eps, int threads) {
    bf16 *normed = (bf16 *)room;
    int64_t outputs = (int64_t)heads * dim;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++)
            norm(x + r * width, weight, width, eps, normed + r * width);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < outputs / GROUP; g++) {
            float y[rows * GROUP];
            product(w, scale, width, g * GROUP, normed, rows, y);
            for (int r = 0; r < rows; r++)
                narrow16(out + r * outputs + g * GROUP, _mm512_loadu_ps(y + r * GROUP));
        }
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
    float *middle = room;
    int64_t found_width = (int64_t)heads * dim;
    bf16 *normed = (bf16 *)(middle + rows * width), *found = normed + rows * width;
    bf16 *active = found + rows * found_width;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int i = 0; i < rows * heads; i++) {
            int r = i / heads, h = i % heads;
            memcpy(found + (int64_t)i * dim,
                   attended + r / queries * stride[0] + h * stride[1] + r % queries * stride[2],
                   dim * sizeof(bf16));
        }
#pragma omp for schedule(static)
        for (int64_t g = 0; g < width / GROUP; g++)
            added(w_out, s_out, found_width, g * GROUP, found, rows, x, width, middle);
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++)
            norm(middle + r * width, weight, width, eps, normed + r * width);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < inner / GROUP; g++) {
            float gate[rows * GROUP], up[rows * GROUP];
            product(w_in, s_in, width, g * GROUP, normed, rows, gate);
            product(w_in, s_in, width, inner + g * GROUP, normed, rows, up);
            for (int r = 0; r < rows; r++) {
                __m512 a = _mm512_loadu_ps(gate + r * GROUP), one = _mm512_set1_ps(1.0f);
                __m512 e = power(_mm512_mul_ps(a, _mm512_set1_ps(-LOG2E))); /* exp(-a) */
                a = rounded16(_mm512_div_ps(a, _mm512_add_ps(one, e))); /* a / (1 + exp(-a)) */
                narrow16(active + r * inner + g * GROUP,
                         _mm512_mul_ps(a, _mm512_loadu_ps(up + r * GROUP)));
            }
        }
#pragma omp for schedule(static)
        for (int64_t g = 0; g < width / GROUP; g++)
            added(w_down, s_down, inner, g * GROUP, active, rows, middle, width, out);
    }
}
