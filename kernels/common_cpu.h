/* What both C files need, on CPUs with AVX512-BF16. */
#include <immintrin.h>
#include <stdint.h>

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
