"""``opd serve``: a vLLM server that samples for a student, or reads as a teacher.

It is ``vllm serve`` with options that make it one of two things: ``rollouts``, for
``opd.rollouts.VLLMServer``, draws with our code and takes weights over; ``teacher``, for
``--model.teacher http://HOST:PORT``, answers with the last hidden states of all tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Literal

from opd.errors import UserError
from opd.models import adapters, model_folder
from opd.rollouts.vllm import LOGPROBS

ROLES = {
    "rollouts": {
        "load-format": "dummy",
        "generation-config": "vllm",  # none
        "logits-processors": "opd.rollouts.vllm_worker:Drawing",
        "worker-extension-cls": "opd.rollouts.vllm_worker.Receiver",
        "logprobs-mode": LOGPROBS,
    },
    "teacher": {
        "runner": "pooling",
        "convert": "embed",
        "pooler-config": '{"task": "token_embed", "use_activation": false}',  # of all, as they are
    },
}
FLAGS = {
    "rollouts": ["--no-async-scheduling"],  # what is drawn last is known when the next is drawn
    "teacher": [],
}


def serve(
    model: str,
    role: Literal["rollouts", "teacher"] = "rollouts",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    max_tokens: int | None = None,
    tensor_parallel: int = 1,
    trust_remote_code: bool = False,
    others: Sequence[str] = (),
) -> None:
    """Serve a training run, until stopped.

    For rollouts, no weights are loaded: they are the student's, which opd fit sends. Whoever
    reaches the port can use the server, and change its weights: leave it on an address that only
    the training can reach.

    Args:
        model: The student or teacher, named as in opd fit: hub id, perhaps with @REVISION, folder,
            or embedded:NAME; a student also checkpoint or GGUF file, and for an adapter its base.
        role: What for: to sample completions of the student, or to read them as its teacher.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Of the weights. auto: as the model's config says.
        max_tokens: Longest prompt and completion together. None: the model's context.
        tensor_parallel: GPUs that share the model.
        trust_remote_code: Let a hub model run its own code.
        others: Further options of vllm serve, after --.

    Raises:
        UserError: vLLM is not installed, or cannot serve the model; or there is none.
    """
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # it has the routes by which weights come
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise UserError(
            "opd serve needs vLLM: pip install 'opd[vllm]' (on a machine without a GPU see `make "
            "test-vllm`)"
        ) from error
    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(model, weights=role == "teacher"))
        if adapters.is_adapter(folder):
            folder = stack.enter_context(_base(model, folder))
        if role == "teacher" and not any(Path(folder).glob("*.safetensors")):
            raise UserError(f"{model}: has no safetensors files to serve; export it first")
        options = {
            "served-model-name": str(Path(model).resolve()) if Path(model).exists() else model,
            "host": host,
            "port": port,
            "dtype": dtype,
            "max-model-len": max_tokens,
            "tensor-parallel-size": tensor_parallel,
            **ROLES[role],
        }
        named = [f"--{name}={value}" for name, value in options.items() if value is not None]
        named += FLAGS[role] + (["--trust-remote-code"] if trust_remote_code else [])
        command, parser = ServeSubcommand(), FlexibleArgumentParser(prog="opd serve ... --")
        command.subparser_init(parser.add_subparsers())
        parsed = parser.parse_args(["serve", folder, *named, *others])
        if hasattr(parsed, "enable_scale_out"):  # token ids in and out; older ones always do it
            parsed.enable_scale_out = True
        try:
            command.validate(parsed)
            command.cmd(parsed)
        except Exception as error:  # of whatever kind; what vLLM has logged says more
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"vLLM does not serve {model} ({reason})") from error


def _base(source: str, folder: str) -> AbstractContextManager[str]:
    return model_folder(adapters.base_of(source, folder))
