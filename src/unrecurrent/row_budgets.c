/* Hold the row budgets of a recurrent layer, unit by unit: the loop of `hold_rows_` in feasible.py, one unit's rows at
   a time while they are in the cache. Names are those of feasible.py and of `shrink_rows` in projections.py. */
#include <math.h>
#include <stdint.h>

enum { MIXTURE, GRU, LSTM };
#define MOST_GATES 3
#define MOST_PIECES 64
#define TINY 1e-30f

typedef struct {
    int32_t kind, gates, size, pieces, rounds;
    int32_t gate[MOST_GATES], output;
    float rate, rounding, tolerance;
} Layer;

/* Not fminf and fmaxf, which would keep loops from being vectorized. */
static inline float lesser(float a, float b) { return a < b ? a : b; }
static inline float greater(float a, float b) { return a > b ? a : b; }

/* Largest g direct + g (1 - g) through over a gate g in [0, 1]: where it is. */
static inline float worst_gate(float direct, float through) {
    return lesser(1.0f, (direct + through) / greater(2.0f * through, TINY));
}

/* One cut: coefficients of the joint gates, and lambda - f. */
typedef struct {
    float a, b, c, left;
} Cut;

static inline Cut lstm_cut(const Layer *l, const float *w, float ceiling, float slope, float reach) {
    float i = worst_gate(slope * w[0], reach * w[1]);
    return (Cut){i * slope, i * (1 - i) * reach, ceiling, l->rate - ceiling};
}

/* The cut of a mixture f old + (1 - f) candidate, f <= ceiling: a for the candidate, b for the gate. */
static inline Cut mixture_cut(const Layer *l, float candidate, float gate, float ceiling, float scale, float slope,
                              float reach) {
    float rate = l->rate, distance = 1 + reach;
    float ratio = slope * candidate / greater(distance * gate, TINY);
    float discriminant = rate * (rate - scale) - scale * (1 - rate) * ratio;
    /* Without a root below it the ceiling, which lies below the rate, is the worst. */
    float f = lesser(ceiling, rate - sqrtf(greater(discriminant, 0.0f)));
    return (Cut){(1 - f) * slope, f * (1 - f / scale) * distance, 0.0f, rate - f};
}

static int largest(const float *value, int count) {
    int best = 0;
    for (int p = 1; p < count; p++)
        if (value[p] > value[best]) best = p;
    return best;
}

/* The worst cut for the row sums w of one unit: its coefficients, and lambda - f. */
static float worst_cut(const Layer *l, const float *w, float ceiling, float scale, float bound,
                       const float *slope, const float *reach, float *coefficient) {
    float value[MOST_PIECES];
    Cut cut;
    if (l->kind == LSTM) {
        for (int p = 0; p < l->pieces; p++) {
            Cut at = lstm_cut(l, w, ceiling, slope[p], reach[p]);
            value[p] = at.a * w[0] + at.b * w[1]; /* the gate's own part, and lambda - f, are the same for all */
        }
        int p = largest(value, l->pieces);
        cut = lstm_cut(l, w, ceiling, slope[p], reach[p]);
    } else {
        float r = 1.0f, candidate = w[0], gate = w[1];
        if (l->kind == GRU) {
            r = worst_gate(w[0], bound * w[1]);
            candidate = r * w[0] + r * (1 - r) * bound * w[1], gate = w[2];
        }
        for (int p = 0; p < l->pieces; p++) {
            Cut at = mixture_cut(l, candidate, gate, ceiling, scale, slope[p], reach[p]);
            value[p] = (at.a * candidate + at.b * gate) / at.left;
        }
        int p = largest(value, l->pieces);
        cut = mixture_cut(l, candidate, gate, ceiling, scale, slope[p], reach[p]);
        if (l->kind == GRU) cut.c = cut.b, cut.b = cut.a * r * (1 - r) * bound, cut.a *= r;
    }
    coefficient[0] = cut.a, coefficient[1] = cut.b, coefficient[2] = cut.c;
    return cut.left;
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
    for (int round = 0; round < l->rounds && w > limit * (1 + l->tolerance); round++)
        w = shrink(row, v, (w - limit) / greater(active, TINY), l->size, &active);
    if (w > limit) scale(row, limit / w, l->size);
}

/* A row to the L1 ball of `limit`, columns weighted by v; returns whether it was moved. */
static int hold_row(const Layer *l, float *row, float limit, const float *v, float all) {
    float sum = row_sum(row, v, l->size);
    if (!(sum > limit * (1 - l->rounding))) return 0;
    hold_single(l, row, sum, limit * (1 - 2 * l->rounding), v, all);
    return 1;
}

/* One unit: what bounds its gates, and its share of the norm. */
typedef struct {
    float v_cell, ceiling, gate_scale, bound, output_limit;
} Unit;

static float *row_of(const Layer *l, float *weight, int gate, int unit) {
    return weight + ((int64_t)gate * l->size + unit) * l->size;
}

