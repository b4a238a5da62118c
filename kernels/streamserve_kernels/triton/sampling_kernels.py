"""The four kernels of `sampling.sample`: no sort, and a few reads of each row.

    edit     row x chunk   edits into `work`; each chunk's maximum, its id, its sum of weights
    weigh    row x chunk   each chunk's mass; for restricted rows its count and mass above 8 levels
    collect  row x chunk   restricted rows: what lies above the lowest level needed, in id order
    draw     row           top-k's and top-p's thresholds among those, then the inverse CDF

A token's weight is its probability over that of the likeliest token, so it lies in [0, 1] and its
bits, read as an integer, order as it does. All that top-k and top-p can keep lies above some level;
the levels are spread by how flat the row is (its mean weight), so that few tokens more than needed
are collected. A row so flat that they do not fit its list is read from the logits again instead.

Grids follow from shapes; rows that need no such work leave at once. Sums are float64, or are only
used to choose a level, and the order of each follows from the vocabulary's size alone.

V vocabulary, CHUNK tokens of a program, S chunks of a row, S_PAD the next power of 2.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from streamserve_kernels.sampling import IN_PROMPT, MIN_TEMPERATURE
from streamserve_kernels.triton.runtime import jit

_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_GENERATED = tl.constexpr(IN_PROMPT - 1)
_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_ID = tl.constexpr(2**31 - 1)
_ONE_BITS = tl.constexpr(0x3F800000)  # of the weight 1.0, the largest
_LEVELS = tl.constexpr(8)  # the last is "any weight at all"
_BIAS_TILE = tl.constexpr(64)


@jit
def load_logits(row, offsets, inside):
    values = tl.load(row + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    is_nan = values != values  # noqa: PLR0124
    return tl.where(is_nan, float("-inf"), values)


@jit
def weights_of(values, best, scale, min_p):
    """exp2((values - best) * scale), 0 below min_p. Infinite logits share their row."""
    finite = tl.where(best == float("inf"), 0.0, best)
    weights = tl.exp2((tl.minimum(values, finite) - finite) * scale)
    weights = tl.where(best == float("inf"), (values == best).to(tl.float32), weights)
    return tl.where(weights >= min_p, weights, 0.0)


@jit
def first_maximum(values, ids):
    """The maximum, and the lowest of `ids` that has it; ids beyond the row are _NO_ID."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, _NO_ID), 0)


@jit
def first_above(cumulative, weights, target, SIZE: tl.constexpr):
    """The first place with weight at which the CDF exceeds the target, or the last with weight."""
    places = tl.arange(0, SIZE)
    found = tl.min(tl.where((cumulative > target) & (weights > 0.0), places, SIZE), 0)
    last = tl.max(tl.where(weights > 0.0, places, 0), 0)
    return tl.where(found < SIZE, found, last)


@jit
def row_maximum(maxima, row, S: tl.constexpr, S_PAD: tl.constexpr):
    chunks = tl.arange(0, S_PAD)
    of_chunks = tl.load(
        maxima + (row * S + chunks) * 4, mask=chunks < S, other=float("-inf")
    )  # fmt: skip
    return tl.max(of_chunks, 0)


