/* Torch's RNN, GRU and LSTM and the package's StableLSTM over many steps of many rows, each row a sequence of its own
   (plain loops: `LoopEngine` in engines.py, and the layers themselves). A thread keeps its rows for all steps and waits
   for nobody. A product lies between small tiles, `TILE` rows by `WIDTH` units, whose sums stay in registers; weights
   are laid out once as panels: (blocks of WIDTH units, gates, inputs, WIDTH), padded with zeros. What a gate does number
   by number follows at once, while the sums are near. Compiled without reassociation, as activations.h demands. */
#include "activations.h"

#ifdef __AVX512F__
#define TILE_ROWS 8
enum { LANES = 16 };
#else
#define TILE_ROWS 6
enum { LANES = 8 };
#endif
enum { TILE = TILE_ROWS, WIDTH = 2 * LANES, DEPTH = 256, MOST_SUMS = 4, MOST_TILES = 16 };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

enum kind { TANH, RELU, GRU, LSTM, MIXTURE };

/* Of a GRU the candidate has two sums, since the reset gate multiplies one of them: U x goes to the third, W h to the
   fourth. */
static const int sums_of[] = {[TANH] = 1, [RELU] = 1, [GRU] = 4, [LSTM] = 4, [MIXTURE] = 3};
static const int gates_of[] = {[TANH] = 1, [RELU] = 1, [GRU] = 3, [LSTM] = 4, [MIXTURE] = 3};

/* Rows of numbers that lie `row` apart in one step, and `step` apart from step to step. */
typedef struct {
    float *first;
    int64_t step, row;
} Series;

/* A layer that is `driven` reads U x + b, all gates of it (gates, size), in the place of x; its `inputs` are 0. */
typedef struct {
    int32_t kind, size, inputs, driven;
    const float *input_panels, *recurrent_panels, *bias, *ceiling;
} Layer;

int32_t unit_block(void) { return WIDTH; }

/* sums (rows, WIDTH), `stride` apart, += a (rows, depth) times panel (depth, WIDTH). */
static inline __attribute__((always_inline)) void tile(int rows, int depth, const float *a, int64_t row,
                                                       const float *panel, float *sums, int stride) {
    lanes left[TILE], right[TILE];
    for (int r = 0; r < rows; r++) {
        left[r] = *(const lanes *)(sums + r * stride);
        right[r] = *(const lanes *)(sums + r * stride + LANES);
    }
    for (int k = 0; k < depth; k++) {
        lanes w = *(const lanes *)(panel + k * WIDTH), v = *(const lanes *)(panel + k * WIDTH + LANES);
        for (int r = 0; r < rows; r++) {
            float number = a[r * row + k];
            left[r] += number * w;
            right[r] += number * v;
        }
    }
    for (int r = 0; r < rows; r++) {
        *(lanes *)(sums + r * stride) = left[r];
        *(lanes *)(sums + r * stride + LANES) = right[r];
    }
}

static void some_rows(int rows, int depth, const float *a, int64_t row, const float *panel, float *sums, int stride) {
    switch (rows) {
        case 1: tile(1, depth, a, row, panel, sums, stride); break;
        case 2: tile(2, depth, a, row, panel, sums, stride); break;
        case 3: tile(3, depth, a, row, panel, sums, stride); break;
        case 4: tile(4, depth, a, row, panel, sums, stride); break;
        case 5: tile(5, depth, a, row, panel, sums, stride); break;
        case 6: tile(6, depth, a, row, panel, sums, stride); break;
#if TILE_ROWS > 6
        case 7: tile(7, depth, a, row, panel, sums, stride); break;
        case 8: tile(8, depth, a, row, panel, sums, stride); break;
#endif
    }
}

/* The same for any number of rows, in tiles as equal as can be, and for a part of the depth at a time so that this part
   of the panel stays near. */
static void add_product(int rows, int depth, const float *a, int64_t row, const float *panel, float *sums, int stride) {
    int tiles = (rows + TILE - 1) / TILE;
    for (int k = 0; k < depth; k += DEPTH) {
        int part = depth - k < DEPTH ? depth - k : DEPTH;
        for (int n = 0, r = 0; n < tiles; n++) {
            int some = rows / tiles + (n < rows % tiles);
            some_rows(some, part, a + r * row + k, row, panel + k * WIDTH, sums + r * stride, stride);
            r += some;
        }
    }
}

/* The same for a row that is alone and has too few sums to keep the multipliers busy: four parts of the depth side by
   side. It rounds differently, so it is not for chunks, which must not show how many of them there are. */
static void single_row(int depth, const float *a, const float *panel, float *sums) {
    lanes left[4] = {*(const lanes *)sums}, right[4] = {*(const lanes *)(sums + LANES)};
    int k = 0;
    for (; k + 4 <= depth; k += 4)
        for (int part = 0; part < 4; part++) {
            const float *w = panel + (k + part) * WIDTH;
            left[part] += a[k + part] * *(const lanes *)w;
            right[part] += a[k + part] * *(const lanes *)(w + LANES);
        }
    for (; k < depth; k++) {
        left[0] += a[k] * *(const lanes *)(panel + k * WIDTH);
        right[0] += a[k] * *(const lanes *)(panel + k * WIDTH + LANES);
    }
    *(lanes *)sums = (left[0] + left[1]) + (left[2] + left[3]);
    *(lanes *)(sums + LANES) = (right[0] + right[1]) + (right[2] + right[3]);
}

static inline void tanh_row(int units, const float *restrict sums, float *restrict output) {
    for (int j = 0; j < units; j++) output[j] = hyperbolic_tangent(sums[j]);
}

