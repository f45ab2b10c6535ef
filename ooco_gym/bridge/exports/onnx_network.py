"""A policy network as ONNX, by torch's dynamo exporter. The only place of the bridge that needs torch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from ooco_gym.bridge.exports.manifest import INPUT, OUTPUT
from ooco_gym.cluster.observation import OBSERVATION_SIZE
from ooco_gym.errors import OocoError
from ooco_gym.policy import NetworkPolicy


def write_network(policy: NetworkPolicy, path: Path) -> dict[str, Any]:
    """Write ``policy`` to ``path`` with a free batch dimension and return what the manifest says of it.

    Raises OocoError when torch, onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # the exporter imports it, and complains at length where it is missing
        import torch
    except ImportError as error:
        raise OocoError(
            f"exporting a network needs {error.name}: pip install 'ooco-gym[train,export]'; loading it does not"
        ) from None
    layers: list[torch.nn.Module] = []
    for weight, bias in policy.layers:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            linear.weight.copy_(torch.as_tensor(weight))
            linear.bias.copy_(torch.as_tensor(bias))
        layers += [linear, torch.nn.Tanh()]
    network = torch.nn.Sequential(*layers[:-1], torch.nn.Hardtanh(-1.0, 1.0)).eval()
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it lists the operators of packages that no policy uses
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (torch.zeros(2, OBSERVATION_SIZE),),
                str(path),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    finally:
        registration.setLevel(level)
    model = onnx.load(str(path))
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return {
        "opset": model.opset_import[0].version,
        "ir_version": model.ir_version,
        "layers": [[weight.shape[1], weight.shape[0]] for weight, _ in policy.layers],
        "exporter": f"torch {torch.__version__}",
    }


def _strip(model: Any) -> None:
    """Take out the exporter's notes: stack traces with the paths of this machine, which no reader needs."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
