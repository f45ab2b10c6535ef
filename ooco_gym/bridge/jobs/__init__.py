"""Offline jobs that are never lost: the OpenAI Files and Batch APIs over a durable store."""

from ooco_gym.bridge.jobs.api import routes
from ooco_gym.bridge.jobs.runner import Dispatcher, Runner
from ooco_gym.bridge.jobs.store import Store
from ooco_gym.bridge.jobs.validation import Limits

__all__ = ["Dispatcher", "Limits", "Runner", "Store", "routes"]
