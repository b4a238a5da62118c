// y = x @ weightᵀ + bias for weights as stored.h describes them, x in bfloat16, for any number of
// rows.
//
// A code is looked up: a table of up to 64 bfloat16 numbers lies in one or two registers, and VPERMW
// turns 32 codes into 32 weights, without the scale. (AVX2 looks up to four bits up by bytes, and
// converts more, whose weights follow one another.) VDPBF16PS sums a group's products in float32,
// and only the sum is multiplied by the group's scale: nothing is rounded but what the table rounds.
// Zeros and minimums meet the sum of a group's inputs, which is computed once.
//
// Codes are looked up in the registers of the product, again for every tile of rows: the units that
// permute and shift are not those that multiply. Where it takes more than a permutation, many rows
// pay for looking a piece up once, into the first-level cache. An output is a sum in
// one order whatever the number of rows: a row's result does not depend on its batch.
#include "output.h"
#include "stored.h"

#include <string.h>

enum {
    BLOCK = STORED_BLOCK,
    LANES = STORED_LANES,
    VECTORS = STORED_VECTORS,
    LINE = STORED_LINE,
    ROW_TILE = 6,
#ifdef __AVX512F__
    DIRECT_TILE = 6,
#else
    DIRECT_TILE = 3,
#endif
    GROUP_ROWS = 48,      // rows that take turns on a piece
    DIRECT_INPUTS = 256,  // of a piece whose codes several tiles of rows look up
    DENSE_INPUTS = 128,   // of a piece that is looked up once
    PIECE_GROUPS = 16,
    FEW_GROUPS = 8,       // of a piece that one tile of rows reads: their numbers come meanwhile
    STREAM_AHEAD = 8192,  // bytes
    DENSE_AHEAD = 4096,
    NUMBERS_AHEAD = 1024,
};

// --- sums of a group's inputs -------------------------------------------------------------------

static void sum_groups(float *sums, const bf16 *x, int64_t inputs, int64_t group) {
    for (int64_t k = 0, g = 0; k < inputs; k += group, g++) {
        const int64_t end = ss_min(inputs, k + group);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = k; i < end; i += LANES)
            sum = _mm512_add_ps(sum, ss_load_masked(x + i, ss_mask(end - i)));
        sums[g] = _mm512_reduce_add_ps(sum);
    }
}

enum { SUMS_GROUP = PRODUCT_ARGS };  // inputs of a group

static int64_t sums_units(const ss_context *context, const int64_t *args) {
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    return each_its_own(args, rows) ? 0 : rows;
}

static void sums_run(const ss_context *context, const int64_t *args, int64_t unit,
                     int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    const int64_t row = ss_first_row(context, args[ROWS_KIND]) + unit;
    const int64_t inputs = args[INPUTS], group = args[SUMS_GROUP];
    sum_groups((float *)args[WORK] + row * ss_ceil_div(inputs, group),
               (const bf16 *)args[X] + row * args[X_STRIDE], inputs, group);
}

const ss_operation ss_stored_sums = {sums_units, sums_run, 0};

// --- 32 weights: 16 outputs, two inputs each ----------------------------------------------------

// What codes of up to 4, and of 5 and 6 bits stand for; the latter are numbers from `first` on.
typedef struct {
    ss_table few;
    __m512i low, high;
    __m512 first;
} lookup;

SS_INLINE __m512i words(const uint8_t *at, int line) {
    return _mm512_loadu_si512(at + LINE * line);
}

// Bits `from` and up of each word, at bit `to`; what lies beside them is rubbish.
SS_INLINE __m512i moved(__m512i word, int from, int to) {
    return from > to ? _mm512_srli_epi16(word, (unsigned)(from - to))
         : from < to ? _mm512_slli_epi16(word, (unsigned)(to - from))
                     : word;
}

