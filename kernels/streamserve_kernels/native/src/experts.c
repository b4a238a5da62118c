// Mixtures of experts: who goes where, the products of all experts that somebody chose, their sum.
//
// A *pair* is a row and one of its experts. Pairs are numbered by expert, so that an expert's are
// one slice of the rows: the product of an expert is the product of any weight, told its slice.
#include "experts.h"
#include "output.h"

#include <string.h>

enum { LANES = 16 };

static int64_t num_rows(const ss_context *context, const ss_routes *routes) {
    return ss_rows(context, routes->rows_kind);
}

static int64_t num_pairs(const ss_context *context, const ss_routes *routes) {
    return num_rows(context, routes) * routes->top_k;
}

// --- the choice ---------------------------------------------------------------------------------

enum {
    ROUTE_ROUTES,
    ROUTE_LOGITS,       // address of [R, E], bfloat16
    ROUTE_RENORMALISE,  // whether weights are divided by their sum
    ROUTE_SIGMOID,      // whether a score is the sigmoid of a logit, or its share of the softmax
    ROUTE_CORRECTION,   // address of [E], float32, which counts for the choice; or 0
    ROUTE_GROUPS,       // how many stretches of experts
    ROUTE_TOP_GROUPS,   // how many of them are chosen from
    ROUTE_EPS,          // bits of a double: added to the sum
    ROUTE_SCALE,        // bits of a double: multiplies the weights
    ROUTE_VOTES,        // how many of a group's best experts it is judged by: one or two
    ROUTE_OWN_SCALES,   // address of [E], float32: multiply each expert's own; or 0
};

static int64_t route_units(const ss_context *context, const int64_t *args) {
    const ss_routes *routes = (const ss_routes *)args[ROUTE_ROUTES];
    // An exponential and the searches are worth a few hundred copies.
    return ss_row_units(num_rows(context, routes), 16 * routes->num_experts, context->num_threads);
}

// to [count, in whole vectors] = the probabilities.
static void softmax(float *to, const bf16 *logits, int64_t count) {
    ss_widen_row(to, logits, count);
    for (int64_t e = count; e % LANES; e++) to[e] = -INFINITY;
    __m512 most = _mm512_loadu_ps(to), total = _mm512_setzero_ps();
    for (int64_t e = LANES; e < count; e += LANES)
        most = _mm512_max_ps(most, _mm512_loadu_ps(to + e));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t e = 0; e < count; e += LANES) {
        const __m512 value = ss_exp(_mm512_sub_ps(_mm512_loadu_ps(to + e), largest));
        _mm512_storeu_ps(to + e, value);
        total = _mm512_add_ps(total, value);
    }
    const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(total));
    for (int64_t e = 0; e < count; e += LANES)
        _mm512_storeu_ps(to + e, _mm512_div_ps(_mm512_loadu_ps(to + e), sum));
}

static void sigmoids(float *to, const bf16 *logits, int64_t count) {
    const __m512 one = _mm512_set1_ps(1.0f);
    ss_widen_row(to, logits, count);
    for (int64_t e = count; e % LANES; e++) to[e] = 0.0f;
    for (int64_t e = 0; e < count; e += LANES) {
        const __m512 power = ss_exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(to + e)));
        _mm512_storeu_ps(to + e, _mm512_div_ps(one, _mm512_add_ps(one, power)));
    }
}

