"""A relaxed instance: online prefill if any waits, else offline prefill through the gate, else offline decode."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import GATE_BATCH, KV_RESERVE
from ooco_gym.cluster.decode import batch_size, start_run, stop_decoding
from ooco_gym.cluster.lists import pop_front, push_back, remove
from ooco_gym.cluster.queues import schedule
from ooco_gym.cluster.residents import (
    complete_finished,
    finish,
    first_token,
    free_blocks,
    grow,
    join,
    make_room_for_online,
    release,
    requeue,
    select,
    take_blocks,
    wake,
)
from ooco_gym.cluster.rules import ADMIT_NONE, DECODE_STRICT, FCFS
from ooco_gym.cluster.run import advance, batch_noise, blocks_for, tbt_bin
from ooco_gym.cluster.state import (
    BATCH,
    DECODING,
    FREE,
    IDLE,
    NONE,
    OFFLINE_DECODES,
    PREFILL,
    PREFILLING_OFFLINE,
    PREFILLING_ONLINE,
    QUEUED,
    REQUEUED,
    WAITING,
)
from ooco_gym.cluster.transfer import hand_over, start_granted_pulls
from ooco_gym.roofline.cost import causal_pairs, iteration_s, layers_s

# The offline backlog: requeued work first, then the job list.


@kernel
def fits_anywhere(c, prompt, output):
    """Whether a request can ever be served: its whole KV must fit the smaller of the two pools' instances."""
    world = c.world[0]
    blocks = blocks_for(c, prompt + output)
    return blocks <= c.instances[0].kv_blocks and blocks <= c.instances[world.instances - 1].kv_blocks


@kernel
def _offline_job_waits(c):
    """Whether the job list offers a request now; jobs that no instance could hold are counted and passed over."""
    world = c.world[0]
    if world.rule_admission == ADMIT_NONE or world.offline_jobs == 0:
        return False
    while world.endless == 1 or world.offline_taken < world.offline_arrived:
        if world.rejected_offline == world.offline_taken >= world.offline_jobs:
            return False  # an endless backlog of which nothing fits
        row = world.offline_taken % world.offline_jobs
        if fits_anywhere(c, c.offline_prompt[row], c.offline_output[row]):
            return True
        world.offline_taken += 1
        world.rejected_offline += 1
    return False


@kernel
def _offline_waits(c):
    return lists.length(c, c.world[0].instances, REQUEUED) > 0 or _offline_job_waits(c)


@kernel
def _peek_offline(c):
    """(context tokens, since when on offer) of the request at the head of the backlog."""
    world = c.world[0]
    slot = lists.first(c, world.instances, REQUEUED)
    if slot != NONE:
        return c.slots[slot].context, c.slots[slot].arrival_s
    row = world.offline_taken % world.offline_jobs
    since_s = world.offline_head_s if world.endless == 1 else c.offline_arrival_s[row]
    return int(c.offline_prompt[row]), since_s


@kernel
def _backlog_moved(c):
    """The head of the backlog is another request now: it may fit where the last one did not."""
    for instance in range(c.world[0].relaxed):
        if c.instances[instance].head_too_large == 1:
            wake(c, instance)


@kernel
def _take_offline(c):
    """Remove the head of the backlog into a slot."""
    world = c.world[0]
    if lists.length(c, world.instances, REQUEUED) > 0:
        _backlog_moved(c)
        return pop_front(c, world.instances, REQUEUED)
    row = world.offline_taken % world.offline_jobs
    slot = pop_front(c, world.instances, FREE)
    record = c.slots[slot]
    record.online = NONE
    record.prompt = c.offline_prompt[row]
    record.output = c.offline_output[row]
    record.arrival_s = world.offline_head_s if world.endless == 1 else c.offline_arrival_s[row]
    world.offline_taken += 1
    world.offline_prompt_sum += record.prompt
    world.offline_head_s = world.now_s
    fresh_slot(c, slot)
    _backlog_moved(c)
    return slot


@kernel
def fresh_slot(c, slot):
    """Set what every new request starts with."""
    record = c.slots[slot]
    record.phase = QUEUED
    record.context = record.prompt
    record.selected = 0
    record.heap_at = NONE
    record.blocks = 0
    record.instance = NONE
    record.target = NONE
    record.leaving = 0
    record.credited = 0
    record.computed = 0
    record.last_token_s = -1.0


# Forming a prefill batch.


@kernel
def _residents_offline(c, instance):
    return lists.length(c, instance, OFFLINE_DECODES) + c.instances[instance].held_offline


