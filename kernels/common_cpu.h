/* What both C files need, on CPUs with AVX512-BF16 and, if they have it, AMX. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static const float LOG2E = 1.44269504f; /* exp(x) is 2 ** (LOG2E x) */

/* 2 ** x, to 3e-6 of it: bfloat16 keeps 4e-3. */
static inline __m512 power(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x - floor(x) */
    __m512 y = _mm512_set1_ps(0.013534074f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.052011442f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.24144293f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.69300375f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(y, x); /* y times 2 ** floor(x) */
}

static inline void narrow16(bf16 *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* ---- AMX: products of whole tiles. A left factor has SIDE rows at most of DEEP numbers, a right factor
   DEEP / 2 rows of pairs of numbers of SIDE columns at most. */
enum { SIDE = 16, DEEP = 32 };

extern int tiles_used; /* whether they are to be used; see use_tiles() */

/* Equal tiles for `rows`: how many, and how high. */
static inline int tiles_of(int rows) { return (rows + SIDE - 1) / SIDE; }
static inline int side_of(int rows) { return (rows + tiles_of(rows) - 1) / tiles_of(rows); }

/* Tiles 0 to 3 are sums, 4 and 5 left factors, 6 and 7 right factors, for sums of `rows` by `columns`. */
static inline void shape_tiles(int rows, int columns) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.rows[i] = i < 6 ? rows : SIDE;
        shape.bytes[i] = i == 4 || i == 5 ? 2 * DEEP : 4 * columns;
    }
    _tile_loadconfig(&shape);
}
