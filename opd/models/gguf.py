"""GGUF files, the format of llama.cpp, as models: one is made a folder, and its weights are read.

transformers knows which tensor of an architecture is which, the package gguf how blocks of a few
bits become numbers. What comes out is an ordinary model in full precision, trained and saved like
any other; it starts from what the file was rounded to.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.initialization import no_init_weights
from transformers.utils.import_utils import is_gguf_available

from opd.errors import UserError

MAGIC = b"GGUF"
SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name or by its first bytes."""
    if not path.is_file():
        return False
    with suppress(OSError):  # of a file that is not ours to read: whoever needs it will say so
        return path.suffix == SUFFIX or _first_bytes(path) == MAGIC
    return False


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def folder(source: str, path: Path) -> str:
    """Return a folder with the config and the tokenizer of a file, made once in a process.

    Raises:
        UserError: The package gguf is not installed, or the file cannot be read.
    """
    if not is_gguf_available():
        raise UserError(
            f"{source}: a GGUF file is read with the package gguf, which is not installed; "
            "pip install 'opd[gguf]'"
        )
    with _reading(source):
        if (found := _first_bytes(path)) != MAGIC:
            raise UserError(f"{source}: is no GGUF file: it begins with {found!r}, not {MAGIC!r}")
        return _converted(*_state(path)).name


def _state(path: Path) -> tuple[Path, int, int]:
    """Tell a file from others of the same name: path, size, and time of its last change."""
    state = path.stat()
    return path.absolute(), state.st_size, state.st_mtime_ns


@functools.cache
def _converted(path: Path, size: int, modified: int) -> tempfile.TemporaryDirectory[str]:
    """Write the config and the tokenizer of a file; it goes when the process ends."""
    made = tempfile.TemporaryDirectory(prefix="opd-gguf-")
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    config.save_pretrained(made.name)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(made.name)
    # transformers adds GPT-2's <|endoftext|> to byte-level vocabularies that have no such token
    tokenizer = Path(made.name) / "tokenizer.json"
    content = json.loads(tokenizer.read_text("utf-8"))
    entries = config.get_text_config().vocab_size
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < entries]
    tokenizer.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return made


@contextmanager
def reading(source: str, path: Path) -> Iterator[dict[str, Any]]:
    """Options of ``from_pretrained`` with which it reads the weights of a file.

    Raises:
        UserError: In this context, the file cannot be read.
    """
    from transformers import GgufConfig  # of versions that can leave weights packed

    with _reading(source):
        yield {
            "gguf_file": str(path.absolute()),
            "quantization_config": GgufConfig(dequantize=True),
        }


def ordinary(
    model: PreTrainedModel, config: PretrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """Return a model with the same tensors that does not count as quantised: it can be saved."""
    with no_init_weights():
        plain = AutoModelForCausalLM.from_config(config, **options)
    assert isinstance(plain, PreTrainedModel)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Have transformers read a header once rather than for each use; explain what it raises.

    Of 25 seconds for a model of 49,152 tokens and 30 layers these were 16: the header for config,
    tokenizer and weights, and the table of tensors' names for each of 397 modules.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with (
        _replaced(gguf, "GGUFReader", lambda path: _header(reader, *_state(Path(path)))),
        _replaced(gguf, "get_tensor_name_map", functools.cache(names)),
        _replaced(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors),
    ):
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # whatever broken bytes provoke, in three libraries
            reason = " ".join(str(error).split())[:300].rstrip(".")
            known = any(word in reason for word in ("support", "architecture", "this reader"))
            flaw = reason if known else f"it is cut short or damaged: {reason}"
            raise UserError(f"{source}: cannot be read ({flaw})") from error


@functools.lru_cache(maxsize=1)
def _header(reader: Callable[[Path], Any], path: Path, size: int, modified: int) -> Any:
    return reader(path)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    former = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, former)
