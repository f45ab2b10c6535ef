"""The offline backlog, shared by all instances: requeued work first, then the job list."""

from __future__ import annotations

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.lists import pop_front
from ooco_gym.cluster.log import REJECTED, note
from ooco_gym.cluster.residents import wake
from ooco_gym.cluster.rules import ADMIT_NONE, ADMIT_UNIFIED, draining
from ooco_gym.cluster.run import blocks_for
from ooco_gym.cluster.state import CHECKPOINTS, FREE, NONE, QUEUED, REQUEUED, UNIFIED


@kernel
def fits_anywhere(c, prompt, output):
    """Whether a request can be served wherever it goes: within the model's context and the smallest KV cache."""
    world = c.world[0]
    return prompt + output <= world.max_context_tokens and blocks_for(c, prompt + output) <= world.smallest_kv_blocks


@kernel
def _offline_job_waits(c):
    """Whether the job list offers a request now; jobs that no instance could hold are counted and passed over."""
    world = c.world[0]
    if world.offline_jobs == 0:
        return False
    while world.endless == 1 or world.offline_taken < world.offline_arrived:
        if world.rejected_offline == world.offline_taken >= world.offline_jobs:
            return False  # an endless backlog of which nothing fits
        row = world.offline_taken % world.offline_jobs
        if fits_anywhere(c, c.offline[row].prompt, c.offline[row].output):
            return True
        note(c, REJECTED, NONE, NONE, row, 0, 1, 0.0)
        world.offline_taken += 1
        world.rejected_offline += 1
    return False


@kernel
def offline_waits(c, instance):
    """Whether the backlog offers this instance a request: its checkpoints go first, and a drain takes nothing new."""
    rule = c.world[0].rule_admission
    if rule == ADMIT_NONE or (rule == ADMIT_UNIFIED and c.instances[instance].role != UNIFIED):
        return False
    if draining(c, instance) or lists.length(c, instance, CHECKPOINTS) > 0:
        return False
    return lists.length(c, c.world[0].instances, REQUEUED) > 0 or _offline_job_waits(c)


@kernel
def peek_offline(c):
    """(context tokens, since when on offer) of the request at the head of the backlog."""
    world = c.world[0]
    slot = lists.first(c, world.instances, REQUEUED)
    if slot != NONE:
        return c.slots[slot].context, c.slots[slot].arrival_s
    row = world.offline_taken % world.offline_jobs
    since_s = world.offline_head_s if world.endless == 1 else c.offline[row].arrival_s
    return int(c.offline[row].prompt), since_s


@kernel
def _backlog_moved(c):
    """The head of the backlog is another request now: it may fit where the last one did not."""
    if c.world[0].refusals == 0:
        return
    for instance in range(c.world[0].instances):
        if c.instances[instance].head_refused == 1:
            wake(c, instance)


@kernel
def take_offline(c):
    """Remove the head of the backlog into a slot."""
    world = c.world[0]
    if lists.length(c, world.instances, REQUEUED) > 0:
        _backlog_moved(c)
        return pop_front(c, world.instances, REQUEUED)
    row = world.offline_taken % world.offline_jobs
    slot = pop_front(c, world.instances, FREE)
    record = c.slots[slot]
    record.online = NONE
    record.serial = world.offline_taken
    record.prompt = c.offline[row].prompt
    record.output = c.offline[row].output
    record.arrival_s = world.offline_head_s if world.endless == 1 else c.offline[row].arrival_s
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
    record.done = 0
    record.credited = 0
    record.computed = 0
    record.cancelled = 0
    record.last_token_s = -1.0
