"""Command line of the bridge: ``python -m ooco_gym.bridge export|explain|serve key=value ...``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from ooco_gym.errors import OocoError

HELP = """\
python -m ooco_gym.bridge COMMAND ...          a policy from simulation in front of live vLLM servers

  export RUN_DIR out=policy/                   a trained run or a saved policy as ONNX and a manifest, without torch
  explain policy/ telemetry.json               what a policy sees in one telemetry record and what it decides, in words
  serve config=cluster.yaml policy=policy/     an OpenAI-compatible gateway over relaxed and strict vLLM instances

A cluster file needs the instances and what they run on; docs/bridge.md lists every key:

  instances:
    - {url: "http://127.0.0.1:8001", role: relaxed}
    - {url: "http://127.0.0.1:8002", role: strict}
  scenario: {model: qwen2.5-7b, hardware: a100, slo: {ttft_s: 0.5, tpot_s: 0.05}}
  listen: {host: 127.0.0.1, port: 8000}

serve takes any key of the cluster file, too, and it wins over the file:

  python -m ooco_gym.bridge serve config=cluster.yaml policy=ooco dry_run=true listen.port=9000
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command; a user's mistake is one sentence on stderr and exit status 2."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], list(arguments[1:])
    commands: dict[str, Callable[[list[str]], int]] = {"export": _export, "explain": _explain, "serve": _serve}
    try:
        if command not in commands:
            raise OocoError(f"unknown command '{command}': known are {', '.join(commands)}")
        return commands[command](rest)
    except OocoError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ooco_gym"):
            raise
        print(f"error: {error.name} is not installed: pip install 'ooco-gym[bridge,export]'", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to say, not at exit either
        return 141
    except OSError as error:
        print(f"error: {error.filename or command}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _export(arguments: list[str]) -> int:
    from ooco_gym.bridge.exports import export

    return int(export.export_command(arguments))


def _explain(arguments: list[str]) -> int:
    from ooco_gym.bridge.exports import explain

    return int(explain.explain_command(arguments))


def _serve(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(HELP, end="")
        return 0
    from ooco_gym.bridge.arguments import nested
    from ooco_gym.bridge.gateway import serve

    serve.main(nested(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