SS_INLINE __m512i joined(__m512i low, __m512i high, int low_bits) {
    const __m512i mask = _mm512_set1_epi16((short)((1 << low_bits) - 1));
    return _mm512_ternarylogic_epi32(mask, low, high, 0xca);  // mask ? low : high
}

// Codes of which every line has a bit, the highest.
SS_INLINE __m512i last_bits(const uint8_t *at, int bits) {
    __m512i code = moved(words(at, 0), 15, 0);
#pragma GCC unroll 4
    for (int line = 1; line < bits; line++)
        code = joined(code, moved(words(at, line), 15, line), line);
    return code;
}

// The codes of up to 6 bits of pair `p` of a step, with rubbish above them.
SS_INLINE __m512i codes_of(int kind, const uint8_t *at, int p) {
    switch (kind) {
        case CODES_2: return moved(words(at, 0), 2 * p, 0);
        case CODES_3:
            return p < 15 ? moved(words(at, p / 5), 3 * (p % 5), 0) : last_bits(at, 3);
        case CODES_4: return moved(words(at, 0), 4 * p, 0);
        case CODES_5:
            return p < 15 ? moved(words(at, p / 3), 5 * (p % 3), 0) : last_bits(at, 5);
        default:
            return p < 6 ? moved(words(at, p / 2), 6 * (p % 2), 0)
                         : joined(moved(words(at, p - 6), 12, 0),
                                  moved(words(at, 2), 12 + 2 * (p - 6), 4), 4);
    }
}

#if SS_WIDENS

// Whether a part is computed as the float32 number that it is, without a table.
#ifdef __AVX512F__
#define COMPUTED(kind) ((kind) >= CODES_INT8 && (kind) < DENSE)
#else
#define COMPUTED(kind) ((kind) >= CODES_5 && (kind) < DENSE)
#endif

SS_INLINE __m512 computed_part(int kind, const uint8_t *at, int p, int part, lookup table) {
    if (kind < CODES_INT8) {
        const __m512i code = codes_of(kind, at, p);
        const int mask = kind == CODES_5 ? 31 : 63;
        const __m512i one = _mm512_and_si512(part ? _mm512_srli_epi32(code, 16) : code,
                                             _mm512_set1_epi32(mask));
        return _mm512_add_ps(_mm512_cvtepi32_ps(one), table.first);
    }
    const __m256i bytes = _mm256_loadu_si256((const __m256i *)(at + 32 * p));
    if (kind == CODES_INT8)
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(bytes), part ? 16 : 24), 24));
    // As float16 with the same exponent bits it is 256 times too small: scales make up.
    const __m256i upper = part ? bytes : _mm256_slli_epi16(bytes, 8);
    return _mm512_cvtph_ps(
        _mm256_and_si256(_mm256_srai_epi16(upper, 1), _mm256_set1_epi16((short)0xbf80)));
}

#else
#define COMPUTED(kind) 0
#endif

// The weights of pair `p` of a step; tables are periodic, so rubbish above a code does not matter.
SS_INLINE __m512i unpacked(int kind, const uint8_t *at, int p, lookup table) {
#if SS_WIDENS
    if (COMPUTED(kind)) {  // their lower halves are zeros
        const __m512 first = computed_part(kind, at, p, 0, table);
        const __m512 second = computed_part(kind, at, p, 1, table);
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16),
                               _mm512_castps_si512(second));
    }
#endif
    switch (kind) {
        case CODES_2:
        case CODES_3:
        case CODES_4: return ss_look_up(codes_of(kind, at, p), table.few);
#ifdef __AVX512F__
        case CODES_5: return _mm512_permutexvar_epi16(codes_of(kind, at, p), table.low);
        case CODES_6:
            return _mm512_permutex2var_epi16(table.low, codes_of(kind, at, p), table.high);
#endif
        case CODES_INT8: {
            const __m128i *from = (const __m128i *)(at + 32 * p);
            const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
            const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
            return (__m512i)_mm512_cvtne2ps_pbh(high, low);
        }
        case CODES_FLOAT8: {
            // Like computed_part.
            const __m512i wide =
                _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(at + 32 * p)));
            const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7),
                                                  _mm512_set1_epi16((short)0xbfff));
            return (__m512i)_mm512_cvtne2ps_pbh(
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)),
                _mm512_cvtph_ps(_mm512_castsi512_si256(half)));
        }
        default: return words(at, 0);
    }
}

