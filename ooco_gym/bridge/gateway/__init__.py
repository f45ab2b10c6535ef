"""The OpenAI-compatible front over relaxed and strict vLLM instances, scheduled by a policy."""
