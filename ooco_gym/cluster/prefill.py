"""Prefill: a batch of its own on a relaxed instance, its interruption at a layer, and what the end of a piece means."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.batching import clear_pieces
from ooco_gym.cluster.lists import push_front, remove
from ooco_gym.cluster.log import INTERRUPTED, ITERATION_END, PREFILLED, note, note_request
from ooco_gym.cluster.queues import schedule
from ooco_gym.cluster.residents import (
    finish,
    first_token,
    free_slot,
    join,
    partial_list,
    release,
    return_to_backlog,
    wake_takers,
)
from ooco_gym.cluster.rules import CHUNK, DECODE_STRICT
from ooco_gym.cluster.run import batch_noise, tbt_bin
from ooco_gym.cluster.state import BATCH, NONE, PARTIAL, PREFILLING_OFFLINE, RELAXED, SCHEDULER_COST, TRUE_COST
from ooco_gym.cluster.transfer import hand_over
from ooco_gym.roofline.cost import iteration_s, layers_s


@kernel
def start_prefill(c, instance, activity):
    """Time the batch from its aggregates and let it run; it is one iteration."""
    world = c.world[0]
    state = c.instances[instance]
    tokens, causal, full, kv = float(state.piece_tokens), state.piece_causal, state.piece_full, float(state.piece_kv)
    sequences = float(lists.length(c, instance, BATCH))
    noise = batch_noise(c, instance)
    cost = c.costs[instance, TRUE_COST]
    total_s = noise * iteration_s(cost, tokens, causal, full, kv, sequences, 0.0, 0.0, 0.0)
    predicted_s = iteration_s(c.costs[instance, SCHEDULER_COST], tokens, causal, full, kv, sequences, 0.0, 0.0, 0.0)
    state.layers_s = noise * layers_s(cost, tokens, causal, full, kv, 0.0, 0.0, 0.0)
    state.layer_count = cost.layers
    state.activity = activity
    state.interrupted = 0
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
def return_to_partial(c, instance, slot):
    push_front(c, instance, partial_list(c, slot), slot)
    c.slots[slot].phase = PARTIAL


@kernel
def _lose_batch(c, instance):
    """An interrupted batch: its requests lose their KV and return, in order, to the head of the backlog; at chunk
    granularity those with finished pieces keep them instead."""
    world = c.world[0]
    state = c.instances[instance]
    world.preemptions += 1
    note(c, INTERRUPTED, instance, NONE, lists.length(c, instance, BATCH), 0, 0, state.end_s - state.start_s)
    world.interrupted_s += state.end_s - state.start_s
    while lists.length(c, instance, BATCH) > 0:
        slot = lists.last(c, instance, BATCH)
        remove(c, instance, BATCH, slot)
        if world.rule_preemption == CHUNK and c.slots[slot].done > 0:
            return_to_partial(c, instance, slot)
        else:
            c.slots[slot].computed = max(c.slots[slot].computed, c.slots[slot].done)
            release(c, instance, slot)
            return_to_backlog(c, slot)
    wake_takers(c)


@kernel
def _prefilled_online(c, instance, slot):
    world = c.world[0]
    record = c.slots[slot]
    c.instances[instance].pending_s -= record.estimate_s
    if record.last_token_s >= 0.0 and world.measure_from_s < world.now_s:
        c.world[0].tbt[tbt_bin(world.now_s - record.last_token_s)] += 1
    first_token(c, slot)
    record.last_token_s = world.now_s
    record.context += 1
    if record.context == record.prompt + record.output:
        release(c, instance, slot)
        finish(c, slot)
    elif c.instances[instance].role == RELAXED:
        hand_over(c, slot)
    else:
        join(c, instance, slot)


@kernel
def _prefilled_offline(c, instance, slot):
    world = c.world[0]
    record = c.slots[slot]
    world.credited_output_tokens += 1
    record.context += 1
    if record.context == record.prompt + record.output:
        release(c, instance, slot)
        finish(c, slot)
    elif world.rule_offline_decode == DECODE_STRICT and c.instances[instance].role == RELAXED:
        hand_over(c, slot)
    else:
        join(c, instance, slot)


@kernel
def _book_piece(c, instance, slot):
    """Account one piece that has run; says whether its request is done with the batch."""
    world = c.world[0]
    record = c.slots[slot]
    record.done += record.piece
    record.computed = max(record.computed, record.done)
    if record.online == NONE:
        credit = min(record.done, record.prompt) - record.credited
        if credit > 0:
            record.credited += credit
            world.credited_prompt_tokens += credit
    if record.cancelled == 1:
        remove(c, instance, BATCH, slot)
        c.instances[instance].pending_s -= record.estimate_s
        release(c, instance, slot)
        free_slot(c, slot)
    elif record.done == record.context:
        remove(c, instance, BATCH, slot)
        note_request(c, PREFILLED, instance, slot)
        if record.online == NONE:
            _prefilled_offline(c, instance, slot)
        else:
            _prefilled_online(c, instance, slot)


@kernel
def complete_pieces(c, instance, duration_s, decodes):
    """Book the pieces of an iteration of ``duration_s`` seconds that also decoded ``decodes`` sequences."""
    world = c.world[0]
    state = c.instances[instance]
    world.prefilled_tokens += state.piece_tokens
    world.recomputed_tokens += state.piece_recomputed
    world.recompute_s += duration_s * (state.piece_recomputed / (state.piece_tokens + decodes))
    slot = lists.first(c, instance, BATCH)
    while slot != NONE:
        following = c.slots[slot].next
        _book_piece(c, instance, slot)
        slot = following
    while lists.length(c, instance, BATCH) > 0:  # those with tokens left, so that the first ends up first
        slot = lists.last(c, instance, BATCH)
        remove(c, instance, BATCH, slot)
        return_to_partial(c, instance, slot)
    clear_pieces(c, instance)


@kernel
def complete_prefill(c, instance):
    """The end of a prefill batch, whole or interrupted."""
    world = c.world[0]
    state = c.instances[instance]
    duration_s = state.end_s - state.start_s
    world.busy_s += duration_s
    if state.interrupted == 1:
        _lose_batch(c, instance)
        clear_pieces(c, instance)
        return
    world.iterations += 1
    note(c, ITERATION_END, instance, NONE, 0, state.piece_tokens, state.piece_recomputed, duration_s)
    complete_pieces(c, instance, duration_s, 0)