// One part of it as a factor: see simd.h.
SS_INLINE ss_elements unpacked_part(int kind, const uint8_t *at, int p, int part, lookup table) {
#if SS_WIDENS
    if (COMPUTED(kind)) return computed_part(kind, at, p, part, table);
#endif
    return ss_pairs_part(unpacked(kind, at, p, table), part);
}

SS_INLINE lookup lookup_of(const stored_weight *w) {
    const __m512i low = _mm512_loadu_si512(w->table), high = _mm512_loadu_si512(w->table + 32);
    return (lookup){ss_table_of(low), low, high, _mm512_set1_ps(ss_widen(w->table[0]))};
}

// --- many rows: a piece of the weight, looked up once -------------------------------------------

SS_INLINE void unpack(bf16 *dense, const uint8_t *codes, int64_t steps, lookup table, int kind) {
    const int pairs = stored_step(kind) / 2, bytes = LINE * stored_lines(kind);
    for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++, codes += bytes) {
            _mm_prefetch((const char *)codes + DENSE_AHEAD, _MM_HINT_T1);
#pragma GCC unroll 16
            for (int p = 0; p < pairs; p++)
                _mm512_store_si512(dense + ((s * pairs + p) * VECTORS + v) * 32,
                                   unpacked(kind, codes, p, table));
        }
}

static void unpack_piece(bf16 *dense, const uint8_t *codes, int64_t steps,
                         const stored_weight *w) {
    const lookup table = lookup_of(w);
    switch (w->kind) {
        case CODES_2: unpack(dense, codes, steps, table, CODES_2); break;
        case CODES_3: unpack(dense, codes, steps, table, CODES_3); break;
        case CODES_4: unpack(dense, codes, steps, table, CODES_4); break;
        case CODES_5: unpack(dense, codes, steps, table, CODES_5); break;
        case CODES_6: unpack(dense, codes, steps, table, CODES_6); break;
        case CODES_INT8: unpack(dense, codes, steps, table, CODES_INT8); break;
        default: unpack(dense, codes, steps, table, CODES_FLOAT8); break;
    }
}

// --- R rows x 64 outputs: constants wherever these are inlined ----------------------------------

enum { NO_OFFSETS, ZEROS, MINIMUMS };

// Adjacent groups of a block, or a part of one that is too long to be looked up at once.
typedef struct {
    const uint8_t *codes;
    int64_t inputs, group;   // of a part: both its own
    const float *scales;     // [groups][64]
    const float *offsets;    // [groups][64]
    int offsets_are;
    int goes_on, ends;       // a part: whether it is not the first, and whether it is the last
    const float *sums;       // of groups of inputs [rows][sums_stride]
    int64_t sums_stride;
} piece;

// totals[r] += scale · (a[r] - zero · sum of inputs), or scale · a[r] - minimum · sum of inputs.
SS_INLINE void close_as(float *totals, __m512 a[ROW_TILE][VECTORS], const float *scales,
                        const float *offsets, const float *sums, int64_t sums_stride, int are,
                        int count, int R) {
    __asm__ volatile("" ::: "memory");  // else all totals are loaded before it is known what to do
#pragma GCC unroll 4
    for (int v = 0; v < count; v++) {
        const __m512 scale = _mm512_load_ps(scales + LANES * v);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            float *to = totals + r * BLOCK + LANES * v;
            __m512 sum = a[r][v], total = _mm512_load_ps(to);
            if (are != NO_OFFSETS) {
                const __m512 offset = _mm512_load_ps(offsets + LANES * v);
                const __m512 inputs = _mm512_set1_ps(sums[r * sums_stride]);
                if (are == ZEROS)
                    sum = _mm512_fnmadd_ps(offset, inputs, sum);
                else
                    total = _mm512_fnmadd_ps(offset, inputs, total);
            }
            _mm512_store_ps(to, _mm512_fmadd_ps(scale, sum, total));
        }
    }
}

