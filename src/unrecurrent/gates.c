/* The element-wise part of one step of `StableLSTM` in one pass over its numbers, forward and backward (plain loops:
   `_gates_reference` and `_slopes_reference` in stable_lstm.py). */
#include "activations.h"

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