@jit
def edit_kernel(
    logits, stride, work, maxima, ids, temperature,
    edits_rows, counts, repetition, presence, frequency,
    bias_start, bias_ids, bias_values, mask_rows, masks, drafts, num_before,
    V: tl.constexpr, CHUNK: tl.constexpr, S: tl.constexpr,
    EDITS: tl.constexpr, DRAFTS: tl.constexpr,
):  # fmt: skip
    """Fills maxima [L, S, 4]: maximum, sum of weights under it, raw maximum; and ids [L, S, 2] of
    the edited maximum and the raw one.

    work [L, V] gets the edited logits.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = chunk * CHUNK
    heat = tl.load(temperature + row)
    offsets = start + tl.arange(0, CHUNK)
    inside = offsets < V
    real_ids = tl.where(inside, offsets, _NO_ID)
    values = load_logits(logits + row * stride, offsets, inside)
    at = row * S + chunk
    if EDITS:
        raw_best, raw_id = first_maximum(values, real_ids)
        tl.store(maxima + at * 4 + 2, raw_best)
        tl.store(ids + at * 2 + 1, raw_id)
        edits_row = tl.load(edits_rows + row).to(tl.int64)
        if edits_row >= 0:
            count = tl.load(counts + edits_row * V + offsets, mask=inside, other=0)
            if DRAFTS:
                before = row - tl.load(num_before + row)
                while before < row:
                    count += (offsets == tl.load(drafts + before)).to(tl.int32)
                    before += 1
            generated = (count & _GENERATED).to(tl.float32)
            factor = tl.full([CHUNK], 1.0, tl.float32) * tl.load(repetition + row)
            factor = tl.where(count != 0, factor, 1.0)
            values = tl.where(values < 0.0, values * factor, tl.div_rn(values, factor))
            values -= tl.load(frequency + row) * generated
            values -= tl.where(generated > 0.0, tl.load(presence + row), 0.0)
        mask_row = tl.load(mask_rows + row).to(tl.int64)
        first_bias = tl.load(bias_start + row)
        last_bias = tl.load(bias_start + row + 1)
        mine = work + row * V
        if first_bias < last_bias:
            # A program owns its chunk of the row: the sparse biases go through memory.
            tl.store(mine + offsets, values, mask=inside)
            tl.debug_barrier()
            first = first_bias
            while first < last_bias:
                entries = first + tl.arange(0, _BIAS_TILE)
                token = tl.load(bias_ids + entries, mask=entries < last_bias, other=-1)
                bias = tl.load(bias_values + entries, mask=entries < last_bias, other=0.0)
                here = (token >= start) & (token < start + CHUNK) & (token < V)
                here = here & (bias > float("-inf"))
                old = tl.load(mine + token, mask=here, other=0.0)
                tl.store(mine + token, old + bias, mask=here)
                first += _BIAS_TILE
            tl.debug_barrier()
            first = first_bias
            while first < last_bias:
                entries = first + tl.arange(0, _BIAS_TILE)
                token = tl.load(bias_ids + entries, mask=entries < last_bias, other=-1)
                bias = tl.load(bias_values + entries, mask=entries < last_bias, other=0.0)
                here = (token >= start) & (token < start + CHUNK) & (token < V)
                here = here & (bias == float("-inf"))
                tl.store(mine + token, bias, mask=here)
                first += _BIAS_TILE
            tl.debug_barrier()
            values = tl.load(mine + offsets, mask=inside, other=float("-inf"))
            tl.debug_barrier()
        if mask_row >= 0:
            WORDS: tl.constexpr = (V + 31) // 32
            words = tl.load(masks + mask_row * WORDS + offsets // 32, mask=inside, other=0)
            values = tl.where(((words >> (offsets % 32)) & 1) == 1, values, float("-inf"))
        tl.store(mine + offsets, values, mask=inside)
    best, token_id = first_maximum(values, real_ids)
    tl.store(maxima + at * 4, best)
    tl.store(ids + at * 2, token_id)
    if heat >= _MIN_TEMPERATURE:
        mass = 0.0
        if best > float("-inf"):
            mass = tl.sum(weights_of(values, best, tl.div_rn(_LOG2_E, heat), 0.0), 0)
        tl.store(maxima + at * 4 + 1, mass)


@jit
def weigh_kernel(
    source, stride, maxima, temperature, top_k, top_p, min_p,
    masses, level_counts, level_masses, levels,
    V: tl.constexpr, CHUNK: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    """Fills masses [L, S] float64; of restricted rows also level_counts and level_masses [L, S, 8],
    and levels [L, 8].

    Each is of the tokens that min-p leaves.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    heat = tl.load(temperature + row)
    best = row_maximum(maxima, row, S, S_PAD)
    if (heat >= _MIN_TEMPERATURE) & (best > float("-inf")):
        scale = tl.div_rn(_LOG2_E, heat)
        offsets = chunk * CHUNK + tl.arange(0, CHUNK)
        values = load_logits(source + row * stride, offsets, offsets < V)
        weights = weights_of(values, best, scale, tl.load(min_p + row))
        at = row * S + chunk
        tl.store(masses + at, tl.sum(weights.to(tl.float64), 0))
        if (tl.load(top_k + row) > 0) | (tl.load(top_p + row).to(tl.float64) < 1.0):
            chunks = tl.arange(0, S_PAD)
            parts = maxima + (row * S + chunks) * 4
            part_best = tl.load(parts, mask=chunks < S, other=float("-inf"))
            part_mass = tl.load(parts + 1, mask=chunks < S, other=0.0)
            mass = tl.sum(weights_of(part_best, best, scale, 0.0) * part_mass, 0)
            flatness = tl.minimum(tl.log2(mass / V), 0.0)  # of the mean weight
            for i in tl.static_range(_LEVELS - 1):
                # From a tenth to 1.35 of the mean weight's logarithm: a normal distribution of
                # logits has its usual nuclei there. Exponents fall as x (0.54 + 0.81 x).
                exponent = (i + 1) * (0.54 * (_LEVELS - 1) + 0.81 * (i + 1))
                level = tl.exp2(flatness * (exponent / ((_LEVELS - 1) * (_LEVELS - 1))))
                heavy = weights >= level
                tl.store(level_counts + at * _LEVELS + i, tl.sum(heavy.to(tl.int32), 0))
                tl.store(level_masses + at * _LEVELS + i, tl.sum(tl.where(heavy, weights, 0.0), 0))
                if chunk == 0:
                    tl.store(levels + row * _LEVELS + i, level)
            last = at * _LEVELS + _LEVELS - 1
            tl.store(level_counts + last, tl.sum((weights > 0.0).to(tl.int32), 0))
            tl.store(level_masses + last, tl.sum(weights, 0))
            if chunk == 0:
                tl.store(levels + row * _LEVELS + _LEVELS - 1, 0.0)