SS_INLINE void close_group(float *totals, __m512 a[ROW_TILE][VECTORS], const piece *p, int64_t g,
                           int v, int count, int R) {
    const int64_t first = g * BLOCK + LANES * v;
    const float *scales = p->scales + first, *offsets = p->offsets + first;
    const float *sums = p->sums + g;
    const int64_t stride = p->sums_stride;
    if (p->offsets_are == NO_OFFSETS)
        close_as(totals, a, scales, offsets, sums, stride, NO_OFFSETS, count, R);
    else if (p->offsets_are == ZEROS)
        close_as(totals, a, scales, offsets, sums, stride, ZEROS, count, R);
    else
        close_as(totals, a, scales, offsets, sums, stride, MINIMUMS, count, R);
}

// a[r][j] += x[r] · the weights of a step and vector v + j. `count`, the vectors, is a constant too.
SS_INLINE void add_step(__m512 a[ROW_TILE][VECTORS], const ss_factor *x, int64_t x_stride,
                        const uint8_t *codes, lookup table, int64_t ahead, int kind, int v,
                        int count, int R) {
    const int pairs = stored_step(kind) / 2, bytes = LINE * stored_lines(kind);
    codes += v * bytes;
    if (ahead)
#pragma GCC unroll 20
        for (int line = 0; line < count * bytes; line += LINE)
            _mm_prefetch((const char *)(codes + ahead + line), _MM_HINT_T1);
#pragma GCC unroll 16
    for (int p = 0; p < pairs; p++) {
#pragma GCC unroll 2
        for (int part = 0; part < SS_PARTS; part++) {
            ss_elements weights[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < count; j++)
                weights[j] = unpacked_part(kind, codes + j * bytes, p, part, table);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const ss_elements factor = ss_factor_part(x + r * x_stride + 2 * p, part);
#pragma GCC unroll 4
                for (int j = 0; j < count; j++)
                    a[r][j] = ss_multiply_add(factor, weights[j], a[r][j]);
            }
        }
    }
}

SS_INLINE void multiply(float *sums, float *totals, const ss_factor *x, int64_t x_stride,
                        const piece *p, lookup table, int64_t ahead, int kind, int R) {
    const int step = stored_step(kind), step_bytes = VECTORS * LINE * stored_lines(kind);
    const int count = SS_VECTORS(R);
    for (int64_t from = 0, g = 0; from < p->inputs; from += p->group, g++) {
        const int64_t end = ss_min(p->inputs, from + p->group);
        for (int v = 0; v < VECTORS; v += count) {
            __m512 a[ROW_TILE][VECTORS];
            for (int r = 0; r < R; r++)
                for (int j = 0; j < count; j++)
                    a[r][j] = p->goes_on ? _mm512_load_ps(sums + r * BLOCK + LANES * (v + j))
                                         : _mm512_setzero_ps();
            const uint8_t *codes = p->codes + from / step * step_bytes;
            for (int64_t k = from; k < end; k += step, codes += step_bytes)
                add_step(a, x + k, x_stride, codes, table, ahead, kind, v, count, R);
            if (p->ends) {
                close_group(totals + LANES * v, a, p, g, v, count, R);
                continue;
            }
            for (int r = 0; r < R; r++)
                for (int j = 0; j < count; j++)
                    _mm512_store_ps(sums + r * BLOCK + LANES * (v + j), a[r][j]);
        }
    }
}

