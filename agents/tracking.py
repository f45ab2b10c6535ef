"""Experiment tracking: Weights & Biases, with or without an account, behind three calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ooco_gym.errors import OocoError

MODES = ("auto", "online", "offline", "disabled")


class Tracker:
    """Sends scalars, pictures and a summary to W&B, or nowhere when disabled."""

    def __init__(self, mode: str, project: str, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        if mode not in MODES:
            raise OocoError(f"logger.mode is '{mode}', accepted are {', '.join(MODES)}")
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self.mode = mode
        self._run: Any = None
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        settings = {"project": project, "name": name, "dir": str(folder), "mode": mode, "save_code": False}
        self._run = wandb.init(**settings, config=dict(config))  # type: ignore[arg-type]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars at a training step."""
        if self._run is not None:
            self._run.log({**values, "step": step})

    def finish(self, summary: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
        """The closing figures of a run."""
        if self._run is None:
            return
        import wandb

        self._run.log({f"figures/{name}": wandb.Image(str(path)) for name, path in pictures.items()})
        self._run.summary.update(dict(summary))
        self._run.finish()
