// Runs the instructions of a program in one parallel region.
#include "streamserve.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <sched.h>
#include <string.h>

// In the order of library.py's OPERATIONS.
static const ss_operation *const OPERATIONS[] = {
    &ss_embedding, &ss_gather_rows, &ss_rms_norm, &ss_layer_norm, &ss_rotary_write,
    &ss_gated,     &ss_activation,  &ss_add,      &ss_scale,      &ss_linear,
    &ss_argmax,    &ss_attend,      &ss_attend_merge, &ss_copy_blocks,
    &ss_quantise,  &ss_linear_quant, &ss_embedding_quant, &ss_pack_quant,
    &ss_stored_sums, &ss_stored_linear, &ss_stored_pack, &ss_stored_rows, &ss_gather_inputs,
    &ss_table_linear,
    &ss_adapt_down, &ss_adapt_up,
    &ss_route, &ss_order_pairs, &ss_gather_pairs, &ss_experts, &ss_combine_pairs, &ss_add_shared,
    &ss_draw, &ss_top_logits,
    &ss_causal_conv, &ss_delta_scales, &ss_delta_rule, &ss_gated_norm, &ss_sigmoid_gate,
    &ss_state_space_times, &ss_state_space, &ss_norm_of_gated,
    &ss_multiply, &ss_by_head,
};
enum { NUM_OPERATIONS = sizeof(OPERATIONS) / sizeof(OPERATIONS[0]) };

const ss_operation *ss_operation_of(const ss_instruction *instruction) {
    return OPERATIONS[instruction->op];
}

// Turns of waiting before the core is offered to somebody else: about 20 µs.
enum { SPINS = 400 };

typedef struct {
    _Alignas(64) atomic_llong count;
} counter;

// What Python holds of a program. Mirrored by library.py.
typedef struct {
    const ss_instruction *instructions;
    int64_t num_instructions;
    // For each of the sizes that attention has: Hq, Hkv, Dv, S, whether any such has a window, blocks
    // of the caches.
    int64_t attention[SS_MAX_PLANS][6];
    int64_t num_plans;
    // For each instruction: the units finished, then for each thread those taken of its range.
    counter *counters;
    int64_t max_threads;
    ss_plans plans[SS_MAX_PLANS];
} ss_program;

typedef struct {
    ss_program *program;
    ss_context context;
    int (*thread_num)(void);
} region;

// Changes with every change of a structure or of an operation's arguments: library.py checks it.
int ss_abi(void) { return 19; }

void ss_program_free(ss_program *program) {
    if (!program) return;
    free(program->counters);
    for (int64_t i = 0; i < SS_MAX_PLANS; i++) {
        ss_plan_free(program->plans[i].plan);
        ss_plan_free(program->plans[i].without_groups);
    }
    free(program);
}

ss_program *ss_program_new(const ss_instruction *instructions, int64_t count,
                           const int64_t *attention, int64_t num_plans) {
    ss_program *program = num_plans <= SS_MAX_PLANS ? calloc(1, sizeof(ss_program)) : 0;
    if (!program) return 0;
    program->instructions = instructions;
    program->num_instructions = count;
    program->num_plans = num_plans;
    memcpy(program->attention, attention, (size_t)num_plans * sizeof(program->attention[0]));
    for (int64_t i = 0; i < num_plans; i++) {
        program->plans[i] = (ss_plans){ss_plan_new(), ss_plan_new()};
        if (program->plans[i].plan && program->plans[i].without_groups) continue;
        ss_program_free(program);
        return 0;
    }
    return program;
}

static void wait_for(atomic_llong *done, int64_t units) {
    for (int spins = 0; atomic_load_explicit(done, memory_order_acquire) < units; spins++) {
        if (spins < SPINS)
            _mm_pause();
        else
            sched_yield();
    }
}

static void work(void *argument) {
    const region *r = argument;
    const ss_program *program = r->program;
    const int thread = r->thread_num ? r->thread_num() : 0, threads = r->context.num_threads;
    for (int64_t i = 0; i < program->num_instructions; i++) {
        const ss_instruction *instruction = program->instructions + i;
        const ss_operation *operation = ss_operation_of(instruction);
        counter *done = program->counters + i * (threads + 1);
        const int64_t units = operation->units(&r->context, instruction->args);
        for (int other = 0; other < threads; other++) {
            const int owner = (thread + other) % threads;
            atomic_llong *taken = &done[1 + owner].count;
            const int64_t first = units * owner / threads, end = units * (owner + 1) / threads;
            int64_t unit;
            while ((unit = first + atomic_fetch_add_explicit(taken, 1, memory_order_relaxed)) <
                   end) {
                operation->run(&r->context, instruction->args, unit, units, thread);
                atomic_fetch_add_explicit(&done->count, 1, memory_order_release);
            }
        }
        wait_for(&done->count, units);
    }
}