typedef void multiply_function(float *sums, float *totals, const ss_factor *x,
                               int64_t x_stride, const piece *p, const stored_weight *w);

#define MULTIPLY(kind, R, ahead)                                                                  \
    static void multiply_##kind##_##R(float *sums, float *totals, const ss_factor *x,             \
                                      int64_t x_stride, const piece *p, const stored_weight *w) { \
        if (R > (kind == DENSE ? ROW_TILE : DIRECT_TILE)) __builtin_unreachable();                \
        multiply(sums, totals, x, x_stride, p, lookup_of(w), ahead, kind, R);                     \
    }
#define ALL_ROWS(kind, ahead)                                                                     \
    MULTIPLY(kind, 1, ahead)                                                                      \
    MULTIPLY(kind, 2, ahead)                                                                      \
    MULTIPLY(kind, 3, ahead)                                                                      \
    MULTIPLY(kind, 4, ahead)                                                                      \
    MULTIPLY(kind, 5, ahead)                                                                      \
    MULTIPLY(kind, 6, ahead)
ALL_ROWS(CODES_2, STREAM_AHEAD)
ALL_ROWS(CODES_3, STREAM_AHEAD)
ALL_ROWS(CODES_4, STREAM_AHEAD)
ALL_ROWS(CODES_5, STREAM_AHEAD)
ALL_ROWS(CODES_6, STREAM_AHEAD)
ALL_ROWS(CODES_INT8, STREAM_AHEAD)
ALL_ROWS(CODES_FLOAT8, STREAM_AHEAD)
ALL_ROWS(DENSE, 0)
#define OF(kind)                                                                                  \
    {multiply_##kind##_1, multiply_##kind##_2, multiply_##kind##_3,                               \
     multiply_##kind##_4, multiply_##kind##_5, multiply_##kind##_6}
static multiply_function *const MULTIPLY_OF[NUM_KINDS + 1][ROW_TILE] = {
    OF(CODES_2), OF(CODES_3),    OF(CODES_4),      OF(CODES_5),
    OF(CODES_6), OF(CODES_INT8), OF(CODES_FLOAT8), OF(DENSE),
};

// --- the numbers of groups ----------------------------------------------------------------------

typedef struct {
    const stored_weight *w;
    int64_t block, groups;
    const float *inputs;  // sums of groups [rows][groups], where there are offsets
} position;

SS_INLINE __m512 half(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

SS_INLINE void fetch(const void *at) {
    _mm_prefetch((const char *)at + NUMBERS_AHEAD, _MM_HINT_T1);
}

// Groups `g` to `end` of codes, times the units that some of them share.
SS_INLINE void read_factored(float *to, const stored_numbers *numbers, const position *at,
                             int64_t g, int64_t end, int is_half) {
    const int64_t units = ((at->groups - 1) >> numbers->shift) + 1;
    const int8_t *codes = (const int8_t *)numbers->values + (at->block * at->groups + g) * BLOCK;
    while (g < end) {
        const int64_t shared = g >> numbers->shift;
        const int64_t last = ss_min(end, (shared + 1) << numbers->shift);
        const int64_t place = (at->block * units + shared) * BLOCK;
        __m512 unit[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            unit[v] = is_half ? half((const uint16_t *)numbers->units + place + LANES * v)
                              : _mm512_loadu_ps((const float *)numbers->units + place + LANES * v);
        fetch((const char *)numbers->units + place * (is_half ? 2 : 4));
        for (; g < last; g++, codes += BLOCK, to += BLOCK) {
            fetch(codes);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                const __m512i code =
                    _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + LANES * v)));
                _mm512_store_ps(to + LANES * v, _mm512_mul_ps(_mm512_cvtepi32_ps(code), unit[v]));
            }
        }
    }
}

