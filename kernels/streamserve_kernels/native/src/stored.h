// A weight that somebody else quantised, as the products of stored_linear.c read it.
//
// Outputs are in blocks of 64, four vectors of 16. A *line* is 64 bytes, 16-bit words [16][2]: the
// words (n, i) of a step's lines hold the codes of inputs i, 2 + i, 4 + i … of output n. A *step* is
// the inputs that fill whole lines:
//
//     kind        step   lines of a vector
//     codes 2     16     one: eight codes in a word, lowest bits first
//     codes 3     32     three: five codes in each word; of the last one a bit in each, the highest
//     codes 4     8      one: four codes in a word
//     codes 5     32     five: three codes in each word; of the last one a bit in each
//     codes 6     16     three: two codes in each word; of the last two the low bits above those in
//                        the first two words, the high bits in the third
//     int8        4      one: bytes [2][16][2], two pairs of inputs
//     float8      4      the same
//
// so that most codes are a shift away from the low bits of a word. A weight is
// [N / 64][K / step][4][lines]. Scales, and zeros or minimums, are [N / 64][G][64].
#ifndef STREAMSERVE_STORED_H
#define STREAMSERVE_STORED_H

#include "output.h"

// Behind what all products begin with.
enum {
    WEIGHT = PRODUCT_ARGS,  // address of the weight's description
    BIAS,                   // address of the bias [N], float32, or 0
};

enum { STORED_BLOCK = 64, STORED_LANES = 16, STORED_VECTORS = 4, STORED_LINE = 64 };

enum {
    CODES_2,
    CODES_3,
    CODES_4,
    CODES_5,
    CODES_6,
    CODES_INT8,
    CODES_FLOAT8,
    NUM_KINDS,
    DENSE = NUM_KINDS,  // bfloat16 [K / 2][4][16][2]: what a piece is unpacked to for many rows
};

enum { NO_NUMBERS, HALF_NUMBERS, FLOAT_NUMBERS, FACTORED_HALF, FACTORED_FLOAT };

// One number for each output and group.
typedef struct {
    int64_t form;
    const void *values;  // float16 or float32; factored: int8
    const void *units;   // factored: [N / 64][ceil(G / 2**shift)][64], float16 or float32
    int64_t shift;
} stored_numbers;

// Mirrored by stored_linear.py.
typedef struct {
    int64_t kind, outputs, inputs;
    int64_t group;  // inputs that share a scale, whole steps
    const uint8_t *codes;
    const bf16 *table;    // [64]: what a code of up to 6 bits stands for, periodic; of 5 and 6 bits
                          // numbers one after the other
    const float *values;  // [256]: the same, exact, for every kind
    stored_numbers scales, offsets;
    int64_t offsets_are_zeros;  // subtracted from codes, else from weights
} stored_weight;

static inline int stored_step(int kind) {
    return kind == CODES_4 ? 8 : kind == CODES_3 || kind == CODES_5 ? 32
         : kind == CODES_2 || kind == CODES_6                       ? 16
         : kind == DENSE                                            ? 2
                                                                    : 4;
}

// Lines of 16 outputs in a step.
static inline int stored_lines(int kind) {
    return kind == CODES_5 ? 5 : kind == CODES_3 || kind == CODES_6 ? 3 : 1;
}

// Bits of a code: of a word of a line, from the lowest of them on, and their place in the code.
typedef struct {
    int line, bit, bits, shift;
} stored_part;

enum { STORED_PARTS = 5 };

// Where pair `p` of a step has its codes of up to 6 bits; returns in how many parts.
static inline int stored_parts(int kind, int p, stored_part parts[STORED_PARTS]) {
    const int bits = kind == CODES_2 ? 2 : kind == CODES_3 ? 3 : kind == CODES_4 ? 4
                   : kind == CODES_5 ? 5 : 6;
    const int in_word = 16 / bits, whole = in_word * stored_lines(kind);
    if (p < whole) {
        parts[0] = (stored_part){p / in_word, bits * (p % in_word), bits, 0};
        return 1;
    }
    if (kind == CODES_6) {
        parts[0] = (stored_part){p - whole, 12, 4, 0};
        parts[1] = (stored_part){2, 12 + 2 * (p - whole), 2, 4};
        return 2;
    }
    for (int line = 0; line < bits; line++) parts[line] = (stored_part){line, 15, 1, line};
    return bits;
}

static inline int64_t stored_byte(int64_t n, int64_t k) { return k / 2 * 32 + 2 * n + k % 2; }

// The code of output `n` (of 16) and input `k` of a step.
static inline int stored_get(int kind, const uint8_t *step, int64_t n, int64_t k) {
    if (kind >= CODES_INT8) return step[stored_byte(n, k)];
    const uint16_t *words = (const uint16_t *)step + 2 * n + k % 2;
    stored_part parts[STORED_PARTS];
    int code = 0;
    for (int i = stored_parts(kind, (int)(k / 2), parts) - 1; i >= 0; i--) {
        const int word = words[STORED_LINE / 2 * parts[i].line] >> parts[i].bit;
        code |= (word & ((1 << parts[i].bits) - 1)) << parts[i].shift;
    }
    return code;
}

// Writes it where there are zeros.
static inline void stored_put(int kind, uint8_t *step, int64_t n, int64_t k, int code) {
    if (kind >= CODES_INT8) {
        step[stored_byte(n, k)] = (uint8_t)code;
        return;
    }
    uint16_t *words = (uint16_t *)step + 2 * n + k % 2;
    stored_part parts[STORED_PARTS];
    for (int i = stored_parts(kind, (int)(k / 2), parts) - 1; i >= 0; i--) {
        const int bits = (code >> parts[i].shift) & ((1 << parts[i].bits) - 1);
        words[STORED_LINE / 2 * parts[i].line] |= (uint16_t)(bits << parts[i].bit);
    }
}

static inline int64_t stored_groups(const stored_weight *w) {
    return ss_ceil_div(w->inputs, w->group);
}

#endif