@kernel
def _gate_open(c, instance, members):
    state = c.instances[instance]
    wanted = c.knobs[GATE_BATCH] * state.saturation_batch
    return _residents_offline(c, instance) + members < wanted


@kernel
def _take_kv(c, instance, slot):
    """Reserve prompt (or recomputed context) + 1 tokens."""
    record = c.slots[slot]
    record.instance = instance
    record.blocks = blocks_for(c, record.context + 1)
    take_blocks(c, instance, slot, record.blocks)


@kernel
def _batch_has_place(c, members, tokens, more):
    world = c.world[0]
    return members == 0 or (members < world.max_seqs and tokens + more <= world.max_batch_tokens)


@kernel
def _batch_online(c, instance):
    """First come, first served, up to the batch limits and the KV that offline work can be made to give up."""
    tokens = 0
    members = 0
    while lists.length(c, instance, WAITING) > 0:
        slot = lists.first(c, instance, WAITING)
        context = c.slots[slot].context
        if not _batch_has_place(c, members, tokens, context):
            break
        if not make_room_for_online(c, instance, blocks_for(c, context + 1)):
            break
        remove(c, instance, WAITING, slot)
        _take_kv(c, instance, slot)
        push_back(c, instance, BATCH, slot)
        tokens += context
        members += 1
    return members


@kernel
def _offline_fits(c, instance, context):
    """Offline prefill leaves the reserved share of the KV free."""
    state = c.instances[instance]
    limit = (1.0 - c.knobs[KV_RESERVE]) * state.kv_blocks
    fits = state.used_blocks + blocks_for(c, context + 1) <= limit
    state.head_too_large = 0 if fits else 1
    return fits


@kernel
def _batch_offline(c, instance):
    tokens = 0
    members = 0
    while _offline_waits(c) and _gate_open(c, instance, members):
        context, _ = _peek_offline(c)
        if not _batch_has_place(c, members, tokens, context) or not _offline_fits(c, instance, context):
            break
        slot = _take_offline(c)
        _take_kv(c, instance, slot)
        push_back(c, instance, BATCH, slot)
        tokens += context
        members += 1
    return members


@kernel
def _batch_fcfs(c, instance):
    """Both classes in one queue by arrival, as a plain prefill instance would serve them."""
    tokens = 0
    members = 0
    while True:
        waiting = lists.first(c, instance, WAITING)
        offline = _offline_waits(c) and _gate_open(c, instance, members)
        if offline:
            context, since_s = _peek_offline(c)
            if waiting != NONE and c.slots[waiting].arrival_s <= since_s:
                offline = False
        if not offline:
            if waiting == NONE:
                break
            context = c.slots[waiting].context
        if not _batch_has_place(c, members, tokens, context):
            break
        if free_blocks(c, instance) < blocks_for(c, context + 1):
            c.instances[instance].head_too_large = 1
            break
        if offline:
            slot = _take_offline(c)
        else:
            slot = pop_front(c, instance, WAITING)
        _take_kv(c, instance, slot)
        push_back(c, instance, BATCH, slot)
        tokens += context
        members += 1
    return members


@kernel
def _start_prefill(c, instance, activity):
    """Time the batch from its aggregates and let it run; it is one iteration."""
    world = c.world[0]
    state = c.instances[instance]
    tokens = 0.0
    causal = 0.0
    full = 0.0
    recomputed = 0
    slot = lists.first(c, instance, BATCH)
    while slot != NONE:
        record = c.slots[slot]
        record.phase = PREFILL
        context = float(record.context)
        tokens += context
        causal += causal_pairs(context, 0.0)
        full += context * context
        recomputed += min(record.computed, record.context)
        slot = record.next
    sequences = float(lists.length(c, instance, BATCH))
    noise = batch_noise(c, instance)
    cost = c.true_cost[instance]
    total_s = noise * iteration_s(cost, tokens, causal, full, tokens, sequences, 0.0, 0.0, 0.0)
    predicted_s = iteration_s(c.scheduler_cost[instance], tokens, causal, full, tokens, sequences, 0.0, 0.0, 0.0)
    state.layers_s = noise * layers_s(cost, tokens, causal, full, tokens, 0.0, 0.0, 0.0)
    state.layer_count = cost.layers
    state.activity = activity
    state.interrupted = 0
    state.batch_tokens = int(tokens)
    state.batch_recomputed = recomputed
    state.start_s = world.now_s
    state.end_s = world.now_s + total_s
    state.predicted_end_s = world.now_s + predicted_s
    schedule(c, instance, state.end_s)


