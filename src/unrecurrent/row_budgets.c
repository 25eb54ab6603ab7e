/* Hold the row budgets of a recurrent layer, unit by unit: the loop of `hold_rows_` in feasible.py, one unit's rows at
   a time while they are in the cache. Names are those of feasible.py and of `shrink_rows` in projections.py. */
#include <math.h>
#include <stdint.h>

enum { MIXTURE, GRU, LSTM };
#define MOST_GATES 3
#define TINY 1e-30f

typedef struct {
    int32_t kind, gates, size, pieces, rounds;
    int32_t gate[MOST_GATES], output;
    float rate, rounding, tolerance;
} Layer;

/* Largest g direct + g (1 - g) through over a gate g in [0, 1]: where it is. */
static inline float worst_gate(float direct, float through) {
    return through > TINY ? fminf(1.0f, (direct + through) / (2.0f * through)) : 1.0f;
}

/* The worst cut for the row sums w of one unit: its coefficients, and lambda - f. */
static float worst_cut(const Layer *l, const float *w, float ceiling, float scale, float bound,
                       const float *slope, const float *reach, float *coefficient) {
    float worst = -1.0f, slack = l->rate - ceiling, r = 1.0f, rate = l->rate;
    float candidate = w[0];
    if (l->kind == GRU) {
        r = worst_gate(w[0], bound * w[1]);
        candidate = r * w[0] + r * (1 - r) * bound * w[1];
    }
    for (int p = 0; p < l->pieces; p++) {
        float a, b, c, value, left;
        if (l->kind == LSTM) {
            a = worst_gate(slope[p] * w[0], reach[p] * w[1]);
            b = a * (1 - a) * reach[p], a *= slope[p], c = ceiling, left = rate - ceiling;
            value = (a * w[0] + b * w[1] + c * w[2]) / left;
        } else {
            float gate = l->kind == GRU ? w[2] : w[1], distance = 1 + reach[p], f = ceiling;
            float ratio = slope[p] * candidate / fmaxf(distance * gate, TINY);
            float discriminant = rate * (rate - scale) - scale * (1 - rate) * ratio;
            if (discriminant > 0) f = fminf(f, rate - sqrtf(discriminant));
            a = (1 - f) * slope[p], b = f * (1 - f / scale) * distance, c = 0, left = rate - f;
            value = (a * candidate + b * gate) / left;
            if (l->kind == GRU) c = b, b = a * r * (1 - r) * bound, a *= r;
        }
        if (value > worst) {
            worst = value, slack = left;
            coefficient[0] = a, coefficient[1] = b, coefficient[2] = c;
        }
    }
    return slack;
}

static float row_sum(const float *restrict x, const float *restrict v, int size) {
    float sum = 0;
    for (int k = 0; k < size; k++) sum += fabsf(x[k]) * v[k];
    return sum;
}

/* Soft-threshold a row by step * v; returns its new sum, and the sum of v^2 over what is not zero. */
static float shrink(float *restrict x, const float *restrict v, float step, int size, float *active) {
    float sum = 0, squares = 0;
    for (int k = 0; k < size; k++) {
        /* max(excess, 0) without a branch, which would keep the loop from being vectorized. */
        float excess = fabsf(x[k]) - step * v[k], left = 0.5f * (excess + fabsf(excess));
        x[k] = copysignf(left, x[k]);
        sum += left * v[k];
        squares += (float)(left > 0) * (v[k] * v[k]);
    }
    *active = squares;
    return sum;
}

static void scale(float *x, float factor, int size) {
    for (int k = 0; k < size; k++) x[k] *= factor;
}

static void hold_joint(const Layer *l, float **row, float *w, float allowed, float ceiling, float gate_scale,
                       float bound, const float *v, float all, const float *slope, const float *reach) {
    float coefficient[MOST_GATES], active[MOST_GATES] = {all, all, all}, excess, limit;
    for (int round = 0;; round++) {
        limit = worst_cut(l, w, ceiling, gate_scale, bound, slope, reach, coefficient) * allowed;
        float used = 0, gradient = TINY;
        for (int g = 0; g < l->gates; g++) used += coefficient[g] * w[g], gradient += coefficient[g] * coefficient[g] * active[g];
        excess = used - limit;
        if (excess <= l->tolerance * limit || round == l->rounds) {
            for (int g = 0; g < l->gates && excess > 0; g++) scale(row[g], limit / used, l->size);
            return;
        }
        for (int g = 0; g < l->gates; g++)
            w[g] = shrink(row[g], v, excess / gradient * coefficient[g], l->size, &active[g]);
    }
}