@jit
def collect_kernel(
    source, stride, maxima, temperature, top_k, top_p, min_p,
    masses, level_counts, level_masses, levels,
    found, listed_ids, listed_weights,
    V: tl.constexpr, CHUNK: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr,
    LIST: tl.constexpr,
):  # fmt: skip
    """Fills found [L, 4] (how many tokens lie above the level, the level's bits, and those of the
    lowest level above which there are too few) and the lists [L, LIST].

    A list is filled where the tokens fit.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row).to(tl.float64)
    best = row_maximum(maxima, row, S, S_PAD)
    if (heat >= _MIN_TEMPERATURE) & (best > float("-inf")) & ((k > 0) | (p < 1.0)):
        columns = tl.arange(0, _LEVELS)
        chunks = tl.arange(0, S_PAD)
        at = (row * S + chunks[:, None]) * _LEVELS + columns[None, :]
        is_chunk = (chunks < S)[:, None] & (columns >= 0)[None, :]
        counts = tl.load(level_counts + at, mask=is_chunk, other=0)
        of_levels = tl.load(level_masses + at, mask=is_chunk, other=0.0).to(tl.float64)
        count = tl.sum(counts, 0)
        # The masses of levels are float32 sums: their errors must not leave a token out.
        goal = p * tl.sum(tl.load(masses + row * S + chunks, mask=chunks < S, other=0.0), 0)
        mass = tl.sum(of_levels, 0)
        enough = tl.where(k > 0, count >= k, mass >= goal * 1.00001)
        too_few = tl.where(k > 0, count < k, mass <= goal * 0.99999)
        chosen = tl.min(tl.where(enough, columns, _LEVELS - 1), 0)
        ceiling = tl.max(tl.where(too_few, columns, -1), 0)
        candidates = tl.sum(tl.where(columns == chosen, count, 0), 0)
        level = tl.load(levels + row * _LEVELS + chosen)
        if chunk == 0:
            above = tl.load(levels + row * _LEVELS + ceiling, mask=ceiling >= 0, other=2.0)
            tl.store(found + row * 4, candidates)
            tl.store(found + row * 4 + 1, level.to(tl.int32, bitcast=True))
            tl.store(found + row * 4 + 2, above.to(tl.int32, bitcast=True))
        of_chunks = tl.sum(tl.where((columns == chosen)[None, :], counts, 0), 1)
        own = tl.sum(tl.where(chunks == chunk, of_chunks, 0), 0)
        if (candidates <= LIST) & (own > 0):
            before = tl.sum(tl.where(chunks < chunk, of_chunks, 0), 0)
            offsets = chunk * CHUNK + tl.arange(0, CHUNK)
            values = load_logits(source + row * stride, offsets, offsets < V)
            scale = tl.div_rn(_LOG2_E, heat)
            weights = weights_of(values, best, scale, tl.load(min_p + row))
            heavy = (weights >= level) & (weights > 0.0)
            places = before + tl.cumsum(heavy.to(tl.int32), 0) - 1
            heavy = heavy & (places < LIST)
            tl.store(listed_ids + row * LIST + places, offsets, mask=heavy)
            tl.store(listed_weights + row * LIST + places, weights, mask=heavy)


@jit
def load_candidates(
    listed, listed_weights, source, start, end, best, scale, min_p,
    V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Weights [TILE] of candidates from `start`, in id order: from the list, or from the logits."""
    offsets = tl.multiple_of(start, TILE) + tl.arange(0, TILE)
    if listed:
        # A list has room for whole tiles. A mask by its length would read it number by number.
        weights = tl.load(listed_weights + offsets)
        weights = tl.where(offsets < end, weights, 0.0)
    else:
        weights = weights_of(load_logits(source, offsets, offsets < V), best, scale, min_p)
    return weights