@kernel
def interrupt_at_layer(c, instance):
    """Stop a running offline prefill at the end of the layer it is in; no effect in the last layer."""
    state = c.instances[instance]
    if state.activity != PREFILLING_OFFLINE or state.interrupted == 1:
        return
    layer_s = state.layers_s / state.layer_count
    layers_done = math.ceil((c.world[0].now_s - state.start_s) / layer_s)
    if layers_done >= state.layer_count:
        return
    state.interrupted = 1
    state.end_s = state.start_s + layers_done * layer_s
    schedule(c, instance, state.end_s)


# What happens at the end of an iteration.


@kernel
def _lose_batch(c, instance):
    """An interrupted batch: every request loses its KV and returns, in order, to the head of the backlog."""
    world = c.world[0]
    state = c.instances[instance]
    world.preemptions += 1
    world.interrupted_s += state.end_s - state.start_s
    while lists.length(c, instance, BATCH) > 0:
        slot = lists.last(c, instance, BATCH)
        remove(c, instance, BATCH, slot)
        release(c, instance, slot)
        requeue(c, slot)


@kernel
def _prefilled_online(c, instance, slot):
    world = c.world[0]
    record = c.slots[slot]
    c.instances[instance].pending_s -= record.estimate_s
    if record.last_token_s >= 0.0 and world.measure_from_s < world.now_s:
        c.tbt[tbt_bin(world.now_s - record.last_token_s)] += 1
    first_token(c, slot)
    record.last_token_s = world.now_s
    record.context += 1
    if record.context == record.prompt + record.output:
        release(c, instance, slot)
        finish(c, slot)
    else:
        hand_over(c, slot)


@kernel
def _prefilled_offline(c, instance, slot):
    world = c.world[0]
    record = c.slots[slot]
    if record.credited == 0:
        record.credited = 1
        world.credited_prompt_tokens += record.prompt
    world.credited_output_tokens += 1
    record.context += 1
    if record.context == record.prompt + record.output:
        release(c, instance, slot)
        finish(c, slot)
    elif world.rule_offline_decode == DECODE_STRICT:
        c.instances[instance].held_offline += 1
        hand_over(c, slot)
    else:
        join(c, instance, slot)


@kernel
def _complete_prefill(c, instance):
    world = c.world[0]
    state = c.instances[instance]
    world.busy_s += state.end_s - state.start_s
    if state.interrupted == 1:
        _lose_batch(c, instance)
        return
    world.iterations += 1
    world.prefilled_tokens += state.batch_tokens
    world.recomputed_tokens += state.batch_recomputed
    world.recompute_s += (state.end_s - state.start_s) * (state.batch_recomputed / state.batch_tokens)
    while lists.length(c, instance, BATCH) > 0:
        slot = pop_front(c, instance, BATCH)
        record = c.slots[slot]
        record.computed = max(record.computed, record.context)
        if record.online == NONE:
            _prefilled_offline(c, instance, slot)
        else:
            _prefilled_online(c, instance, slot)


@kernel
def _select_all(c, instance):
    """A relaxed instance decodes every offline request it holds."""
    slot = lists.last(c, instance, OFFLINE_DECODES)
    while slot != NONE and c.slots[slot].selected == 0:
        select(c, instance, slot)
        slot = c.slots[slot].prev


@kernel
def relaxed_decision(c, instance):
    """The end of an iteration, or a wake-up, of a relaxed instance."""
    world = c.world[0]
    state = c.instances[instance]
    was_decoding = state.activity == DECODING
    if was_decoding:
        advance(c, instance, state.run_end)
        complete_finished(c, instance)
        grow(c, instance)
    elif state.activity != IDLE:
        _complete_prefill(c, instance)
        state.activity = IDLE
    start_granted_pulls(c, instance)
    if world.rule_prefill_order == FCFS:
        activity = PREFILLING_ONLINE
        members = _batch_fcfs(c, instance)
    else:
        activity = PREFILLING_ONLINE
        members = _batch_online(c, instance)
        if members == 0:
            activity = PREFILLING_OFFLINE
            members = _batch_offline(c, instance)
    if members > 0:
        if was_decoding:
            stop_decoding(c, instance)
        _start_prefill(c, instance, activity)
        return
    _select_all(c, instance)
    if batch_size(state) > 0:
        start_run(c, instance, was_decoding)
        return
    if was_decoding:
        stop_decoding(c, instance)
    state.activity = IDLE
    schedule(c, instance, math.inf)