// The numbers of `count` groups from g on [count][64].
static void read_numbers(float *to, const stored_numbers *numbers, const position *at, int64_t g,
                         int64_t count) {
    const int64_t first = (at->block * at->groups + g) * BLOCK;
    switch (numbers->form) {
        case FACTORED_HALF: read_factored(to, numbers, at, g, g + count, 1); break;
        case FACTORED_FLOAT: read_factored(to, numbers, at, g, g + count, 0); break;
        case HALF_NUMBERS: {
            const uint16_t *from = (const uint16_t *)numbers->values + first;
            for (int64_t i = 0; i < count * BLOCK; i += LANES) {
                if (i % 32 == 0) fetch(from + i);
                _mm512_store_ps(to + i, half(from + i));
            }
            break;
        }
        case FLOAT_NUMBERS: {
            const float *from = (const float *)numbers->values + first;
            for (int64_t i = 0; i < count * BLOCK; i += LANES) {
                fetch(from + i);
                _mm512_store_ps(to + i, _mm512_loadu_ps(from + i));
            }
            break;
        }
        default:
            for (int64_t i = 0; i < count * BLOCK; i += LANES)
                _mm512_store_ps(to + i, _mm512_set1_ps(1.0f));
    }
}

// --- a block of 64 outputs ----------------------------------------------------------------------

// Rows up to which it is faster to look codes up again and again.
static int64_t most_direct_rows(int kind) {
#ifdef __AVX512F__
    return kind == CODES_FLOAT8 ? 14 : kind == CODES_INT8 ? 24 : GROUP_ROWS;
#else
    (void)kind;
    return DIRECT_TILE;
#endif
}

// totals [rows][64] = x [rows][K] · the block's weights.
static void multiply_block(const position *at, const bf16 *x, int64_t x_stride, int64_t rows,
                           float *sums, float *totals) {
    const stored_weight *w = at->w;
    const int kind = (int)w->kind, step = stored_step(kind);
    const int64_t step_bytes = VECTORS * LINE * stored_lines(kind);
    const uint8_t *codes = w->codes + at->block * (w->inputs / step) * step_bytes;
    const int64_t tiles = ss_ceil_div(rows, ROW_TILE);
    const int is_dense = rows > most_direct_rows(kind), has_offsets = w->offsets.form != NO_NUMBERS;
    const int64_t most = is_dense                         ? DENSE_INPUTS
                       : tiles == 1 && !SS_WIDENS ? w->inputs
                                                          : DIRECT_INPUTS;
    bf16 dense[DENSE_INPUTS * BLOCK] __attribute__((aligned(64)));
    float scales[PIECE_GROUPS * BLOCK] __attribute__((aligned(64)));
    float offsets[PIECE_GROUPS * BLOCK] __attribute__((aligned(64)));
    memset(totals, 0, (size_t)(rows * BLOCK) * sizeof(float));
    for (int64_t k = 0; k < w->inputs;) {
        const int64_t g = k / w->group, in_group = k - g * w->group;
        const int64_t most_groups = rows <= ROW_TILE ? FEW_GROUPS : PIECE_GROUPS;
        const int64_t whole = ss_min(most_groups, most / w->group) * w->group;
        // Whole groups, or what is left of one, but not too much of it.
        const int64_t count = whole ? ss_min(whole, w->inputs - k)
                                    : ss_min(most, ss_min(w->inputs - k, w->group - in_group));
        const int64_t groups = ss_ceil_div(count, w->group);
        piece p = {
            .codes = codes + k / step * step_bytes,
            .inputs = count,
            .group = w->group,
            .scales = scales,
            .offsets = offsets,
            .offsets_are = !has_offsets ? NO_OFFSETS : w->offsets_are_zeros ? ZEROS : MINIMUMS,
            .goes_on = in_group > 0,
            .ends = whole || k + count == ss_min(w->inputs, (g + 1) * w->group),
            .sums = has_offsets ? at->inputs + g : 0,
            .sums_stride = at->groups,
        };
        read_numbers(scales, &w->scales, at, g, groups);
        if (has_offsets) read_numbers(offsets, &w->offsets, at, g, groups);
        if (is_dense) {
            unpack_piece(dense, p.codes, count / step, w);
            p.codes = (const uint8_t *)dense;
        }
        multiply_function *const *of = MULTIPLY_OF[is_dense ? DENSE : kind];
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t m = rows * t / tiles, tile_rows = rows * (t + 1) / tiles - m;
            const bf16 *tile_x = x + m * x_stride + k;
#if SS_WIDENS
            float factors[ROW_TILE * DIRECT_INPUTS] __attribute__((aligned(64)));
            const int64_t stride = DIRECT_INPUTS;
            for (int64_t j = 0; j < tile_rows; j++)
                ss_widen_row(factors + j * stride, tile_x + j * x_stride, count);
#else
            const ss_factor *factors = tile_x;
            const int64_t stride = x_stride;
#endif
            piece mine = p;
            if (has_offsets) mine.sums += m * at->groups;
            of[tile_rows - 1](sums + m * BLOCK, totals + m * BLOCK, factors, stride, &mine, w);
        }
        k += count;
    }
}