// Leaves the experts of the best groups, whose best or two best add up to most; of equals the first.
static void limit(float *merits, const int64_t *args, int64_t num_experts) {
    const int64_t num_groups = args[ROUTE_GROUPS], top_groups = args[ROUTE_TOP_GROUPS];
    const int64_t size = num_experts / num_groups;
    float worths[MAX_EXPERTS];
    for (int64_t group = 0; group < num_groups; group++) {
        float first = LEAST, second = LEAST;
        for (int64_t e = group * size; e < (group + 1) * size; e++) {
            if (merits[e] > first) {
                second = first;
                first = merits[e];
            } else if (merits[e] > second) {
                second = merits[e];
            }
        }
        worths[group] = args[ROUTE_VOTES] == 1 ? first : fmaxf(first + second, LEAST);
    }
    for (int64_t j = 0; j < top_groups; j++) {
        int64_t best = -1;
        for (int64_t group = 0; group < num_groups; group++)
            if (worths[group] != TAKEN && (best < 0 || worths[group] > worths[best])) best = group;
        worths[best] = TAKEN;
    }
    for (int64_t e = 0; e < size * num_groups; e++)
        if (worths[e / size] != TAKEN) merits[e] = LEAST;
}

// merits [count] = what the choice is made by.
static void correct(float *merits, const float *scores, const int64_t *args, int64_t count) {
    const float *correction = (const float *)args[ROUTE_CORRECTION];
    for (int64_t e = 0; e < count; e++) {
        const float merit = correction ? scores[e] + correction[e] : scores[e];
        merits[e] = merit > LEAST ? merit : LEAST;  // also of NaN
    }
    if (args[ROUTE_GROUPS] > 1) limit(merits, args, count);
}

// The experts of a row with the most merit, of equals the first, which may be their scores.
static void choose(const ss_routes *routes, float *merits, const float *scores, int32_t *chosen,
                   float *weights) {
    for (int64_t j = 0; j < routes->top_k; j++) {
        int64_t best = -1;
        for (int64_t e = 0; e < routes->num_experts; e++)
            if (merits[e] != TAKEN && (best < 0 || merits[e] > merits[best])) best = e;
        chosen[j] = (int32_t)best;
        weights[j] = scores[best];
        merits[best] = TAKEN;
    }
}

static void route_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    (void)thread;
    const ss_routes *routes = (const ss_routes *)args[ROUTE_ROUTES];
    const int64_t top_k = routes->top_k;
    const int is_corrected = args[ROUTE_CORRECTION] != 0 || args[ROUTE_GROUPS] > 1;
    const float eps = (float)ss_double(args[ROUTE_EPS]), scale = (float)ss_double(args[ROUTE_SCALE]);
    float scores[MAX_EXPERTS], corrected[MAX_EXPERTS];
    float *merits = is_corrected ? corrected : scores;
    const float *own_scales = (const float *)args[ROUTE_OWN_SCALES];
    SS_FOR_ROWS(row, num_rows(context, routes)) {
        const bf16 *logits = (const bf16 *)args[ROUTE_LOGITS] + row * routes->num_experts;
        float *weights = routes->weights + row * top_k;
        (args[ROUTE_SIGMOID] ? sigmoids : softmax)(scores, logits, routes->num_experts);
        if (is_corrected) correct(corrected, scores, args, routes->num_experts);
        int32_t *chosen = routes->chosen + row * top_k;
        choose(routes, merits, scores, chosen, weights);
        float sum = eps;
        for (int64_t j = 0; j < top_k; j++) sum += weights[j];
        if (!args[ROUTE_RENORMALISE]) sum = 1.0f;
        for (int64_t j = 0; j < top_k; j++)
            weights[j] = weights[j] / sum * scale * (own_scales ? own_scales[chosen[j]] : 1.0f);
    }
}

const ss_operation ss_route = {route_units, route_run, 0};

// --- pairs by expert ----------------------------------------------------------------------------

enum { ORDER_ROUTES };

static int64_t order_units(const ss_context *context, const int64_t *args) {
    return num_rows(context, (const ss_routes *)args[ORDER_ROUTES]) ? 1 : 0;
}