/* NaN stays NaN. */
static inline void relu_row(int units, const float *restrict sums, float *restrict output) {
    for (int j = 0; j < units; j++) output[j] = sums[j] < 0 ? 0 : sums[j];
}

/* Gates r, z, n. */
static inline void gru_row(int units, const float *restrict sums, const float *restrict before, float *restrict output) {
    for (int j = 0; j < units; j++) {
        float r = sigmoid(sums[j]), z = sigmoid(sums[WIDTH + j]);
        float n = hyperbolic_tangent(sums[2 * WIDTH + j] + r * sums[3 * WIDTH + j]);
        output[j] = n + z * (before[j] - n);
    }
}

/* Gates i, f, g, o; `cell` is that before and becomes that after. */
static inline void lstm_row(int units, const float *restrict sums, float *restrict cell, float *restrict output) {
    for (int j = 0; j < units; j++) {
        float i = sigmoid(sums[j]), f = sigmoid(sums[WIDTH + j]);
        float g = hyperbolic_tangent(sums[2 * WIDTH + j]), o = sigmoid(sums[3 * WIDTH + j]);
        cell[j] = f * cell[j] + i * g;
        output[j] = o * hyperbolic_tangent(cell[j]);
    }
}

/* Gates f, z, o of StableLSTM. */
static inline void mixture_row(int units, const float *restrict sums, const float *restrict ceiling,
                               float *restrict cell, float *restrict output) {
    for (int j = 0; j < units; j++) {
        float f = ceiling[j] * sigmoid(sums[j]), z = hyperbolic_tangent(sums[WIDTH + j]);
        float o = sigmoid(sums[2 * WIDTH + j]);
        cell[j] = f * cell[j] + (1 - f) * z;
        output[j] = o * hyperbolic_tangent(cell[j]);
    }
}

/* One step of some rows for one block of units, from the hidden state `before` (rows, size). */
static void block_of_units(const Layer *layer, int block, int rows, const float *x, int64_t x_row, const float *before,
                           int64_t before_row, float *cell, float *output, int64_t output_row, float *sums) {
    int size = layer->size, sum_count = sums_of[layer->kind], gates = gates_of[layer->kind], stride = sum_count * WIDTH;
    const float *bias = layer->bias + (int64_t)block * stride;
    int first = block * WIDTH, units = size - first < WIDTH ? size - first : WIDTH;
    for (int r = 0; r < rows; r++) memcpy(sums + (int64_t)r * stride, bias, stride * sizeof *sums);
    for (int g = 0; g < gates; g++) {
        int64_t panel = (int64_t)block * gates + g;
        int apart = layer->kind == GRU && g == 2;
        if (layer->driven)
            for (int r = 0; r < rows; r++)
                memcpy(sums + (int64_t)r * stride + g * WIDTH, x + r * x_row + g * size + first, units * sizeof *sums);
        else
            add_product(rows, layer->inputs, x, x_row, layer->input_panels + panel * layer->inputs * WIDTH,
                        sums + g * WIDTH, stride);
        const float *recurrent = layer->recurrent_panels + panel * size * WIDTH;
        float *target = sums + (g + apart) * WIDTH;
        if (layer->driven && rows == 1)
            single_row(size, before, recurrent, target);
        else
            add_product(rows, size, before, before_row, recurrent, target, stride);
    }
    for (int r = 0; r < rows; r++) {
        const float *s = sums + (int64_t)r * stride, *h = before + r * before_row + first;
        float *c = cell + (int64_t)r * size + first, *y = output + r * output_row + first;
        switch (layer->kind) {
            case TANH: tanh_row(units, s, y); break;
            case RELU: relu_row(units, s, y); break;
            case GRU: gru_row(units, s, h, y); break;
            case LSTM: lstm_row(units, s, c, y); break;
            case MIXTURE: mixture_row(units, s, layer->ceiling + first, c, y); break;
        }
    }
}

/* All steps of at most MOST_TILES tiles of rows; the new hidden states are the outputs. */
static void run_rows(const Layer *layer, int steps, int rows, Series x, const float *h, float *cell, Series y) {
    float sums[MOST_TILES * TILE * MOST_SUMS * WIDTH];
    int blocks = (layer->size + WIDTH - 1) / WIDTH;
    const float *before = h;
    int64_t before_row = layer->size;
    for (int t = 0; t < steps; t++) {
        float *now = y.first + t * y.step;
        for (int block = 0; block < blocks; block++)
            block_of_units(layer, block, rows, x.first + t * x.step, x.row, before, before_row, cell, now, y.row, sums);
        before = now, before_row = y.row;
    }
}

/* h (rows, size) is the hidden state before, cell (rows, size) the cell state, which becomes that after (a layer without
   one does not touch it). Threads, where there are several, get the same number of rows, or one less. */
void run_steps(const Layer *layer, int steps, int rows, const Series *x, const float *h, float *cell, const Series *y,
               int threads) {
    if (rows <= 0) return;
    int most = threads * MOST_TILES * TILE, parts = (rows + most - 1) / most * threads;
    int share = (rows + parts - 1) / parts;
    #pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int first = 0; first < rows; first += share) {
        int some = rows - first < share ? rows - first : share;
        Series xs = {x->first + first * x->row, x->step, x->row}, ys = {y->first + first * y->row, y->step, y->row};
        int64_t own = (int64_t)first * layer->size;
        run_rows(layer, steps, some, xs, h + own, cell + own, ys);
    }
}
