/* The element-wise part of one step of a recurrent layer in one pass over its numbers: of `StableLSTM`, forward and
   backward (plain loops: `_gates_reference` and `_slopes_reference` in stable_lstm.py), and of torch's layers (plain
   loops: those of `LoopEngine` in engines.py, and torch's LSTM itself). Compiled without reassociation: the reduction
   of the exponential's argument depends on the order of its operations. */
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
    int32_t bits = ((int32_t)n + 127) << 23;
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

/* raw (batch, 3 size) pre-activations of f, z, o; ceiling (size,); cell_before (batch, size). Written are gates
   (batch, 3 size), cell, squashed = tanh(cell) and output (batch, size). */
void gates(int batch, int size, const float *restrict raw, const float *restrict ceiling,
           const float *restrict cell_before, float *restrict gates, float *restrict squashed, float *restrict output,
           float *restrict cell) {
    for (int b = 0; b < batch; b++) {
        const float *a = raw + (int64_t)b * 3 * size;
        float *g = gates + (int64_t)b * 3 * size;
        int64_t row = (int64_t)b * size;
        for (int j = 0; j < size; j++) {
            float f = ceiling[j] * sigmoid(a[j]), z = hyperbolic_tangent(a[size + j]), o = sigmoid(a[2 * size + j]);
            float c = f * cell_before[row + j] + (1 - f) * z, t = hyperbolic_tangent(c);
            g[j] = f, g[size + j] = z, g[2 * size + j] = o;
            cell[row + j] = c, squashed[row + j] = t, output[row + j] = o * t;
        }
    }
}

/* d_output (batch, size) is the slope of the loss in the output, d_cell (batch, size) that in the cell, which becomes
   that in the cell before; written are those in the pre-activations, d_raw (batch, 3 size). */
void slopes(int batch, int size, const float *restrict d_output, const float *restrict gates,
            const float *restrict squashed, const float *restrict cell_before, const float *restrict ceiling,
            float *restrict d_cell, float *restrict d_raw) {
    for (int b = 0; b < batch; b++) {
        const float *g = gates + (int64_t)b * 3 * size;
        float *d = d_raw + (int64_t)b * 3 * size;
        int64_t row = (int64_t)b * size;
        for (int j = 0; j < size; j++) {
            float f = g[j], z = g[size + j], o = g[2 * size + j], t = squashed[row + j], dh = d_output[row + j];
            float dc = d_cell[row + j] + dh * o * (1 - t * t);
            d[j] = dc * (cell_before[row + j] - z) * f * (1 - f / ceiling[j]);
            d[size + j] = dc * (1 - f) * (1 - z * z);
            d[2 * size + j] = dh * t * o * (1 - o);
            d_cell[row + j] = dc * f;
        }
    }
}

/* Steps of torch's layers, row by row, with `size` numbers a gate in `product`, W h, and `drive`, U x and what biases
   can be added to it. `output` becomes the new hidden state, in an RNN in the place of the drive. */
static inline void rnn_row(int size, const float *restrict product, float *restrict output) {
    for (int j = 0; j < size; j++) output[j] = hyperbolic_tangent(product[j] + output[j]);
}

/* Gates r, z, n; `bias` is that of the candidate's product, which the reset gate multiplies too. */
static inline void gru_row(int size, const float *restrict product, const float *restrict drive,
                           const float *restrict bias, const float *restrict before, float *restrict output) {
    for (int j = 0; j < size; j++) {
        float r = sigmoid(product[j] + drive[j]), z = sigmoid(product[size + j] + drive[size + j]);
        float n = hyperbolic_tangent(drive[2 * size + j] + r * (product[2 * size + j] + bias[j]));
        output[j] = n + z * (before[j] - n);
    }
}

/* Gates i, f, g, o; `cell` is that before and becomes that after. */
static inline void lstm_row(int size, const float *restrict product, const float *restrict drive,
                            float *restrict cell, float *restrict output) {
    for (int j = 0; j < size; j++) {
        float i = sigmoid(product[j] + drive[j]), f = sigmoid(product[size + j] + drive[size + j]);
        float g = hyperbolic_tangent(product[2 * size + j] + drive[2 * size + j]);
        float o = sigmoid(product[3 * size + j] + drive[3 * size + j]);
        cell[j] = f * cell[j] + i * g;
        output[j] = o * hyperbolic_tangent(cell[j]);
    }
}

/* The same for all rows. Torch's threads, whose pool the loader finds, share them where there are enough numbers. */
#define EACH_ROW(b) \
    _Pragma("omp parallel for schedule(static) if ((int64_t)batch * size >= 4096)") for (int64_t b = 0; b < batch; b++)

void rnn_gates(int batch, int size, const float *product, float *output) {
    EACH_ROW(b) rnn_row(size, product + b * size, output + b * size);
}

void gru_gates(int batch, int size, const float *product, const float *drive, const float *bias, const float *before,
               float *output) {
    EACH_ROW(b)
    gru_row(size, product + b * 3 * size, drive + b * 3 * size, bias, before + b * size, output + b * size);
}

void lstm_gates(int batch, int size, const float *product, const float *drive, float *cell, float *output) {
    EACH_ROW(b)
    lstm_row(size, product + b * 4 * size, drive + b * 4 * size, cell + b * size, output + b * size);
}