static void order_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    (void)unit, (void)num_units, (void)thread;
    const ss_routes *routes = (const ss_routes *)args[ORDER_ROUTES];
    const int64_t pairs = num_pairs(context, routes);
    int32_t next[MAX_EXPERTS + 1] = {0};
    for (int64_t i = 0; i < pairs; i++) next[routes->chosen[i] + 1]++;
    int32_t active = 0;
    for (int64_t e = 0; e < routes->num_experts; e++) {
        if (next[e + 1]) routes->active[1 + active++] = (int32_t)e;
        next[e + 1] += next[e];
        routes->starts[e] = next[e];
    }
    routes->active[0] = active;
    routes->starts[routes->num_experts] = (int32_t)pairs;
    for (int64_t i = 0; i < pairs; i++) {
        const int32_t pair = next[routes->chosen[i]]++;
        routes->pairs[i] = pair;
        routes->rows[pair] = (int32_t)(i / routes->top_k);
    }
}

const ss_operation ss_order_pairs = {order_units, order_run, 0};

enum {
    GATHER_ROUTES,
    GATHER_OUT,     // address of [pairs, WIDTH]
    GATHER_IN,      // address of [R, WIDTH]
    GATHER_WIDTH,
    GATHER_STRIDE,  // elements between rows of x
};

static int64_t gather_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(num_pairs(context, (const ss_routes *)args[GATHER_ROUTES]),
                        args[GATHER_WIDTH], context->num_threads);
}

static void gather_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    (void)thread;
    const ss_routes *routes = (const ss_routes *)args[GATHER_ROUTES];
    const int64_t width = args[GATHER_WIDTH];
    SS_FOR_ROWS(pair, num_pairs(context, routes))
    memcpy((bf16 *)args[GATHER_OUT] + pair * width,
           (const bf16 *)args[GATHER_IN] + routes->rows[pair] * args[GATHER_STRIDE],
           2 * (size_t)width);
}

const ss_operation ss_gather_pairs = {gather_units, gather_run, 0};

// --- the products -------------------------------------------------------------------------------

// Behind what the product of each expert begins with, rows of kind SS_SLICE.
enum {
    EXPERTS_ROUTES = PRODUCT_ARGS,
    EXPERTS_PRODUCTS,  // address of an instruction for each expert; how it begins is said above
};

// The product of the i-th expert that somebody chose, and what it is told of the step.
typedef struct {
    const ss_operation *operation;
    int64_t args[SS_MAX_ARGS];
    ss_context context;
} expert_product;

static expert_product product_of(const ss_context *context, const int64_t *args, int64_t i) {
    const ss_routes *routes = (const ss_routes *)args[EXPERTS_ROUTES];
    const int32_t e = routes->active[1 + i];
    const ss_instruction *instruction = (const ss_instruction *)args[EXPERTS_PRODUCTS] + e;
    expert_product own = {.operation = ss_operation_of(instruction), .context = *context};
    memcpy(own.args, instruction->args, sizeof(own.args));
    memcpy(own.args, args, PRODUCT_ARGS * sizeof(*args));
    own.context.num_threads = 1;  // its columns are cut into units, not into ranges of threads
    own.context.slice = (ss_slice){routes->starts[e], routes->starts[e + 1] - routes->starts[e],
                                   num_pairs(context, routes)};
    return own;
}

static int64_t units_of(const expert_product *own) {
    return own->operation->units(&own->context, own->args);
}

// Each expert falls into as many as that of most units: what is too many for one is nothing to do.
static int64_t experts_units(const ss_context *context, const int64_t *args) {
    const ss_routes *routes = (const ss_routes *)args[EXPERTS_ROUTES];
    if (!num_rows(context, routes)) return 0;
    int64_t most = 0;
    for (int64_t i = 0; i < routes->active[0]; i++) {
        const expert_product own = product_of(context, args, i);
        most = ss_max(most, units_of(&own));
    }
    return most * routes->active[0];
}

static void experts_run(const ss_context *context, const int64_t *args, int64_t unit,
                        int64_t num_units, int thread) {
    const ss_routes *routes = (const ss_routes *)args[EXPERTS_ROUTES];
    const int64_t each = num_units / routes->active[0];
    const expert_product own = product_of(context, args, unit / each);
    const int64_t its_units = units_of(&own);
    if (unit % each < its_units)
        own.operation->run(&own.context, own.args, unit % each, its_units, thread);
}