@jit
def threshold(
    low, high, goal, BY_MASS: tl.constexpr,
    listed, listed_weights, source, end, best, scale, min_p,
    V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Bits of the largest weight such that it and all above it count, or weigh, `goal` (float64).

    Those from `low` (bits) on must do so, those from `high` on must not. Every weight beside them
    that occurs narrows the search, so it takes as many steps as there are distinct weights to tell
    apart, to the base of 4.
    """
    while high - low > 1:
        half = (high - low) // 2
        quarter = half // 2
        a = low + quarter
        b = low + half
        c = b + quarter
        # A lane adds few numbers: float32 will do there.
        of_a = tl.zeros([TILE], tl.float32)
        of_b = tl.zeros([TILE], tl.float32)
        of_c = tl.zeros([TILE], tl.float32)
        least = tl.full([TILE], _NO_ID, tl.int32)
        most = tl.zeros([TILE], tl.int32)
        start = 0
        while start < end:
            weights = load_candidates(
                listed, listed_weights, source, start, end, best, scale, min_p, V, TILE
            )
            bits = weights.to(tl.int32, bitcast=True)
            if BY_MASS:
                amount = weights
            else:
                amount = tl.full([TILE], 1.0, tl.float32)
            of_a += tl.where(bits >= a, amount, 0.0)
            of_b += tl.where(bits >= b, amount, 0.0)
            of_c += tl.where(bits >= c, amount, 0.0)
            between = (bits >= low) & (bits < high)
            least = tl.minimum(least, tl.where(between, bits, _NO_ID))
            most = tl.maximum(most, tl.where(between, bits, 0))
            start += TILE
        reaches_a = tl.sum(of_a.to(tl.float64), 0) >= goal
        reaches_b = tl.sum(of_b.to(tl.float64), 0) >= goal
        reaches_c = tl.sum(of_c.to(tl.float64), 0) >= goal
        lowest = tl.min(least, 0)
        highest = tl.max(most, 0)
        high = tl.where(
            reaches_c, high, tl.where(reaches_b, c, tl.where(reaches_a, b, a))
        )  # fmt: skip
        low = tl.where(reaches_c, c, tl.where(reaches_b, b, tl.where(reaches_a, a, low)))
        # Between neighbours that occur there is nothing to find.
        low = tl.where(lowest < _NO_ID, tl.maximum(low, lowest), low)
        high = tl.minimum(high, highest + 1)
    return low


@jit
def mass_above(
    low, listed, listed_weights, source, end, best, scale, min_p,
    V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The mass of the weights above `low` (bits), and how many equal it."""
    mass = tl.zeros([TILE], tl.float64)
    equal = tl.zeros([TILE], tl.int32)
    start = 0
    while start < end:
        weights = load_candidates(
            listed, listed_weights, source, start, end, best, scale, min_p, V, TILE
        )
        bits = weights.to(tl.int32, bitcast=True)
        mass += tl.where(bits > low, weights, 0.0).to(tl.float64)
        equal += (bits == low).to(tl.int32)
        start += TILE
    return tl.sum(mass, 0), tl.sum(equal, 0)


@jit
def draw_restricted(
    row, source, masses, top_k, top_p, uniform, found, listed_ids, listed_weights,
    best, scale, min_p,
    V: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, LIST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    k = tl.load(top_k + row)
    p = tl.load(top_p + row).to(tl.float64)
    candidates = tl.load(found + row * 4)
    listed = candidates <= LIST
    end = tl.where(listed, candidates, V)
    ids = listed_ids + row * LIST
    weighed = listed_weights + row * LIST
    low = tl.maximum(tl.load(found + row * 4 + 1), 1)  # 0 is no weight
    high = tl.minimum(tl.load(found + row * 4 + 2), _ONE_BITS + 1)
    if (k > 0) & (k < candidates):
        low = threshold(
            low, high, k.to(tl.float64), False,
            listed, weighed, source, end, best, scale, min_p, V, TILE,
        )  # fmt: skip
    above, equal = mass_above(low, listed, weighed, source, end, best, scale, min_p, V, TILE)
    kept = equal
    if p < 1.0:
        chunks = tl.arange(0, S_PAD)
        whole = tl.sum(tl.load(masses + row * S + chunks, mask=chunks < S, other=0.0), 0)
        if k > 0:
            whole = above + equal * low.to(tl.float32, bitcast=True).to(tl.float64)
            high = tl.full([], _ONE_BITS + 1, tl.int32)
        goal = p * whole
        low = threshold(
            low, high, goal, True, listed, weighed, source, end, best, scale, min_p, V, TILE
        )  # fmt: skip
        above, equal = mass_above(low, listed, weighed, source, end, best, scale, min_p, V, TILE)
        weight = low.to(tl.float32, bitcast=True).to(tl.float64)
        # Of equals at the edge the lowest ids stay, as many as the goal needs.
        room = tl.minimum((goal - above) / weight, equal.to(tl.float64)).to(tl.int32)
        room += (above + room * weight < goal).to(tl.int32)
        kept = tl.minimum(tl.maximum(room, 1), equal)
    weight = low.to(tl.float32, bitcast=True).to(tl.float64)
    target = uniform * (above + kept * weight)

    # Which tile of the candidates has the target, then where in it.
    start = kept * 0
    passed = start
    tile_start = start
    tile_passed = start
    running = target * 0.0
    tile_running = running
    reached = start
    while (start < end) & (reached == 0):
        weights = load_candidates(listed, weighed, source, start, end, best, scale, min_p, V, TILE)
        bits = weights.to(tl.int32, bitcast=True)
        equal = tl.sum((bits == low).to(tl.int32), 0)
        room = tl.minimum(tl.maximum(kept - passed, 0), equal)
        mass = tl.sum(tl.where(bits > low, weights, 0.0).to(tl.float64), 0) + room * weight
        tile_start = tl.where(mass > 0.0, start, tile_start)
        tile_passed = tl.where(mass > 0.0, passed, tile_passed)
        tile_running = tl.where(mass > 0.0, running, tile_running)
        running += mass
        passed += equal
        start += TILE
        reached = (running > target).to(tl.int32)
    weights = load_candidates(listed, weighed, source, tile_start, end, best, scale, min_p, V, TILE)
    bits = weights.to(tl.int32, bitcast=True)
    is_equal = bits == low
    rank = tile_passed + tl.cumsum(is_equal.to(tl.int32), 0)
    stays = (bits > low) | (is_equal & (rank <= kept))
    left = tl.where(stays, weights, 0.0).to(tl.float64)
    place = tile_start + first_above(tl.cumsum(left, 0), left, target - tile_running, TILE)
    token = place
    if listed:
        token = tl.load(ids + place)
    return token


@jit
def draw_free(
    row, source, masses, uniform, best, scale, min_p,
    V: tl.constexpr, CHUNK: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    chunks = tl.arange(0, S_PAD)
    mass = tl.load(masses + row * S + chunks, mask=chunks < S, other=0.0)
    cumulative = tl.cumsum(mass, 0)
    target = uniform * tl.max(cumulative, 0)
    chunk = first_above(cumulative, mass, target, S_PAD)
    before = tl.sum(tl.where(chunks < chunk, mass, 0.0), 0)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    values = load_logits(source, offsets, offsets < V)
    weights = weights_of(values, best, scale, min_p).to(tl.float64)
    return chunk * CHUNK + first_above(tl.cumsum(weights, 0), weights, target - before, CHUNK)


@jit
def draw_kernel(
    source, stride, maxima, ids, temperature, top_k, top_p, min_p, uniforms,
    masses, found, listed_ids, listed_weights, tokens,
    V: tl.constexpr, CHUNK: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr,
    LIST: tl.constexpr, EDITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, S_PAD)
    parts = row * S + chunks
    of_chunks = tl.load(maxima + parts * 4, mask=chunks < S, other=float("-inf"))
    of_ids = tl.load(ids + parts * 2, mask=chunks < S, other=_NO_ID)
    best, token = first_maximum(of_chunks, of_ids)
    heat = tl.load(temperature + row)
    if best == float("-inf"):
        if EDITS:
            # All is forbidden: the model's own first choice is left.
            raw = tl.load(maxima + parts * 4 + 2, mask=chunks < S, other=float("-inf"))
            raw_ids = tl.load(ids + parts * 2 + 1, mask=chunks < S, other=_NO_ID)
            _, token = first_maximum(raw, raw_ids)
    elif heat >= _MIN_TEMPERATURE:
        scale = tl.div_rn(_LOG2_E, heat)
        least = tl.load(min_p + row)
        uniform = tl.load(uniforms + row).to(tl.float64)
        mine = source + row * stride
        if (tl.load(top_k + row) > 0) | (tl.load(top_p + row).to(tl.float64) < 1.0):
            token = draw_restricted(
                row, mine, masses, top_k, top_p, uniform, found, listed_ids, listed_weights,
                best, scale, least, V, S, S_PAD, LIST, CHUNK,
            )  # fmt: skip
        else:
            token = draw_free(
                row, mine, masses, uniform, best, scale, least, V, CHUNK, S, S_PAD
            )  # fmt: skip
    tl.store(tokens + row, token.to(tl.int64))


@jit
def chunk_maximum_kernel(
    logits, stride, maxima, ids,
    V: tl.constexpr, CHUNK: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """maxima, ids [L, S]."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = offsets < V
    values = load_logits(logits + row * stride, offsets, inside)
    best, token = first_maximum(values, tl.where(inside, offsets, _NO_ID))
    tl.store(maxima + row * S + chunk, best)
    tl.store(ids + row * S + chunk, token)


@jit
def row_maximum_kernel(maxima, ids, tokens, S: tl.constexpr, S_PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, S_PAD)
    of_chunks = tl.load(maxima + row * S + chunks, mask=chunks < S, other=float("-inf"))
    of_ids = tl.load(ids + row * S + chunks, mask=chunks < S, other=_NO_ID)
    _, token = first_maximum(of_chunks, of_ids)
    tl.store(tokens + row, token.to(tl.int64))
