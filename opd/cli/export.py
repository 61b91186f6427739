"""Turn a checkpoint into a Hugging Face folder: safetensors, config, tokenizer, model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import load_model, load_tokenizer, student_files

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


def export(checkpoint: str, output: str, trust_remote_code: bool = False) -> None:
    """Write a Hugging Face folder from a checkpoint.

    Args:
        checkpoint: Checkpoint of opd fit (or anything that --model.student accepts: a hub id,
            perhaps with @REVISION, a folder, a GGUF file, embedded:NAME).
        output: Folder to write; it must be empty or not exist.
        trust_remote_code: Let a model run its own code, which is copied beside the weights.

    Raises:
        UserError: The checkpoint cannot be read, or the folder not be written.
    """
    folder = Path(output).expanduser()
    if not output.strip():
        raise UserError(f"--output {output!r}: names no folder")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--output {output}: is not empty; name a new folder")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    model = load_model(checkpoint, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    is_new = not folder.exists()
    partial = folder / ".partial"  # in the folder: it may be a mount, which nothing can replace
    try:
        partial.mkdir(parents=True)
        _write(partial, model, tokenizer, name=folder.absolute().name, source=checkpoint)
        # the config last: without it, a folder is no model
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(folder / path.name)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for all
        raise UserError(f"--output {output}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    print(f"wrote {output}")


def _write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
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