const ss_operation ss_experts = {experts_units, experts_run, 0};

// --- sums ---------------------------------------------------------------------------------------

enum {
    COMBINE_ROUTES,
    COMBINE_OUT,    // address of [R, WIDTH]
    COMBINE_IN,     // address of [pairs, WIDTH]
    COMBINE_WIDTH,
};

static int64_t combine_units(const ss_context *context, const int64_t *args) {
    return ss_vector_units(num_pairs(context, (const ss_routes *)args[COMBINE_ROUTES]),
                           args[COMBINE_WIDTH], context->num_threads);
}

static void combine_run(const ss_context *context, const int64_t *args, int64_t unit,
                        int64_t num_units, int thread) {
    (void)thread;
    const ss_routes *routes = (const ss_routes *)args[COMBINE_ROUTES];
    const int64_t width = args[COMBINE_WIDTH], vectors = ss_ceil_div(width, LANES);
    SS_FOR_ROWS(i, num_rows(context, routes) * vectors) {
        const int64_t row = ss_small_div(i, vectors), column = (i - row * vectors) * LANES;
        const int64_t first = row * routes->top_k;
        const __mmask16 mask = ss_mask(width - column);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = first; j < first + routes->top_k; j++) {
            const bf16 *part = (const bf16 *)args[COMBINE_IN] + routes->pairs[j] * width + column;
            sum = _mm512_fmadd_ps(_mm512_set1_ps(routes->weights[j]), ss_load_masked(part, mask),
                                  sum);
        }
        ss_store_masked((bf16 *)args[COMBINE_OUT] + row * width + column, sum, mask);
    }
}

const ss_operation ss_combine_pairs = {combine_units, combine_run, 0};

enum {
    SHARED_OUT,     // address of [rows, WIDTH]
    SHARED_CHOSEN,  // address of [rows, WIDTH]: what the chosen experts gave
    SHARED_SHARED,  // address of [rows, WIDTH]: what the shared ones gave
    SHARED_X,       // address of [rows, INPUTS]
    SHARED_GATE,    // address of [INPUTS]
    SHARED_WIDTH,
    SHARED_INPUTS,
    SHARED_ROWS_KIND,
};

static int64_t shared_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(ss_rows(context, args[SHARED_ROWS_KIND]), 2 * args[SHARED_WIDTH],
                        context->num_threads);
}

// out = chosen + sigmoid(x · gate) · shared
static void shared_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[SHARED_WIDTH], inputs = args[SHARED_INPUTS];
    const bf16 *gate = (const bf16 *)args[SHARED_GATE];
    SS_FOR_ROWS(row, ss_rows(context, args[SHARED_ROWS_KIND])) {
        const bf16 *x = (const bf16 *)args[SHARED_X] + row * inputs;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < inputs; k += LANES) {
            const __mmask16 mask = ss_mask(inputs - k);
            sum = _mm512_fmadd_ps(ss_load_masked(x + k, mask), ss_load_masked(gate + k, mask), sum);
        }
        const __m512 factor = _mm512_set1_ps(1.0f / (1.0f + expf(-_mm512_reduce_add_ps(sum))));
        for (int64_t c = 0; c < width; c += LANES) {
            const __mmask16 mask = ss_mask(width - c);
            const int64_t at = row * width + c;
            const __m512 shared = ss_load_masked((const bf16 *)args[SHARED_SHARED] + at, mask);
            const __m512 chosen = ss_load_masked((const bf16 *)args[SHARED_CHOSEN] + at, mask);
            ss_store_masked((bf16 *)args[SHARED_OUT] + at, _mm512_fmadd_ps(factor, shared, chosen),
                            mask);
        }
    }
}

const ss_operation ss_add_shared = {shared_units, shared_run, 0};
