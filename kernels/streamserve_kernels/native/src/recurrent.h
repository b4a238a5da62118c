// Where a step's sequences have their states, and gates. See recurrent.c and rules.c.
#ifndef RECURRENT_H
#define RECURRENT_H

#include "streamserve.h"

// A sequence of the step: its rows, and where its state is.
typedef struct {
    int64_t begin, end;
    int64_t slot;  // -1: nothing is kept
    int starts;    // from zeros
} sequence;

static inline sequence sequence_of(const ss_step *step, int64_t r) {
    const int64_t begin = step->query_start_loc[r], end = step->query_start_loc[r + 1];
    const int64_t slot = step->state_slots[r];
    return (sequence){begin, end, slot, slot < 0 || step->seq_lens[r] == end - begin};
}

// The first row behind all sequences.
static inline int64_t rows_in_use(const ss_step *step) {
    return step->num_requests ? step->query_start_loc[step->num_requests] : 0;
}

// Whether a step's rows and slots are there: the operations follow them without looking.
static inline int slots_begin(const ss_step *step, int64_t num_slots) {
    if (step->num_requests && !step->state_slots) return SS_BAD_PLAN;
    if (step->num_tokens && !step->state_saves) return SS_BAD_PLAN;
    const int32_t *starts = step->query_start_loc;
    int64_t bad = step->num_requests && starts[0] != 0;
    for (int64_t r = 0; r < step->num_requests; r++) {
        const int64_t length = starts[r + 1] - (int64_t)starts[r];
        bad |= (length < 0) | (step->seq_lens[r] < length);
        bad |= (step->state_slots[r] < -1) | (step->state_slots[r] >= num_slots);
    }
    for (int64_t t = 0; t < step->num_tokens; t++)
        bad |= (step->state_saves[t] < -1) | (step->state_saves[t] >= num_slots);
    return bad || rows_in_use(step) > step->num_tokens ? SS_BAD_PLAN : SS_OK;
}

static inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = ss_exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(one, _mm512_add_ps(one, e));
}

static inline __m512 silu(__m512 x) {
    const __m512 e = ss_exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

#endif