static int reset_counters(ss_program *program, int num_threads) {
    if (num_threads > program->max_threads) {
        free(program->counters);
        program->max_threads = 0;
        program->counters = aligned_alloc(
            64, (size_t)(program->num_instructions * (num_threads + 1)) * sizeof(counter));
        if (!program->counters) return -1;
        program->max_threads = num_threads;
    }
    for (int64_t i = 0; i < program->num_instructions * (num_threads + 1); i++)
        atomic_init(&program->counters[i].count, 0);
    return 0;
}

// Whether a step stays within its tables and caches. Once a step, before anything is written: the
// operations follow what it says without looking. It costs a pass over what attention reads anyway.
static int is_sound(const ss_step *step, int64_t block_size, int64_t num_blocks) {
    const int32_t *starts = step->query_start_loc;
    int64_t bad = step->num_requests > 0 && starts[0] != 0;
    for (int64_t r = 0; r < step->num_requests && !bad; r++) {
        const int64_t length = starts[r + 1] - (int64_t)starts[r];
        const int64_t used = ss_ceil_div(step->seq_lens[r], block_size);
        bad |= (length < 0) | (step->seq_lens[r] < length) | (used > step->table_stride);
        if (bad) break;
        const int32_t *blocks = step->block_table + r * step->table_stride;
        int64_t wrong = 0;
        for (int64_t i = 0; i < used; i++) wrong |= (uint32_t)blocks[i] >= (uint64_t)num_blocks;
        bad |= wrong;
    }
    if (bad || (step->num_requests && starts[step->num_requests] > step->num_tokens)) return 0;
    if (step->slot_mapping)
        for (int64_t t = 0; t < step->num_tokens; t++)
            bad |= step->slot_mapping[t] >= num_blocks * block_size;
    if (step->logits_indices)
        for (int64_t i = 0; i < step->num_logits; i++)
            bad |= (uint64_t)step->logits_indices[i] >= (uint64_t)step->num_tokens;
    if (step->num_groups) bad |= step->group_starts[0] != 0;
    for (int64_t g = 0; g < step->num_groups && !bad; g++) {
        const int64_t first = step->group_starts[g], end = step->group_starts[g + 1];
        if (first > end || end > step->num_requests || step->group_blocks[g] < 0) return 0;
        for (int64_t i = first; i < end; i++) {
            const int64_t member = step->group_members[i];
            if (member < 0 || member >= step->num_requests) return 0;
            bad |= step->group_blocks[g] * block_size > step->seq_lens[member];
        }
    }
    return !bad;
}

static int lay_out_attention(const int64_t *dims, const ss_plans *made, ss_context *context,
                             ss_plans *plans) {
    const ss_step *step = context->step;
    if (!is_sound(step, dims[3], dims[5])) return SS_BAD_PLAN;
    *plans = (ss_plans){made->plan, made->plan};
    if (ss_plan_build(made->plan, step, context->num_threads, dims)) return SS_NO_MEMORY;
    if (!step->num_groups || !dims[4]) return SS_OK;
    ss_step ungrouped = *step;
    ungrouped.num_groups = 0;
    plans->without_groups = made->without_groups;
    return ss_plan_build(made->without_groups, &ungrouped, context->num_threads, dims)
               ? SS_NO_MEMORY
               : SS_OK;
}

static int lay_out_all_attention(ss_program *program, ss_context *context) {
    int failure = SS_OK;
    for (int64_t i = 0; i < program->num_plans && !failure; i++)
        failure = lay_out_attention(program->attention[i], program->plans + i, context,
                                    context->plans + i);
    const ss_step *step = context->step;
    for (int64_t r = 0; program->num_plans && r < step->num_requests; r++)
        context->longest = ss_max(context->longest, step->seq_lens[r]);
    return failure;
}

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

// Runs a step on `num_threads` threads of the pool behind `parallel` (GOMP_parallel), whose numbers
// `thread_num` tells; without one, on the calling thread. Returns SS_OK, or why it did not run.
int ss_run(ss_program *program, const ss_step *step, int num_threads, parallel_function parallel,
           int (*thread_num)(void)) {
    if (!parallel) num_threads = 1;
    region r = {program, {.step = step, .num_threads = num_threads},
                num_threads > 1 ? thread_num : 0};
    const int unsound = lay_out_all_attention(program, &r.context);
    if (unsound) return unsound;
    if (reset_counters(program, num_threads)) return SS_NO_MEMORY;
    for (int64_t i = 0; i < program->num_instructions; i++) {
        const ss_instruction *instruction = program->instructions + i;
        const ss_operation *operation = ss_operation_of(instruction);
        const int failure = operation->begin ? operation->begin(&r.context, instruction->args) : 0;
        if (failure) return failure;
    }
    if (num_threads > 1)
        parallel(work, &r, (unsigned)num_threads, 0);
    else
        work(&r);
    return SS_OK;
}
