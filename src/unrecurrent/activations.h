/* The exponential and what is made of it, in a form that compilers vectorize. Not to be reassociated: the reduction of
   the exponential's argument depends on the order of its operations. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x by 2^n e^r, |r| <= ln 2 / 2, and seven terms of the series of e^r, which leave 6e-9 of it. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    float n = rintf(x * 1.44269504f);
    /* ln 2 in two parts, the first of which has so few digits that its product with n is exact. */
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    int32_t bits = ((int32_t)(n == n ? n : 0) + 127) << 23; /* NaN is no whole number; it stays in the series */
    float power;
    memcpy(&power, &bits, sizeof power);
    return series * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* Near 0, where 1 - e^-2|x| would lose digits, by the series of tanh up to x^11. */
static inline float hyperbolic_tangent(float x) {
    float square = x * x, small = -1382.0f / 155925;
    small = small * square + 62.0f / 2835;
    small = small * square - 17.0f / 315;
    small = small * square + 2.0f / 15;
    small = small * square - 1.0f / 3;
    small = x + x * square * small;
    float e = exponential(-2.0f * fabsf(x)), large = copysignf((1.0f - e) / (1.0f + e), x);
    return square < 0.09f ? small : large;
}