// --- the operation ------------------------------------------------------------------------------

static int64_t units(const ss_context *context, const int64_t *args) {
    const stored_weight *w = (const stored_weight *)args[WEIGHT];
    return ss_rows(context, args[ROWS_KIND]) ? ss_ceil_div(w->outputs, BLOCK) : 0;
}

// Sums of the inputs of each row's groups: the thread's own, if rows are few.
static const float *group_sums(const ss_context *context, const int64_t *args, int thread) {
    const stored_weight *w = (const stored_weight *)args[WEIGHT];
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    if (!args[WORK]) return 0;
    if (!each_its_own(args, rows))
        return (const float *)args[WORK] +
               ss_first_row(context, args[ROWS_KIND]) * stored_groups(w);
    float *own = (float *)((char *)args[OWN] + thread * args[OWN_STRIDE]);
    int64_t *done = (int64_t *)args[DONE] + DONE_STRIDE * thread;
    if (!*done)
        for (int64_t r = 0; r < rows; r++)
            sum_groups(own + r * stored_groups(w), (const bf16 *)args[X] + r * args[X_STRIDE],
                       w->inputs, w->group);
    *done = 1;
    return own;
}

static void run(const ss_context *context, const int64_t *args, int64_t unit, int64_t num_units,
                int thread) {
    (void)num_units;
    const stored_weight *w = (const stored_weight *)args[WEIGHT];
    const int64_t rows = ss_rows(context, args[ROWS_KIND]), x_stride = args[X_STRIDE];
    const int64_t first = unit * BLOCK, columns = ss_min(BLOCK, w->outputs - first);
    const ss_output out = ss_output_of(context, args, (const void *)args[BIAS], 1, thread);
    const float *inputs = group_sums(context, args, thread);
    const int64_t turns = ss_ceil_div(rows, GROUP_ROWS), groups = stored_groups(w);
    const int64_t first_row = ss_first_row(context, args[ROWS_KIND]);
    const bf16 *x = (const bf16 *)args[X] + first_row * x_stride;
    float sums[GROUP_ROWS * BLOCK] __attribute__((aligned(64)));
    float totals[GROUP_ROWS * BLOCK] __attribute__((aligned(64)));
    for (int64_t i = 0; i < turns; i++) {
        const int64_t m = rows * i / turns, count = rows * (i + 1) / turns - m;
        const position at = {w, unit, groups, inputs ? inputs + m * groups : 0};
        multiply_block(&at, x + m * x_stride, x_stride, count, sums, totals);
        for (int64_t j = 0; j < count; j++)
            ss_put_row(&out, first_row + m + j, first, columns, totals + j * BLOCK);
    }
}

const ss_operation ss_stored_linear = {units, run, ss_begin_product};