/* Rows j of all gates; `all` is the sum of v^2. Returns how many of the two budgets, joint and output, were not kept. */
static int hold_unit(const Layer *l, float *weight, int j, const Unit *u, const float *v, float all,
                     const float *slope, const float *reach) {
    float *row[MOST_GATES], w[MOST_GATES] = {0, 0, 0}, coefficient[MOST_GATES], used = 0;
    int moved = 0;
    for (int g = 0; g < l->gates; g++) {
        row[g] = row_of(l, weight, l->gate[g], j);
        w[g] = row_sum(row[g], v, l->size);
    }
    float limit = u->v_cell * worst_cut(l, w, u->ceiling, u->gate_scale, u->bound, slope, reach, coefficient);
    for (int g = 0; g < l->gates; g++) used += coefficient[g] * w[g];
    if (used > limit * (1 - l->rounding)) {
        hold_joint(l, row, w, u->v_cell * (1 - 2 * l->rounding), u->ceiling, u->gate_scale, u->bound, v, all, slope,
                   reach);
        moved++;
    }
    if (l->output >= 0) moved += hold_row(l, row_of(l, weight, l->output, j), u->output_limit, v, all);
    return moved;
}

/* weight (G size, size) in place; v (size,) weighs the columns, v_cell the units; ceiling, gate_scale, bound and
   output_limit (size,) belong to the units, slope and reach (pieces,) to the pieces of the candidate's tanh.
   Returns the number of budgets that were not kept. */
int hold_rows(const Layer *l, float *weight, const float *v, const float *v_cell, const float *ceiling,
              const float *gate_scale, const float *bound, const float *output_limit, const float *slope,
              const float *reach) {
    int moved = 0;
    float all = row_sum(v, v, l->size);
    for (int j = 0; j < l->size; j++) {
        Unit unit = {v_cell[j], ceiling[j], gate_scale[j], bound[j], output_limit[j]};
        moved += hold_unit(l, weight, j, &unit, v, all, slope, reach);
    }
    return moved;
}

/* Rows (count, size): each to the L1 ball of its limit. */
int hold_l1(const Layer *l, float *weight, int count, const float *v, const float *limit) {
    int moved = 0;
    float all = row_sum(v, v, l->size);
    for (int j = 0; j < count; j++) moved += hold_row(l, weight + (int64_t)j * l->size, limit[j], v, all);
    return moved;
}

static void limit_bias(float *first, float *second, float limit) {
    float total = *first + *second, excess = total - lesser(limit, greater(-limit, total));
    *first -= 0.5f * excess, *second -= 0.5f * excess;
}

/* `_MillerHardtLSTM._keep_reference` in stability.py: rows of `gates` blocks (size, size) to the L1 balls of `limit`
   (gates,), the input rows (size, inputs) of block `forget` to that of `drive`, and its biases to sums within `bias`.
   Returns the number of rows that were moved. */
int hold_paper(const Layer *l, float *weight_hh, const float *ones, const float *limit, float *weight_ih, int inputs,
               float drive, float *bias_ih, float *bias_hh, int forget, float bias) {
    int moved = 0, size = l->size;
    Layer wide = *l;
    wide.size = inputs;
    for (int g = 0; g < l->gates; g++)
        for (int j = 0; j < size; j++) moved += hold_row(l, row_of(l, weight_hh, g, j), limit[g], ones, size);
    for (int j = forget * size; j < (forget + 1) * size; j++) {
        moved += hold_row(&wide, weight_ih + (int64_t)j * inputs, drive, ones, inputs);
        if (bias_ih) limit_bias(bias_ih + j, bias_hh + j, bias);
    }
    return moved;
}

/* out[j] = sum over k of |weight[j, k]| v[k], for `count` rows. */
void row_sums(const float *weight, int count, int size, const float *v, float *out) {
    for (int j = 0; j < count; j++) out[j] = row_sum(weight + (int64_t)j * size, v, size);
}

/* Lower bound * sum |row| + *first + *second to room, in place: the nearest (row, first, second) at which it holds.
   `ones` (size,) are the column weights. Returns whether anything was moved. */
static int lower_row(float *row, int size, const float *ones, float bound, float room, float *first, float *second,
                     float tolerance, int rounds) {
    float active = size, sum = row_sum(row, ones, size), excess = bound * sum + *first + *second - room;
    if (!(excess > tolerance)) return 0;
    for (int round = 0; round < rounds && excess > tolerance; round++) {
        float threshold = excess / (bound * bound * active + 2);
        sum = shrink(row, ones, threshold * bound, size, &active);
        *first -= threshold, *second -= threshold;
        excess = bound * sum + *first + *second - room;
    }
    if (excess > tolerance) *first -= excess / 2, *second -= excess / 2;
    return 1;
}

/* The same for `count` rows; returns how many were moved. */
int lower_drive(float *weight, int count, int size, const float *ones, float bound, const float *room, float *first,
                float *second, float tolerance, int rounds) {
    int moved = 0;
    for (int j = 0; j < count; j++)
        moved += lower_row(weight + (int64_t)j * size, size, ones, bound, room[j], first + j, second + j, tolerance,
                           rounds);
    return moved;
}

