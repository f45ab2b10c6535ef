"""A prefill iteration: its time, its interruption at a layer, and what its end brings."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.lists import pop_front, remove
from ooco_gym.cluster.queues import schedule
from ooco_gym.cluster.residents import finish, first_token, join, release, requeue
from ooco_gym.cluster.rules import DECODE_STRICT
from ooco_gym.cluster.run import batch_noise, tbt_bin
from ooco_gym.cluster.state import BATCH, NONE, PREFILL, PREFILLING_OFFLINE
from ooco_gym.cluster.transfer import hand_over
from ooco_gym.roofline.cost import causal_pairs, iteration_s, layers_s


@kernel
def start_prefill(c, instance, activity):
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
def complete_prefill(c, instance):
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
