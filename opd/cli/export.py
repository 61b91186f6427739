"""Turn a checkpoint into a Hugging Face folder: safetensors, config, tokenizer, model card.

One of an adapter becomes a whole model, the adapter merged into its base, or the folder of an
adapter that peft reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import adapters, load_model, load_tokenizer, model_folder, student_files

CONFIGS = ("config.json", adapters.CONFIG)
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [on-policy-distillation]
---

# {name}

A causal language model trained by on-policy distillation with opd.

- Architecture: {architecture}, {parameters:,} parameters
- Exported from: `{source}`

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
```
"""


ADAPTER_CARD = """---
library_name: peft
base_model: {base}
tags: [on-policy-distillation, lora]
---

# {name}

A low-rank adapter of `{base}`, trained by on-policy distillation with opd.

- Exported from: `{source}`

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
```
"""


def export(
    checkpoint: str, output: str, trust_remote_code: bool = False, adapter: bool = False
) -> None:
    """Write a Hugging Face folder from a checkpoint.

    Args:
        checkpoint: Checkpoint of opd fit (or anything that --model.student accepts: a hub id,
            perhaps with @REVISION, a folder, a GGUF file, embedded:NAME).
        output: Folder to write; it must be empty or not exist.
        trust_remote_code: Let a model run its own code, which is copied beside the weights.
        adapter: Write the adapter of a checkpoint that holds one, not the model that it makes of
            its base.

    Raises:
        UserError: The checkpoint cannot be read or holds no adapter, or the folder not be written.
    """
    folder = Path(output).expanduser()
    if not output.strip():
        raise UserError(f"--output {output!r}: names no folder")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--output {output}: is not empty; name a new folder")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    name = folder.absolute().name
    if adapter:
        with model_folder(checkpoint, weights=True) as found:
            if not adapters.is_adapter(found):
                raise UserError(f"--adapter true: {checkpoint} holds a whole model, no adapter")
            _write(folder, lambda into: _copy_adapter(into, Path(found), name, checkpoint))
    else:
        model = load_model(checkpoint, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        _write(folder, lambda into: _save_model(into, model, tokenizer, name, checkpoint))
    print(f"wrote {output}")


def _write(folder: Path, save: Callable[[Path], None]) -> None:
    """Fill a folder, all or nothing."""
    is_new = not folder.exists()
    partial = folder / ".partial"  # in the folder: it may be a mount, which nothing can replace
    try:
        partial.mkdir(parents=True)
        save(partial)
        # the config last: without it, a folder is no model
        for path in sorted(partial.iterdir(), key=lambda path: path.name in CONFIGS):
            path.rename(folder / path.name)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for all
        raise UserError(f"--output {folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    source: str,
) -> None:
    model.save_pretrained(folder)
    files = student_files(model, tokenizer)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    card = CARD.format(
        name=name,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        source=Path(source).name,
        trust=", trust_remote_code=True" if any(f.endswith(".py") for f in files) else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _copy_adapter(folder: Path, adapter: Path, name: str, source: str) -> None:
    for path in adapter.iterdir():
        if path.is_file() and path.name not in ("README.md", "config.json"):
            shutil.copyfile(path, folder / path.name)
    base = adapters.base_of(source, adapter)
    card = ADAPTER_CARD.format(name=name, base=base, source=Path(source).name)
    (folder / "README.md").write_text(card, encoding="utf-8")