/* What `_Rows` in stability.py knows of a layer beside its budgets: `keeping` is the gate that keeps the state, `tied`
   the gate that is its opposite (-1: none), `bound` that of the inputs (negative: `highest` says how far they drive). */
typedef struct {
    int32_t inputs, keeping, tied, drive_rounds;
    float bound, cap, hidden_bound, likely_rows, keeps_tolerance, lowest, shut, tolerance, margin;
} Drive;

typedef struct {
    float *weight_hh, *weight_ih, *bias_ih, *bias_hh;
    const float *highest, *v, *v_cell, *ones, *slope, *reach, *output_slope, *output_reach;
} Tensors;

static float capped(const Drive *d, float argument) {
    return lesser(d->cap, 1.0f / (1.0f + expf(-greater(argument, d->lowest))));
}

/* The largest row sum of the output gate: `output_budget` in feasible.py. */
static float output_limit(const Layer *l, const Tensors *t, float v_cell, float v_state) {
    float least = INFINITY;
    for (int p = 0; p < l->pieces; p++) {
        float steep = t->output_slope[p] * v_cell, root = sqrtf(greater(0.0f, v_state * (v_state - steep)));
        least = lesser(least, (2 * v_state - steep + 2 * root) / t->output_reach[p]);
    }
    return l->rate * least;
}

/* keeping <- (keeping - other) / 2, other <- -keeping: the nearest tied entries. */
static void tie(float *restrict keeping, float *restrict other, int count) {
    for (int k = 0; k < count; k++) keeping[k] = 0.5f * (keeping[k] - other[k]), other[k] = -keeping[k];
}

static void negate(float *restrict to, const float *restrict from, int count) {
    for (int k = 0; k < count; k++) to[k] = -from[k];
}

/* `_Rows._keep_reference` in stability.py, unit by unit. Returns whether anything but the tied copies was moved. */
int hold_layer(const Layer *l, const Drive *d, const Tensors *t) {
    int size = l->size, moved = 0;
    float all = row_sum(t->v, t->v, size);
    for (int j = 0; j < size; j++) {
        int keep = d->keeping * size + j, other = d->tied * size + j;
        float *row = row_of(l, t->weight_hh, d->keeping, j), *drive_row = t->weight_ih + (int64_t)keep * d->inputs;
        float *first = t->bias_ih + keep, *second = t->bias_hh + keep;
        if (d->tied >= 0) {
            tie(row, row_of(l, t->weight_hh, d->tied, j), size);
            tie(drive_row, t->weight_ih + (int64_t)other * d->inputs, d->inputs);
            tie(first, t->bias_ih + other, 1), tie(second, t->bias_hh + other, 1);
        }
        float drive = d->bound < 0 ? t->highest[j] : d->bound * row_sum(drive_row, t->ones, d->inputs);
        float margin = d->margin * (fabsf(drive) + fabsf(*first) + fabsf(*second));
        drive += *first + *second + margin;
        float rows = d->hidden_bound * row_sum(row, t->ones, size);
        Unit unit = {t->v_cell[j], capped(d, drive + rows), 1.0f, 1.0f, 0.0f};
        if (l->kind == GRU)
            unit.bound = row_sum(row_of(l, t->weight_hh, 2, j), t->ones, size) + fabsf(t->bias_hh[2 * size + j]);
        if (l->output >= 0) unit.output_limit = output_limit(l, t, unit.v_cell, t->v[j]);
        if (rows > d->likely_rows) {
            float w[MOST_GATES] = {0, 0, 0}, coefficient[MOST_GATES], used = 0;
            for (int g = 0; g < l->gates; g++) w[g] = row_sum(row_of(l, t->weight_hh, l->gate[g], j), t->v, size);
            float slack = worst_cut(l, w, unit.ceiling, 1.0f, unit.bound, t->slope, t->reach, coefficient);
            for (int g = 0; g < l->gates; g++) used += coefficient[g] * w[g];
            if (used > slack * unit.v_cell * (1 + d->keeps_tolerance)) unit.ceiling = capped(d, drive + d->likely_rows);
        }
        moved += hold_unit(l, t->weight_hh, j, &unit, t->v, all, t->slope, t->reach);
        float ceiling = greater(unit.ceiling, d->shut);
        float room = logf(ceiling / (1 - ceiling)) - d->hidden_bound * row_sum(row, t->ones, size);
        if (drive > room + d->tolerance) {
            if (d->bound < 0)
                *first -= (drive - room) / 2, *second -= (drive - room) / 2;
            else
                lower_row(drive_row, d->inputs, t->ones, d->bound, room - margin, first, second, d->tolerance / 2,
                          d->drive_rounds);
            moved++;
        }
        if (d->tied >= 0) {
            negate(row_of(l, t->weight_hh, d->tied, j), row, size);
            negate(t->weight_ih + (int64_t)other * d->inputs, drive_row, d->inputs);
            t->bias_ih[other] = -*first, t->bias_hh[other] = -*second;
        }
    }
    return moved;
}
