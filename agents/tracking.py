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
        try:
            import wandb
        except ImportError:
            raise OocoError("wandb is not installed: pip install 'ooco-gym[train]', or logger=none") from None

        settings = {"project": project, "name": name, "dir": str(folder), "mode": mode, "save_code": False}
        try:
            self._run = wandb.init(**settings, config=dict(config))  # type: ignore[arg-type]
        except Exception as error:  # wandb raises its own kinds, and the network's
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OocoError(f"W&B did not start ({reason}): logger.mode=offline or logger=none go without") from None

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