static void hold_single(const Layer *l, float *row, float w, float limit, const float *v, float all) {
    float active = all;
    for (int round = 0; round < l->rounds && w > limit * (1 + 1e-6f); round++)
        w = shrink(row, v, (w - limit) / fmaxf(active, TINY), l->size, &active);
    if (w > limit) scale(row, limit / w, l->size);
}

/* weight (G size, size) in place; v (size,) weighs the columns, v_cell the units; ceiling, gate_scale, bound and
   output_limit (size,) belong to the units, slope and reach (pieces,) to the pieces of the candidate's tanh.
   Returns the number of units whose rows were moved. */
int hold_rows(const Layer *l, float *weight, const float *v, const float *v_cell, const float *ceiling,
              const float *gate_scale, const float *bound, const float *output_limit, const float *slope,
              const float *reach) {
    int size = l->size, moved = 0;
    float all = row_sum(v, v, size);
    for (int j = 0; j < size; j++) {
        float *row[MOST_GATES], w[MOST_GATES] = {0, 0, 0}, coefficient[MOST_GATES], used = 0;
        for (int g = 0; g < l->gates; g++) {
            row[g] = weight + ((int64_t)l->gate[g] * size + j) * size;
            w[g] = row_sum(row[g], v, size);
        }
        float limit = v_cell[j] * worst_cut(l, w, ceiling[j], gate_scale[j], bound[j], slope, reach, coefficient);
        for (int g = 0; g < l->gates; g++) used += coefficient[g] * w[g];
        if (used > limit * (1 - l->rounding)) {
            hold_joint(l, row, w, v_cell[j] * (1 - 2 * l->rounding), ceiling[j], gate_scale[j], bound[j], v, all,
                       slope, reach);
            moved++;
        }
        if (l->output >= 0) {
            float *last = weight + ((int64_t)l->output * size + j) * size, sum = row_sum(last, v, size);
            if (sum > output_limit[j] * (1 - l->rounding)) {
                hold_single(l, last, sum, output_limit[j] * (1 - 2 * l->rounding), v, all);
                moved++;
            }
        }
    }
    return moved;
}

/* Rows (count, size): each to the L1 ball of its limit. */
int hold_l1(const Layer *l, float *weight, int count, const float *v, const float *limit) {
    int moved = 0;
    float all = row_sum(v, v, l->size);
    for (int j = 0; j < count; j++) {
        float *row = weight + (int64_t)j * l->size, sum = row_sum(row, v, l->size);
        if (sum > limit[j] * (1 - l->rounding)) {
            hold_single(l, row, sum, limit[j] * (1 - 2 * l->rounding), v, all);
            moved++;
        }
    }
    return moved;
}

/* out[j] = sum over k of |weight[j, k]| v[k], for `count` rows. */
void row_sums(const float *weight, int count, int size, const float *v, float *out) {
    for (int j = 0; j < count; j++) out[j] = row_sum(weight + (int64_t)j * size, v, size);
}

/* Lower bound * sum |weight[j]| + first[j] + second[j] to room[j], in place: the nearest (row, first, second) at which it
   holds. `ones` (size,) are the column weights. Returns the number of rows that were moved. */
int lower_drive(float *weight, int count, int size, const float *ones, float bound, const float *room, float *first,
                float *second, float tolerance, int rounds) {
    int moved = 0;
    for (int j = 0; j < count; j++) {
        float *row = weight + (int64_t)j * size, active = size, excess = 0;
        float sum = row_sum(row, ones, size);
        for (int round = 0; round < rounds; round++) {
            excess = bound * sum + first[j] + second[j] - room[j];
            if (!(excess > tolerance)) break;
            moved += round == 0;
            float threshold = excess / (bound * bound * active + 2);
            sum = shrink(row, ones, threshold * bound, size, &active);
            first[j] -= threshold, second[j] -= threshold;
        }
        excess = bound * sum + first[j] + second[j] - room[j];
        if (excess > tolerance) first[j] -= excess / 2, second[j] -= excess / 2;
    }
    return moved;
}
